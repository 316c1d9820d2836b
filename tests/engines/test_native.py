"""The C++ engine under sanitizers, and its registries against Python's."""

import itertools
import platform
import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import proofs
import pytest
import torch

import layerlr
from layerlr import _C
from layerlr.backends import COLUMNS
from layerlr.directions import DIRECTIONS
from layerlr.rules import RULES

ROOT = Path(__file__).resolve().parents[2]
X86 = platform.machine() in ("x86_64", "AMD64")
#: one state tensor and the gradient in the second pass, three and not; all is too slow to compile
DIRECTIONS_TRIED = "X(Nesterov) X(AmsGrad)"
FLAGS = [
    *"-std=c++17 -O1 -g1 -Icsrc -ffp-contract=off -fno-math-errno -Wno-psabi".split(),
    *"-Wno-maybe-uninitialized -Wno-uninitialized".split(),
    f"-DLAYERLR_DIRECTIONS(X)={DIRECTIONS_TRIED}",
    *(["-DLAYERLR_X86=1"] if X86 else []),
]
ISA_FLAGS = {
    "kernels_avx2": "-mavx2 -mfma -mf16c".split(),
    "kernels_avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c".split(),
}


def test_registries_agree():
    assert list(_C.directions()) == list(DIRECTIONS)
    for name, nonnegative in _C.directions().items():
        direction = DIRECTIONS[name]
        assert nonnegative == [key in direction.nonnegative for key in direction.states], name
    assert list(_C.rules()) == list(RULES)
    for name, flags in _C.rules().items():
        rule = RULES[name]
        update = rule.order == "update"
        assert flags == {
            "update": update,
            "measures_ww": update or rule.measures_ww,  # an update rule takes every sum
            "raw_gradient": rule.raw_gradient,
            "latches": rule.latches,
            "decays_apart": rule.decays_apart,
            "averages": rule.averages,
            "plain_at_zero": rule.plain_at_zero,
        }, name
    assert _C.columns() == len(COLUMNS)


def test_places_of_the_numbers():
    """As declared, without gaps: what is written by name is read by name."""
    sizes = [1, 1, 1, 1, 1, 1, 1, 1, 5, 4]
    names = (
        "lr l2 decoupled_decay grad_factor skip found_inf plain taken direction rule size".split()
    )
    assert dict(_C.CONFIG) == dict(zip(names, itertools.accumulate([0, *sizes])))


def instruction_sets():
    here = []
    best = _C.instruction_set()
    for name in ("default", "avx2", "avx512"):
        try:
            _C.use_instruction_set(name)
        except ValueError:
            continue
        here.append(name)
    _C.use_instruction_set(best)
    return here


#: dtypes, and how weights are held
HELD = [(d, None) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
HELD += [(d, p) for d in (torch.bfloat16, torch.float16) for p in ("master", "kahan")]
HELD += [(torch.bfloat16, "stochastic")]


#: between them they call all that packs can do
CALLS = {"root": (layerlr.Adam, {"amsgrad": True}), "sign": (layerlr.Lion, {"weight_decay": 0.1})}


@pytest.mark.parametrize(("dtype", "precision"), HELD)
@pytest.mark.parametrize("rule", [None, "singh", "layca"])
@pytest.mark.parametrize("calls", CALLS)
def test_instruction_sets_agree_to_the_bit(calls, rule, dtype, precision):
    """Also a check of bfloat16 and float16 rounding, which each set does in its own way."""
    results = []
    cls, options = CALLS[calls]
    best = _C.instruction_set()
    try:
        for name in instruction_sets():
            _C.use_instruction_set(name)
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (5, 16, 40_001)]
            how = {"rule": rule, "adapt": "all", "precision": precision}
            opt = cls(params, lr=0.1, **options, **how)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn_like(p)
                    p.grad[::7] = 0.0
                opt.step()
            everything = [*params, *(v for p in params for v in opt.state[p].values())]
            results.append(torch.cat([x.detach().flatten().double() for x in everything]))
    finally:
        _C.use_instruction_set(best)
    assert len(results) >= 1
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("make", [dict, lambda: defaultdict(dict)], ids=["dict", "defaultdict"])
def test_a_snapshot_knows_a_dict_by_what_it_holds(make):
    """Whatever changes is seen, before and after a match, and so is what is put back."""
    held, other, third = object(), object(), object()
    state = make()
    state |= {"step": held, "memory": other}
    before = _C.Snapshot(state)
    changes = {
        "value": lambda: state.update(memory=third),
        "values": lambda: state.update(step=other, memory=held),
        "more": lambda: state.update(more=third),
        "less": lambda: state.pop("memory"),
        "key": lambda: state.update(other=state.pop("memory")),
        "order": lambda: state.update(step=state.pop("step")),
        "nothing": state.clear,
    }
    for name, change in changes.items():
        assert before.matches(state) and before.matches(state), name
        change()
        assert not before.matches(state) and not before.matches(state), name
        assert before.matches({"step": held, "memory": other}), name
        assert not before.matches(state), name
        state.clear()
        state.update({"step": held, "memory": other})


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="no instruction set 'sse9' here"):
        _C.use_instruction_set("sse9")


def test_root_and_quotient_by_a_guess(tmp_path):
    """What a GPU takes for the scales of codes; two seconds where there is no fused add."""
    program = tmp_path / "in_range"
    command = ["c++", "-std=c++17", "-O2", "-Icsrc", "-ffp-contract=off", "-fno-math-errno"]
    subprocess.run([*command, "tests/native/in_range.cpp", "-o", program], cwd=ROOT, check=True)
    assert subprocess.check_output([program], text=True) == "0\n"


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer, tmp_path, proof):
    """Every rule, dtype and instruction set over awkward sizes, on one thread and on three."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip(reason="needs a C++ compiler")
    sources = [ROOT / "csrc/plan.cpp", *ROOT.glob("csrc/cpu/*.cpp")]
    sources = [s for s in sources if X86 or s.stem not in ISA_FLAGS]
    sources.append(ROOT / "tests/native/engine_driver.cpp")
    if proof(sanitizer, instruction_sets(), ISA_FLAGS, proofs.compiled(FLAGS, *sources)):
        return
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]

    def build(source):
        target = tmp_path / f"{source.stem}.o"
        flags = [*FLAGS, *ISA_FLAGS.get(source.stem, [])]
        command = [compiler, *flags, *sanitize, "-c", str(source), "-o", str(target)]
        subprocess.run(command, cwd=ROOT, check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = str(tmp_path / "driver")
    subprocess.run([compiler, *sanitize, *objects, "-o", program, "-lpthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 0
