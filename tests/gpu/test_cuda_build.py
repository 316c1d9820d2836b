"""The CUDA kernels as compiled: what they were built for, and what the compiler made of them."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sass
from sass import NVCC, Key, find, key_of

from layerlr import _C
from layerlr.backends.cuda import LIBRARY, left_out, load

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = [] if left_out() else load().architectures
#: where setup.py builds such a library
FOLDER = ROOT / "build/ninja" / "-".join(["sm", *ARCHITECTURES])
#: bytes of local memory that a thread may have, outside of the loops over elements
STACK_BYTES = 8


@pytest.fixture(scope="module")
def cuda():
    """The library's kernels."""
    if _C.NO_CUDA:
        pytest.skip(reason=f"the CUDA engine was not built: {_C.NO_CUDA}")
    return load()


def test_the_library_is_there_or_the_build_says_why_not():
    assert LIBRARY.is_file() == (_C.NO_CUDA == "")


@pytest.mark.skipif(os.environ.get("LAYERLR_CUDA") != "1", reason="LAYERLR_CUDA is not 1")
def test_the_engine_is_there_where_it_was_insisted_on():
    assert left_out() is None


def test_architectures(cuda):
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
        f"import ctypes; ctypes.CDLL({str(LIBRARY)!r}).layerlr_cuda_library();"
        "maps = open('/proc/self/maps').read();"
        "print('libtorch' in maps, 'libcuda.so' in maps, 'libcudart.so' in maps)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False"] * 3, done.stderr


@pytest.mark.skipif(find("nm") is None, reason="needs nm")
def test_one_function_is_all_that_the_library_shows(cuda):
    """Torch's own runtime must not get hold of the calls of ours, nor the other way round."""
    command = ["nm", "-D", "--defined-only", LIBRARY]
    listing = subprocess.check_output(command, text=True)
    assert [line.split()[-1] for line in listing.splitlines()] == ["layerlr_cuda_library"]


@pytest.mark.skipif(find("nm") is None, reason="needs nm")
def test_the_library_wants_nothing_of_python_or_torch(cuda):
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", LIBRARY], text=True)
    wanted = [line.split()[-1] for line in listing.splitlines()]
    assert wanted and not [name for name in wanted if re.search(r"^_?Py|c10|torch", name)]


def test_no_source_asks_for_its_architecture():
    """setup.py compiles for the oldest alone, and assembles for the others what that gave."""
    for file in (ROOT / "csrc").rglob("*.*"):
        assert "__CUDA_ARCH__" not in file.read_text(), file


#: the passes of a step
ORDERS = {
    "unmeasured": ["advance_apply"],
    "gradient_rule": ["measure", "advance_apply_measured"],
    "update_rule": ["advance", "apply"],
}
#: whose coded kernels need the registers of two blocks
THREE_STATES = ("AmsGrad", "RmspropCenteredMomentum")


def compiler_reports():
    """What ptxas says of each kernel, from the build's logs."""
    reports = {}
    for log in sorted(FOLDER.rglob("*.cu.o.log")):
        for text in log.read_text().split("Compiling entry function ")[1:]:
            # a division of doubles is a call, and its function has registers of its own
            text = re.sub(r"ptxas warning .* in function '__cuda_sm20_div_rn_f64.*", "", text)
            mangled, arch = re.match(r"'(\S+)' for 'sm_(\d+)'", text).groups()
            reports[key_of(arch, mangled)] = {
                "stack": int(re.search(r"(\d+) bytes stack frame", text)[1]),
                "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                "shared": sum(map(int, re.findall(r"(\d+) bytes smem", text))),
            }
    return reports


REPORTS = compiler_reports()
NO_LOGS = pytest.param(None, marks=pytest.mark.skip(reason="no logs of a CUDA build under build/"))


def each_kernel(**wanted):
    """Parametrise over the kernels whose keys have these values."""
    keys = [key for key in REPORTS if wanted.items() <= key._asdict().items()]
    return pytest.mark.parametrize(
        "key", keys or [NO_LOGS], ids=(lambda k: f"{k.arch}-{k.name}") if keys else None
    )


@pytest.fixture(scope="module")
def listings(cuda):
    """The instructions of each kernel."""
    if sass.cuobjdump() is None:
        pytest.skip(reason="needs cuobjdump, of the CUDA toolkit or of Triton")
    return sass.Listings(cuda.architectures)


def matching(code, pattern):
    return [i.name for i in code if re.fullmatch(pattern, i.name)]


