"""What an installation must contain, and what importing it must not cost."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import layerlr

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def backend(monkeypatch):
    file = ROOT / "build_backend" / "backend.py"
    if not file.is_file():
        pytest.skip("these tests are not beside the source tree")
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    spec = importlib.util.spec_from_file_location("build_backend_under_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # As in an isolated build: torch cannot be imported from where the build runs.
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    return module


def test_version_is_the_metadata_s():
    assert layerlr.__version__ == importlib.metadata.version("layerlr")


def test_version_is_pyproject_s():
    # A stale editable install fails here: its metadata is of the day it was installed.
    text = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+?)"', text, flags=re.MULTILINE)
    assert layerlr.__version__ == version


def test_type_information_is_installed():
    assert Path(layerlr.__file__).with_name("py.typed").is_file()


def test_native_extension_is_installed():
    assert importlib.util.find_spec("layerlr._C") is not None


def test_import_is_light():
    """Importing layerlr imports torch and little else; plots and kernels load when used."""
    heavy = {"matplotlib", "triton", "sklearn", "tensorboard", "torch.utils.tensorboard"}
    # Torch itself may bring some in (its CUDA builds look for triton); they are not ours.
    program = (
        "import sys, torch; before = set(sys.modules); import layerlr;"
        f"print(sorted({heavy!r} & (set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_backend_without_torch_says_what_to_do(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "target_folders", lambda: [str(tmp_path)])
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        with pytest.raises(SystemExit, match=r"Install PyTorch first .*--no-build-isolation"):
            hook()


def test_backend_finds_the_torch_of_the_target_environment(backend, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").touch()
    monkeypatch.setattr(backend, "target_folders", lambda: [str(tmp_path)])
    backend.expose_torch()
    # Last, so that it hides nothing of the build's own.
    assert sys.path[-1] == str(tmp_path)
