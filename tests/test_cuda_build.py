"""The CUDA kernels as compiled: what they were built for, and what the compiler made of them."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
#: where setup.py builds
FOLDER = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}-torch{torch.__version__}"
#: bytes of local memory that a thread may have
LOCAL_BYTES = 0


def find(program, *folders):
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


TOOLKITS = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
NVCC = find("nvcc", *(Path(home, "bin") for home in TOOLKITS if home))


@pytest.fixture(scope="module")
def cuda():
    if importlib.util.find_spec("layerlr._cuda") is None:
        pytest.skip("layerlr was built without its CUDA kernels")
    from layerlr import _cuda

    return _cuda


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.skipif(os.environ.get("LAYERLR_CUDA") == "0", reason="LAYERLR_CUDA=0")
def test_kernels_are_built_where_nvcc_is():
    assert importlib.util.find_spec("layerlr._cuda") is not None


def test_engine_and_architectures(cuda):
    assert '"layerlr.Engine"' in repr(cuda.engine())
    assert cuda.architectures
    assert cuda.architectures == sorted(cuda.architectures, key=int)


def test_device_info(cuda):
    try:
        info = cuda.device_info(0)
    except RuntimeError as error:
        assert re.search("driver|no CUDA-capable device", str(error))
    else:
        assert info["multiprocessors"] > 0


def test_library_needs_neither_torch_nor_a_driver(cuda):
    program = (
        "import sys; from importlib.util import module_from_spec, spec_from_file_location;"
        f"spec = spec_from_file_location('_cuda', {cuda.__file__!r});"
        "spec.loader.exec_module(module_from_spec(spec));"
        "maps = open('/proc/self/maps').read();"
        "print('torch' in sys.modules, 'libcuda.so' in maps, 'libcudart.so' in maps)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False"] * 3, done.stderr


def test_cuda_runtime_stays_inside_the_library(cuda):
    """Torch's own runtime must not get hold of the calls of ours, nor the other way round."""
    assert not hasattr(ctypes.CDLL(cuda.__file__), "cudaLaunchKernel")


def test_no_source_asks_for_its_architecture():
    """setup.py compiles for the oldest alone, and assembles for the others what that gave."""
    for file in (ROOT / "csrc").rglob("*.*"):
        assert "__CUDA_ARCH__" not in file.read_text(), file


def short_name(mangled):
    """(kernel, direction or '-') of a kernel's name in the object file."""
    template = re.search(r"INS_(\d+)(\w+)", mangled)
    direction = template[2][: int(template[1])] if template else "-"
    return re.search(r"[a-z]+_kernel(?=[IE])", mangled)[0], direction


def compiler_reports():
    """What ptxas says of each (architecture, kernel, direction), from the build's logs."""
    reports = {}
    logs = [FOLDER / f"{file.relative_to(ROOT)}.o.log" for file in ROOT.glob("csrc/cuda/*.cu")]
    for log in sorted(log for log in logs if log.is_file()):
        for text in log.read_text().split("Compiling entry function ")[1:]:
            mangled, arch = re.match(r"'(\S+)' for 'sm_(\d+)'", text).groups()
            memory = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text)
            reports[(arch, *short_name(mangled))] = {
                "local": max(map(int, memory)),
                "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                "shared": sum(map(int, re.findall(r"(\d+) bytes smem", text))),
            }
    return reports


REPORTS = compiler_reports()
NO_LOGS = pytest.param(None, marks=pytest.mark.skip("no logs of a CUDA build under build/"))


def each_kernel(wanted=""):
    """Parametrise over the kernels of a name."""
    keys = [key for key in REPORTS if wanted in key[1]]
    return pytest.mark.parametrize("key", keys or [NO_LOGS], ids="-".join if keys else None)


@pytest.fixture(scope="module")
def listings(cuda):
    """How often each instruction occurs in each (architecture, kernel, direction)."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    cuobjdump = find("cuobjdump", *folders, *([Path(NVCC).parent] if NVCC else []))
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    instruction = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)")
    counts = {}
    arch = current = None
    command = [cuobjdump, "--dump-sass", cuda.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := instruction.match(line):
                current[found[1]] += 1
            elif line.startswith("arch = sm_"):
                arch = line.split("_")[1].strip()
            elif "Function : " in line:
                current = counts.setdefault((arch, *short_name(line.split()[-1])), Counter())
    assert process.returncode == 0
    return counts


@each_kernel()
def test_no_spills_and_no_local_memory(key):
    assert REPORTS[key]["local"] <= LOCAL_BYTES


@each_kernel()
def test_no_atomic_sums_of_floats(key, listings):
    """They would add in the order of arrival."""
    floats = r"(ATOM|RED)\w*\.[\w.]*(F16|BF16|F32|F64)"
    assert not [name for name in listings[key] if re.match(floats, name)]


@each_kernel("step")
def test_tiles_move_in_16_bytes(key, listings):
    """Into shared memory by asynchronous copies, and out of it."""
    names = listings[key]
    assert any(re.match(r"LDGSTS\.[\w.]*128$", name) for name in names)
    assert any(re.match(r"STG\.E\.[\w.]*128$", name) for name in names)


@pytest.mark.skipif(not REPORTS, reason="no logs of a CUDA build under build/")
def test_every_architecture_has_every_kernel(cuda, listings):
    assert {key[0] for key in REPORTS} == set(cuda.architectures)
    assert set(listings) == set(REPORTS)


@pytest.mark.skipif(not REPORTS, reason="no logs of a CUDA build under build/")
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_every_kernel_fits_on_its_gpus(tmp_path):
    program = tmp_path / "occupancy"
    files = ["tests/native/occupancy.cpp", "csrc/cuda/schedule.cpp"]
    command = [NVCC, "-std=c++17", "-Icsrc", *files, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    table = [(*key, report["registers"], report["shared"]) for key, report in REPORTS.items()]
    text = "".join(" ".join(map(str, row)) + "\n" for row in table)
    done = subprocess.run([program], input=text, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for arch, kernel, direction in REPORTS:
        if arch in ("80", "90", "100"):
            assert re.search(rf": {kernel} {direction}, .*[1-9]\d* blocks", done.stdout)