@each_kernel()
def test_no_spills(key, listings):
    """A number that is kept from item to item, or over a division of doubles, may lie on the stack;
    nothing that a loop over elements needs."""
    assert REPORTS[key]["stack"] <= STACK_BYTES
    for body in innermost_loops(listings[key]):
        assert not (matching(body, "LDG.*") and matching(body, "LDL.*|STL.*"))


@each_kernel()
def test_no_atomic_sums_of_floats(key, listings):
    """They would add in the order of arrival."""
    assert not matching(listings[key], r"(ATOM|RED)\w*\.[\w.]*(F16|BF16|F32|F64).*")


@each_kernel(kernel="step", family="plain")
def test_vectors_move_in_16_bytes(key, listings):
    """Between registers and global memory."""
    assert matching(listings[key], r"LDG\.E\.(\w+\.)*128(\..*)?")
    assert matching(listings[key], r"STG\.E\.(\w+\.)*128(\..*)?")
    assert not matching(listings[key], r"LDGSTS.*")


def innermost_loops(code):
    ends = [i for i in code if i.name.startswith("BRA") and i.to and i.to < i.address]
    for end in ends:
        if sum(end.to <= other.address <= end.address for other in ends) == 1:
            yield [i for i in code if end.to <= i.address <= end.address]


def tile_loops(code):
    """The loops over full tiles in float32: innermost ones that move its vectors, nothing else, and
    have two in hand."""
    for body in innermost_loops(code):
        loads = [i.name for i in body if i.name.startswith("LDG")]
        if len(loads) > 1 and all(".128" in name for name in loads):
            yield body


def by_pass(bodies):
    """Loops by what they do: it shows in whether they add sums (in double), and in their stores."""

    def in_order(sums, stores):
        found = [b for b in bodies if bool(matching(b, "DFMA.*")) == sums]
        found = [b for b in found if bool(matching(b, "STG.*")) == stores]
        return sorted(found, key=lambda body: len(matching(body, "STG.*")))

    names = ["measure", "advance", "advance_apply_measured", "apply", "advance_apply"]
    found = [*in_order(True, False), *in_order(True, True), *in_order(False, True)]
    return dict(zip(names[-len(found) :], found, strict=True))  # of codes no loop only measures


def executed(body):
    """Instructions of a warp whose roots and quotients are ordinary: branches pass by the calls."""
    place = {i.address: n for n, i in enumerate(body)}
    calls = [n for n, i in enumerate(body) if i.name.startswith("CALL")]

    def passes_by(at):
        """The innermost branch around a call; one farther out leaves the quotient out."""
        call = next((n for n in calls if at < n < place.get(body[at].to, 0)), None)
        return call and not any(place.get(i.to, 0) > call for i in body[at + 1 : call])

    count = at = 0
    while at < len(body):
        at = place[body[at].to] if passes_by(at) else at + 1
        count += 1
    return count


def called(body, code):
    """The functions that a loop calls; on Ampere it may end in a call of what comes after it."""
    after = code[code.index(body[-1]) + 1].address
    for call in [i for i in body if i.name.startswith("CALL") and i.to != after]:
        rest = itertools.dropwhile(lambda i, to=call.to: i.address < to, code)
        yield from itertools.takewhile(lambda i: not i.name.startswith("RET"), rest)


@each_kernel(kernel="step", family="plain")
def test_loops_over_tiles_are_lean(key, listings):
    """One for each pass; no division of integers, no local memory, no call without a division."""
    code = listings[key]
    bodies = list(tile_loops(code))
    assert len(bodies) == 5
    for body in bodies:
        assert not matching([*body, *called(body, code)], r"I2F.*|F2I.*|LDL.*|STL.*")
        assert matching(body, "MUFU.*") or not matching(body, "CALL.*")


#: instructions that an element costs, over both passes; a quarter above what they were when written
BUDGETS = {
    "Momentum": {"unmeasured": 16, "gradient_rule": 36, "update_rule": 30},
    "Adam": {"unmeasured": 50, "gradient_rule": 70, "update_rule": 90},
    "Lion": {"unmeasured": 24, "gradient_rule": 44, "update_rule": 50},
}


@pytest.mark.parametrize("direction", BUDGETS)
@pytest.mark.parametrize("order", ORDERS)
def test_instructions_of_an_element(direction, order, listings):
    key = Key("90", "step", direction, "plain")
    if key not in listings:
        pytest.skip(reason="not built for sm_90")
    elements = 2 * 4  # of a thread, in an iteration: two vectors
    loops = by_pass(list(tile_loops(listings[key])))
    count = sum(executed(loops[name]) for name in ORDERS[order]) / elements
    print(f"{key.name}, {order}: {count} instructions an element")
    assert count <= BUDGETS[direction][order]


