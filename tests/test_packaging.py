"""What an installation must contain, and what importing it must not cost."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


#: an nvcc that only tells what it knows
NVCC = """#!/bin/sh
case $1 in
--list-gpu-arch) printf 'compute_%s\\n' {architectures} ;;
--version) echo 'Cuda compilation tools, release 13.2, V13.2.78' ;;
--dryrun) echo '#$ LIBRARIES=  "-L/some toolkit/stubs" "-L/some toolkit/lib"' >&2 ;;
esac
"""


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, in a world whose only nvcc is the one that nvcc() makes."""
    file = ROOT / "setup.py"
    if not file.is_file():
        pytest.skip("these tests are not beside the source tree")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    monkeypatch.setenv("LAYERLR_CUDA", "0")
    monkeypatch.delenv("LAYERLR_CUDA_ARCH", raising=False)
    spec = importlib.util.spec_from_file_location("setup_under_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("LAYERLR_CUDA")

    program = tmp_path / "nvcc"
    which = module.shutil.which

    def only_ours(name, path=None):
        return which(name, path=str(tmp_path) if name == "nvcc" else path)

    def nvcc(architectures="80 90 100"):
        program.write_text(NVCC.format(architectures=architectures))
        program.chmod(0o755)

    monkeypatch.setattr(module.shutil, "which", only_ours)
    module.nvcc = nvcc
    module.text = lambda: module.build_ninja(torch, module.native_extensions())
    return module


def test_build_without_cuda(build, monkeypatch):
    build.nvcc()
    monkeypatch.setenv("LAYERLR_CUDA", "0")
    assert "cuda.so" not in build.text()
    assert ".cu" not in build.text()


@pytest.mark.parametrize("wanted", [None, "", "auto"])
def test_build_goes_on_without_nvcc(build, monkeypatch, wanted):
    if wanted is not None:
        monkeypatch.setenv("LAYERLR_CUDA", wanted)
    assert [extension.name for extension in build.native_extensions()] == ["layerlr._C"]


def test_build_stops_where_cuda_is_asked_for_and_nvcc_is_missing(build, monkeypatch):
    monkeypatch.setenv("LAYERLR_CUDA", "1")
    with pytest.raises(SystemExit, match=r"LAYERLR_CUDA=1 needs nvcc and found none.*CUDA_HOME"):
        build.native_extensions()


def test_build_refuses_an_unknown_choice(build, monkeypatch):
    monkeypatch.setenv("LAYERLR_CUDA", "yes")
    with pytest.raises(SystemExit, match="LAYERLR_CUDA is auto, 0 or 1, not 'yes'"):
        build.native_extensions()


def test_build_with_cuda(build):
    build.nvcc()
    text = build.text()

    def link(name):
        return re.search(rf"build {name}\.so: link (.*)\n  libraries = (.*)", text).groups()

    objects, libraries = link("layerlr._C")
    assert ".cu.o" not in objects
    assert "cudart" not in libraries
    objects, libraries = link("layerlr._cuda")
    assert {"csrc/cuda/bindings.cpp.o", "csrc/cuda/engine.cu.o"} <= set(objects.split())
    assert "torch_cpu" not in libraries
    assert "'-L/some toolkit/lib' -lcudart_static" in libraries
    assert "'-DLAYERLR_CUDA_ARCH=\"80;90;100\"'" in text


@pytest.mark.parametrize(
    ("of_torch", "ahead"), [("12.9", True), ("13.0", False), ("14.0", False), (None, False)]
)
def test_an_nvcc_ahead_of_torch_is_spoken_of(build, monkeypatch, capsys, of_torch, ahead):
    build.nvcc()
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    build.compare_cuda(build.find_nvcc(), torch)
    printed = capsys.readouterr().out
    assert bool(printed) == ahead
    if ahead:
        assert "nvcc is of CUDA 13, torch of CUDA 12.9: " in printed
        assert "need a driver for CUDA 13" in printed


def test_cuda_home_comes_before_the_path(build, monkeypatch):
    places = []
    monkeypatch.setattr(build.shutil, "which", lambda name, path: places.append(path))
    monkeypatch.setenv("CUDA_HOME", "/home")
    monkeypatch.setenv("CUDA_PATH", "/path")
    monkeypatch.setenv("PATH", "/usr/bin")
    assert build.find_nvcc() is None
    assert places == ["/home/bin:/path/bin:/usr/bin:/usr/local/cuda/bin"]


@pytest.mark.parametrize(
    ("known", "wanted", "expected"),
    [
        ("75 80 90 100", None, "80 90 100"),
        ("75 80 90", None, "80 90"),
        ("75 80 90 100 103", "103; 90", "90 103"),
        ("80 90", "90", "90"),
        ("80 90 100", ";", None),
        ("80 90", "80;100", None),
        ("80 90", "90a", None),
        ("35 50", None, None),
        ("", None, None),
    ],
)
def test_architectures(build, monkeypatch, known, wanted, expected):
    build.nvcc(known)
    if wanted is not None:
        monkeypatch.setenv("LAYERLR_CUDA_ARCH", wanted)
    if expected is None:
        with pytest.raises(SystemExit, match=r"LAYERLR_CUDA_ARCH=.* cannot be compiled by"):
            build.text()
        return
    ((virtual, codes),) = re.findall(r"arch=compute_(\d+),code=\[(.*?)\]", build.text())
    oldest = expected.split()[0]
    assert virtual == oldest
    assert codes.split(",") == [*(f"sm_{a}" for a in expected.split()), f"compute_{oldest}"]


def test_sources_cover_every_file(build):
    """Each C++ and CUDA file belongs to one extension."""
    build.nvcc()
    files = [source for extension in build.native_extensions() for source in extension.sources]
    there = {
        str(file.relative_to(ROOT))
        for end in ("cpp", "cu")
        for file in ROOT.glob(f"csrc/**/*.{end}")
    }
    assert len(files) == len(set(files))
    assert set(files) == {file for file in there if build.X86 or not build.isa_flags(file)}
