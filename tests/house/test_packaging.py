"""What an installation must contain, and what importing it must not cost."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layerlr

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def backend(monkeypatch):
    file = ROOT / "build_backend" / "backend.py"
    if not file.is_file():
        pytest.skip(reason="these tests are not beside the source tree")
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
    """setup.py as a module. The only nvcc is the one that nvcc() makes; torch has CUDA, no GPU."""
    file = ROOT / "setup.py"
    if not file.is_file():
        pytest.skip(reason="these tests are not beside the source tree")
    setuptools = pytest.importorskip("setuptools", reason="setup.py is of setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    monkeypatch.setenv("LAYERLR_CUDA", "0")
    for name in ("LAYERLR_CUDA_ARCH", "LAYERLR_CUDA_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("nvcc", "cuda_library"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_under_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("LAYERLR_CUDA")

    program = tmp_path / "nvcc"
    which = module.shutil.which

    def only_ours(name, path=None):
        return which(name, path=str(tmp_path) if name == "nvcc" else path)

    def make_nvcc(architectures="80 90 100 120"):
        program.write_text(NVCC.format(architectures=architectures))
        program.chmod(0o755)

    monkeypatch.setattr(module.shutil, "which", only_ours)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module.make_nvcc = make_nvcc
    module.texts = lambda: module.build_files(torch, module.native_extensions()).values()
    module.text = lambda: "".join(module.texts())
    return module


@pytest.fixture
def gpus(build, monkeypatch):
    """A function that puts GPUs of some compute capabilities into the machine."""

    def make(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])

    return make


def left_out(build):
    """Why the CUDA engine is left out, as what is built will say."""
    text = build.text()
    assert [extension.name for extension in build.native_extensions()] == ["layerlr._C"]
    assert "liblayerlr_cuda" not in text and ".cu" not in text
    (reason,) = re.findall(r'-DLAYERLR_NO_CUDA="(.*?)"', text)
    return reason


def test_build_without_cuda(build, monkeypatch):
    build.make_nvcc()
    monkeypatch.setenv("LAYERLR_CUDA", "0")
    assert left_out(build) == "LAYERLR_CUDA=0"


@pytest.mark.parametrize("wanted", [None, "", "auto"])
def test_build_goes_on_without_nvcc(build, monkeypatch, wanted):
    if wanted is not None:
        monkeypatch.setenv("LAYERLR_CUDA", wanted)
    assert left_out(build).startswith("no nvcc in CUDA_HOME, ")


def test_cuda_is_left_out_where_torch_has_none(build, monkeypatch):
    """It could not be used; whoever wants it compiled all the same says so."""
    build.make_nvcc()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert left_out(build) == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setenv("LAYERLR_CUDA", "1")
    assert '-DLAYERLR_NO_CUDA=""' in build.text()
    assert len(build.native_extensions()) == 2


def test_cuda_is_left_out_where_the_gpu_is_too_old(build, gpus):
    build.make_nvcc("75 80 90")
    gpus((7, 5))
    assert left_out(build) == "compute capability 7.5 of the GPU, 8.0 is needed"


def test_a_source_distribution_needs_no_torch(build, monkeypatch):
    build.make_nvcc()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build.nvcc.choose() == (None, "no torch")


def test_build_stops_where_cuda_is_asked_for_and_nvcc_is_missing(build, monkeypatch):
    monkeypatch.setenv("LAYERLR_CUDA", "1")
    with pytest.raises(SystemExit, match=r"LAYERLR_CUDA=1 needs nvcc and found none.*CUDA_HOME"):
        build.native_extensions()


def test_build_refuses_an_unknown_choice(build, monkeypatch):
    monkeypatch.setenv("LAYERLR_CUDA", "yes")
    with pytest.raises(SystemExit, match="LAYERLR_CUDA is auto, 0 or 1, not 'yes'"):
        build.native_extensions()


def test_build_stops_without_a_compiler(build, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match=r"a C\+\+ compiler and found no 'c\+\+': install g\+\+ "):
        build.text()


def test_build_with_cuda(build):
    build.make_nvcc()
    text = build.text()

    def link(name):
        return re.search(rf"build {name}\.so: link (.*)\n  libraries = (.*)", text).groups()

    objects, libraries = link("layerlr._C")
    assert ".cu.o" not in objects
    assert "cudart" not in libraries
    objects, libraries = link("layerlr.liblayerlr_cuda")
    engine = "sm-80-90-100-120/engine/csrc/cuda/engine.cu.o"
    assert engine in objects.split() and ".cpp" not in objects
    assert "torch" not in libraries
    assert "'-L/some toolkit/lib' -lcudart_static" in libraries
    assert "'-DLAYERLR_CUDA_ARCH=\"80;90;100;120\"'" in text
    assert '-DLAYERLR_NO_CUDA=""' in text


def test_nvcc_compiles_each_object_in_a_folder_of_its_own(build):
    """Its temporary files lie beside the object, under names that others would take too."""
    build.make_nvcc()
    objects = re.findall(r"(?m)^build (\S+): cuda ", build.text())
    assert len({Path(name).parents[2] for name in objects}) == len(objects) > 3


def test_what_knows_neither_python_nor_torch_is_compiled_once_for_all(build, monkeypatch):
    build.make_nvcc()
    shared, own = build.texts()
    monkeypatch.setattr(build, "torch_version", lambda torch: (2, 11))
    monkeypatch.setattr(build, "find_python_headers", lambda: "/another/python")
    monkeypatch.setattr(torch.utils.cpp_extension, "include_paths", lambda: ["/another/torch"])
    monkeypatch.setattr(torch.utils.cpp_extension, "library_paths", lambda: ["/another/torch"])
    assert [shared == x for x in build.texts()] == [True, False]
    assert "cpu/engine.cpp.o: compile" in shared and "cpu/engine.cpp.o: compile" not in own
    assert "csrc/bindings.cpp.o: compile" in own


@pytest.mark.parametrize(
    ("of_torch", "ahead"), [("12.9", True), ("13.0", False), ("14.0", False), (None, False)]
)
def test_an_nvcc_ahead_of_torch_is_spoken_of(build, monkeypatch, of_torch, ahead):
    build.make_nvcc()
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    word = build.nvcc.ahead(build.nvcc.find_nvcc())
    assert bool(word) == ahead
    if ahead:
        assert word.startswith("warning: ")
        assert "nvcc is of CUDA 13, torch of CUDA 12.9: " in word
        assert "need a driver for CUDA 13" in word


@pytest.mark.parametrize(
    ("of_torch", "word"),
    [("12.9", "warning: "), ("13.0", None), (None, "the CUDA engine is left out: torch ")],
)
def test_a_build_says_it_once(build, monkeypatch, tmp_path, capfd, of_torch, word):
    """Ninja is a program here that does nothing."""
    build.make_nvcc()
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "build_files", lambda *args: {})
    monkeypatch.setattr(build, "find_ninja", lambda: "true")
    command = build.NinjaBuild(importlib.import_module("setuptools").Distribution())
    command.extensions = []
    command.build_extensions()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(word)
    assert all(line.startswith(f"layerlr: {word}") for line in lines)


def test_cuda_home_comes_before_the_path(build, monkeypatch):
    places = []
    monkeypatch.setattr(build.shutil, "which", lambda name, path: places.append(path))
    monkeypatch.setenv("CUDA_HOME", "/home")
    monkeypatch.setenv("CUDA_PATH", "/path")
    monkeypatch.setenv("PATH", "/usr/bin")
    assert build.nvcc.find_nvcc() is None
    assert places == ["/home/bin:/path/bin:/usr/bin:/usr/local/cuda/bin"]


def compiled_for(build):
    """The virtual architecture and the codes of the kernels."""
    ((virtual, codes),) = re.findall(r"arch=compute_(\d+),code=\[(.*?)\]", build.text())
    return virtual, codes.split(",")


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
    build.make_nvcc(known)
    if wanted is not None:
        monkeypatch.setenv("LAYERLR_CUDA_ARCH", wanted)
    if expected is None:
        with pytest.raises(SystemExit, match=r"LAYERLR_CUDA_ARCH=.* cannot be compiled by"):
            build.text()
        return
    oldest = expected.split()[0]
    codes = [*(f"sm_{a}" for a in expected.split()), f"compute_{oldest}"]
    assert compiled_for(build) == (oldest, codes)


@pytest.mark.parametrize(
    ("known", "there", "expected"),
    [
        ("75 80 86 90 100", [(9, 0)], "90"),
        ("75 80 86 90 100", [(9, 0), (8, 6), (9, 0)], "86 90"),
        ("75 80 86 90 100", [(7, 5), (9, 0)], "90"),
        ("75 80 90", [(8, 9)], "80"),
        ("75 80 90", [(12, 0)], "90"),  # its PTX runs there
    ],
)
def test_the_gpus_that_are_present_are_compiled_for(build, gpus, known, there, expected):
    build.make_nvcc(known)
    gpus(*there)
    _, codes = compiled_for(build)
    assert codes[:-1] == [f"sm_{a}" for a in expected.split()]


def test_what_was_asked_for_comes_before_the_gpus(build, gpus, monkeypatch):
    build.make_nvcc()
    gpus((9, 0))
    monkeypatch.setenv("LAYERLR_CUDA_ARCH", "80;100")
    assert compiled_for(build) == ("80", ["sm_80", "sm_100", "compute_80"])


def test_an_nvcc_that_is_older_than_every_gpu_is_refused(build, gpus):
    build.make_nvcc("35 50")
    gpus((9, 0))
    with pytest.raises(SystemExit, match="LAYERLR_CUDA_ARCH=90 cannot be compiled by"):
        build.text()


def test_sources_cover_every_file(build):
    """Each C++ and CUDA file belongs to one extension."""
    build.make_nvcc()
    files = [source for extension in build.native_extensions() for source in extension.sources]
    there = {
        str(file.relative_to(ROOT))
        for end in ("cpp", "cu")
        for file in ROOT.glob(f"csrc/**/*.{end}")
    }
    assert len(files) == len(set(files))
    assert set(files) == {file for file in there if build.X86 or not build.isa_flags(file)}


@pytest.fixture
def library(build, monkeypatch, tmp_path):
    """A function that makes a library of a layout and names it to the build."""
    compiler = build.shutil.which("cc") or pytest.skip(reason="needs a C compiler")

    def make(layout, function="layerlr_cuda_library"):
        # the system takes a path that it knows for the library that it has opened
        source, file = tmp_path / "library.c", tmp_path / f"{layout}{function}.so"
        source.write_text(
            f'static const struct {{ const char* layout; }} library = {{"{layout}"}};'
            f"const void* {function}(void) {{ return &library; }}"
        )
        subprocess.run([compiler, "-shared", source, "-o", file], check=True)
        monkeypatch.setenv("LAYERLR_CUDA_LIBRARY", str(file))
        return file

    return make


def test_a_library_that_is_there_is_copied(build, library, monkeypatch, tmp_path):
    """Byte for byte, without nvcc, whatever torch has."""
    made = library(build.cuda_library.layout())
    monkeypatch.setattr(torch.version, "cuda", None)
    text = build.text()
    assert '-DLAYERLR_NO_CUDA=""' in text and ".cu.o" not in text
    setuptools = importlib.import_module("setuptools")
    extensions = [x for x in build.native_extensions() if x.name == build.CUDA_LIBRARY]
    command = build.NinjaBuild(setuptools.Distribution({"ext_modules": extensions}))
    command.ensure_finalized()
    command.build_lib = str(tmp_path / "installed")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "build_files", lambda *args: {})
    command.run()
    copy = tmp_path / "installed/layerlr/liblayerlr_cuda.so"
    assert copy.read_bytes() == made.read_bytes()
    assert [Path(output) for output in command.get_outputs()] == [copy]


def test_a_library_that_does_not_fit_is_refused(build, library, monkeypatch, tmp_path):
    def refused(words):
        with pytest.raises(SystemExit, match=f"LAYERLR_CUDA_LIBRARY=.*{words}"):
            build.native_extensions()

    library("0.0.1-0123456789ab")
    refused(f"is of layerlr 0.0.1-0123456789ab, these .* {build.cuda_library.layout()}: name ")
    library("", function="another")
    refused("is no library of layerlr's kernels: .*undefined symbol: layerlr_cuda_library")
    monkeypatch.setenv("LAYERLR_CUDA_LIBRARY", str(tmp_path / "library.c"))
    refused("is no library of layerlr's kernels: .*(too short|invalid ELF header)")
    monkeypatch.setenv("LAYERLR_CUDA_LIBRARY", str(tmp_path / "gone.so"))
    refused("gone.so is no file")
    monkeypatch.setenv("LAYERLR_CUDA", "0")
    with pytest.raises(SystemExit, match="LAYERLR_CUDA=0 leaves out what LAYERLR_CUDA_LIBRARY="):
        build.native_extensions()


def test_a_layout_is_of_the_release_and_of_the_headers_of_both_sides(build, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    here = build.cuda_library.layout()
    monkeypatch.setattr(build.cuda_library, "ROOT", tmp_path)
    assert build.cuda_library.layout() == here

    def changes(name):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("\n", " \n").replace('n = "', 'n = "9.'))
        changed = build.cuda_library.layout() != here
        (tmp_path / name).write_text(text)
        return changed

    of_both = ["cuda/engine.h", "cuda/tables.h", "decide.h", "step_config.h", "row.h"]
    of_both += ["directions/all.h", "directions/adam.h", "rules/all.h", "rules/layca.h"]
    assert [name for name in of_both if not changes(f"csrc/{name}")] == []
    assert changes("pyproject.toml")
    of_one = ["cuda/kernels.cuh", "cuda/schedule.h", "cpu/vec.h", "bound_plan.h"]
    assert [name for name in of_one if changes(f"csrc/{name}")] == []