def code_loops(code):
    """The loops over tiles with codes, in float32: weights come in 16 bytes, four codes in 4."""
    for body in innermost_loops(code):
        sizes = {re.sub(r"\.(E|EF|STRONG|GPU)\b", "", i.name) for i in body if i.name[:3] == "LDG"}
        if sizes == {"LDG", "LDG.128"} and matching(body, "STG.*"):
            yield body


#: of float32 weights beside codes: 50.75 and 109.75 when written; 51.5 and 110.5 by nvcc 12.4
CODE_BUDGETS = {"Momentum": 56, "Adam": 111}


@pytest.mark.parametrize("direction", CODE_BUDGETS)
def test_instructions_of_an_element_with_codes(direction, listings):
    key = Key("90", "step", direction, "coded")
    if key not in listings:
        pytest.skip(reason="not built for sm_90")
    bodies = list(code_loops(listings[key]))
    assert len(bodies) == 4
    for body in bodies:
        assert not matching([*body, *called(body, listings[key])], r"I2F.*|F2I.*|LDL.*|STL.*")
    loops = by_pass(bodies)
    count = sum(executed(loops[name]) for name in ORDERS["update_rule"]) / 4
    print(f"{key.name}: {count} instructions an element")
    assert count <= CODE_BUDGETS[direction]


@each_kernel(kernel="step", family="coded", arch="90")
def test_loads_come_before_questions(key, listings):
    """What lies beside 16-bit weights is asked for when weights, gradient and states are on their
    way: a question about weights waits for them. The longest loop asks more."""
    *bodies, _ = sorted(innermost_loops(listings[key]), key=len)
    bodies = [body for body in bodies if matching(body, "STG.*") and matching(body, "LDG.*")]
    assert bodies
    for body in bodies:
        before = itertools.takewhile(lambda i: not i.name.startswith("BRA"), body)
        assert len(matching(before, "LDG.*")) >= 2


@pytest.mark.skipif(NVCC is None or sass.cuobjdump() is None, reason="needs nvcc and cuobjdump")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("operation", ["root", "quotient"])
def test_root_and_quotient_in_range_are_those_of_the_compiler(operation, arch, tmp_path):
    """Once it has asked whether numbers are in range, it goes on with the same instructions."""
    library = tmp_path / "in_range.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc", "-cubin", f"-arch=sm_{arch}"]
    source = "tests/native/in_range.cu"
    subprocess.run([NVCC, *flags, source, "-o", library], cwd=ROOT, check=True)

    def arithmetic(kernel):
        command = [sass.cuobjdump(), "-sass", "-fun", kernel, library]
        listing = subprocess.check_output(command, text=True)
        listing = re.sub(r"FFMA( R\d+, R\d+, R\d+), RZ", r"FMUL\1", listing)  # x*y + 0
        return re.findall(r" (MUFU\.\w+|FMUL|FFMA)(?=[ .])", listing)

    ours, its = arithmetic(f"our_{operation}"), arithmetic(f"its_{operation}")
    assert len(ours) in (5, 6) and its[: len(ours)] == ours  # what follows is for other numbers


@pytest.mark.skipif(not REPORTS, reason="no logs of a CUDA build under build/")
def test_every_architecture_has_every_kernel(cuda, listings):
    assert {key.arch for key in REPORTS} == set(cuda.architectures)
    assert set(listings) == set(REPORTS)
    per_arch = [{key[1:] for key in REPORTS if key.arch == arch} for arch in cuda.architectures]
    assert all(kernels == per_arch[0] for kernels in per_arch)


@pytest.mark.skipif(not REPORTS, reason="no logs of a CUDA build under build/")
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_blocks_of_a_multiprocessor(tmp_path):
    """Two, so that one reads while the other waits or ends; where registers do not suffice, one."""
    program = tmp_path / "occupancy"
    command = [NVCC, "-std=c++17", "-Icsrc", "tests/native/occupancy.cpp", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    kernels = {key: report for key, report in REPORTS.items() if key.kernel == "step"}
    rows = [f"{k.arch} {k.name} {r['registers']} {r['shared']}\n" for k, r in kernels.items()]
    done = subprocess.run([program], input="".join(rows), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    names = set()
    for line in done.stdout.splitlines():
        _, name, blocks = line.split()
        _, direction, family = name.split("-")
        alone = family == "any" or (family == "coded" and direction in THREE_STATES)
        assert int(blocks) >= (1 if alone else 2), line
        names.add(name)
    if {key.arch for key in kernels} & {"80", "90", "100"}:
        assert names == {key.name for key in kernels}
