"""The CUDA engine through Python, run on the CPU: schedules, traffic, what steps may change."""

from __future__ import annotations

import ctypes
import random

import cases
import layouts
import pytest
import simt_engine
import torch
from cases import BY_ID, RULE_ROWS, bits, copies, ids, same_bits, same_state, set_grads, state_of
from contract_helpers import photograph
from contract_helpers import same as same_photograph
from torch.nn import Parameter

from bench import roofline
from layerlr import _C
from layerlr.backends import BACKENDS
from layerlr.backends.cuda import Tuning, tuning

missing = simt_engine.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason=missing or "")

TUNINGS = [
    *(Tuning(blocks=n) for n in (1, 2, 7, 16)),
    *(Tuning(blocks=3, distance=n) for n in (1, 2, 10, 10**6)),
]
#: elements of an item here: 64 workers, 16 of each
ITEM = 1024


class Traffic(ctypes.Structure):
    """simt::Traffic"""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("loaded", "stored", "reads", "writes", "vectors", "fresh")
    ]


def of_emulation(kind, mangled):
    """A global variable of the emulation."""
    return kind.in_dll(BACKENDS["simt"].emulation(), mangled)


@pytest.fixture
def traffic():
    return of_emulation(Traffic, "_ZN4simt7trafficE")


@pytest.fixture
def seed():
    """Order in which blocks and threads run."""
    seed = of_emulation(ctypes.c_uint, "_ZN4simt4seedE")
    yield seed
    seed.value = 0


def train(case, values, steps=2, how=None, backend="simt", layout=layouts.plain, **kwargs):
    """Parameters, their states, the statistics of layers."""
    params = [Parameter(layout(v)) for v in values]
    with tuning(**(how or Tuning())._asdict()):
        opt = case.make([(str(i), p) for i, p in enumerate(params)], backend=backend, **kwargs)
        cases.train(opt, params, steps)
    stats = [v for v in opt.layer_stats().values() if isinstance(v, torch.Tensor)]
    return copies(params), [state_of(opt, p) for p in params], stats


def same(a, b):
    return same_bits(a[0], b[0]) and all(map(same_state, a[1], b[1])) and same_bits(a[2], b[2])


# -- schedules change nothing ---------------------------------------------------------------------

#: layers of a hundred items, of one, of less, of nothing
SHAPES = ((250, 400), (33, 700), (5,), (), (0, 3), (511,), (2, 513), (40, 100))
MIXED = (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64)
BARE = [case for case in BY_ID.values() if case.rule is None]
RULED = [case for case in BY_ID.values() if case.rule is not None]
FEW = [BY_ID[f"{d}-{rule}"] for d in ("nag", "ams") for rule in cases.RULE_ROWS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
def test_schedules_change_no_bit(case, dtype):
    values = [v.to(dtype or MIXED[i % 5]) for i, v in enumerate(cases.random(SHAPES))]
    layout = layouts.shifted if dtype else layouts.plain
    one, *others = [train(case, values, how=how, layout=layout) for how in TUNINGS]
    for how, other in zip(TUNINGS[1:], others):
        assert same(one, other), how


@pytest.mark.parametrize("case", ["nag-lars", "ams-layca"])
def test_runs_repeat_to_the_bit(case, seed):
    values = cases.random(SHAPES, torch.float32)
    runs = []
    for seed.value in range(20):
        runs.append(train(BY_ID[case], values))
        assert same(runs[0], runs[-1])


@pytest.mark.parametrize("seed", range(40))
def test_random_models_equal_the_cpu_engine(seed):
    """Without a rule to the bit; with one nearly, as sums are added in another order."""
    draw = random.Random(seed)
    n = draw.randint(1, 12)
    shapes = [(draw.choice((1, 3, 8)), draw.choice((0, 1, 7, 64, 512, 3333))) for _ in range(n)]
    dtypes = draw.choice((MIXED, MIXED[:1], MIXED[1:2]))
    values = [v.to(draw.choice(dtypes)) for v in cases.random(shapes, seed=seed)]
    joined = [draw.randrange(n) for _ in range(n)]
    how = Tuning(draw.choice((0, 1, 3, 16)), draw.choice((0, 1, 5, 10**6)))
    kwargs = {
        "how": how,
        "layout": draw.choice((layouts.plain, layouts.shifted)),
        "layers": lambda name, p: joined[int(name)],
        "adapt": draw.choice(("all", lambda name, p: joined[int(name)] % 2)),
        "on_nonfinite": draw.choice(("propagate", "skip")),
    }
    for case in draw.choice(BARE), draw.choice(RULED):
        ours, twin = (train(case, values, 3, backend=b, **kwargs) for b in ("simt", "cpu"))
        if case.rule is None:
            assert same_bits(ours[0], twin[0]) and all(map(same_state, ours[1], twin[1]))
        for x, y in zip(ours, twin):
            torch.testing.assert_close(x, y)


# -- bytes ----------------------------------------------------------------------------------------

DIRECTIONS = {"sgd": BY_ID["damp-none"], "adam": BY_ID["adam-none"]}


def moved(traffic, case, n, dtype, absent=0, **options):
    """Bytes of tensors that a step reads and writes, and bytes that it reads else."""
    params = [Parameter(v) for v in cases.random([(4, n // 4), (4, absent)], dtype)]
    opt = case.make(params, backend="simt", **options)
    cases.train(opt, params, 1)
    set_grads(params, 1)
    params[1].grad = None
    ctypes.memset(ctypes.byref(traffic), 0, ctypes.sizeof(traffic))
    opt.step()
    return traffic.vectors, traffic.loaded + traffic.stored - traffic.vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("items", [1, 7, 40])
def test_bytes_of_a_step(traffic, items, dtype):
    """Two passes of the table of bench/roofline.py, to the byte, and not a byte of what has no
    gradient. Beside tensors: what a warp reads of each item."""
    n = items * ITEM
    for family, rule, _, twice in roofline.compulsory(dtype):
        case = DIRECTIONS[family]._replace(rule=RULE_ROWS[rule or "none"])
        found, rest = moved(traffic, case, n, dtype, absent=10_000)
        assert found == twice * n, (family, rule)
        assert rest < 1200 * (2 * items + 80), (family, rule)


@pytest.mark.parametrize(
    ("case", "twice"),
    [
        ("nag-layca", 32),  # the gradient again
        ("nag-singh", 28),  # the weights, which decay the gradient that is measured
        ("adam-l2-singh", 36),
        ("ams-layca", 52),
        ("rms-cm-lamb", 52),
        ("sgd-lars", 20),
    ],
)
def test_bytes_of_others(traffic, case, twice):
    n = 8 * ITEM
    found, _ = moved(traffic, BY_ID[case], n, torch.float32)
    assert found == twice * n


@pytest.mark.parametrize(
    ("case", "kind", "twice"),
    [
        ("adam-none", "8bit", 10),
        ("adam-layca", "8bit", 14),
        ("adam-singh", "8bit", 12),
        ("adam-none", "bfloat16", 14),
        ("adam-layca", "bfloat16", 20),
    ],
)
def test_bytes_of_state_in_fewer_bits(traffic, case, kind, twice):
    """Beside weights of 16 bits; scales, a sixteenth of a byte for each code, come apart."""
    n = 8 * ITEM
    found, _ = moved(traffic, BY_ID[case], n, torch.bfloat16, state_dtype=kind)
    assert found == twice * n


# -- what may change between steps ----------------------------------------------------------------


def changing(change, case, backend):
    """Parameters after steps before each of which `change` is called."""
    params = [Parameter(v) for v in cases.random(((3, 700), (5,)), torch.float32)]
    opt = case.make(params, backend=backend)
    for step in range(4):
        set_grads(params, step)
        change(step, opt, params)
        opt.step()
    return copies(params)


def schedule_rate(step, opt, params):
    if step == 0:
        opt.param_groups[0]["lr"] = torch.tensor(0.1)
    opt.param_groups[0]["lr"].fill_(0.1 / (step + 1))


def schedule_others(step, opt, params):
    group = opt.param_groups[0]
    group["weight_decay"] = 0.01 * step
    group["maximize"] = step == 2
    key = "momentum" if "momentum" in group else "betas"
    group[key] = 0.9 - 0.1 * step if key == "momentum" else (0.9 - 0.1 * step, 0.99)


def move_gradients(step, opt, params):
    opt.kept = [*getattr(opt, "kept", []), *(p.grad for p in params)]  # or memory is used again
    for p in params:
        p.grad = layouts.shifted(p.grad, by=step)


def move_parameters(step, opt, params):
    opt.kept = [*getattr(opt, "kept", []), *(p.data for p in params)]
    for p in params:
        p.data = layouts.shifted(p.data, by=step)


def leave_some_out(step, opt, params):
    params[step % 2].grad = None


CHANGES = [schedule_rate, schedule_others, move_gradients, move_parameters, leave_some_out]


@pytest.mark.parametrize("case", ["nag-none", "adamw-none", "nag-lars", "adamw-layca"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps(change, case):
    case = BY_ID[case]
    ours, cpu = (changing(change, case, backend) for backend in ("simt", "cpu"))
    if case.rule is None:
        assert same_bits(ours, cpu)
    torch.testing.assert_close(ours, cpu)
    still = changing(lambda *_: None, case, "simt")
    assert same_bits(ours, still) == (change in (move_gradients, move_parameters))


@pytest.mark.parametrize("case", ["nag-singh", "adamw-layca"])
def test_found_inf_that_the_host_does_not_know(case):
    """A step and its halves leave everything as it is."""
    params = [Parameter(v) for v in cases.random(((3, 700), (5,)), torch.float32)]
    opt = BY_ID[case].make(params, backend="simt")
    cases.train(opt, params, 1)
    (plans,) = opt.plans.prepared()
    on_device = {_C.CONFIG["found_inf"]: torch.ones((), dtype=torch.float64)}
    numbers = opt.plans.config(plans).values, on_device
    native = plans.plans[0]._native
    before = photograph(opt), bits(plans.tables[0].stats)
    native.step(*numbers)
    native.prepare()
    native.apply(*numbers, native.measure(*numbers))
    assert same_photograph((photograph(opt), bits(plans.tables[0].stats)), before)


# -- memory ---------------------------------------------------------------------------------------


def memory(shapes):
    params = [Parameter(v) for v in cases.random(shapes, torch.float32)]
    opt = BY_ID["adamw-lamb"].make(params, backend="simt")
    cases.train(opt, params, 1)
    return sum(plan.memory for plans in opt.plans for plan in plans.plans)


def test_memory_of_a_plan():
    """A part for the layers, and 0.02 bytes an element in items of 4,096 (here they have 1,024)."""
    few, many = memory([(512,)] * 4), memory([(512,)] * 204)
    assert (many - few) / 200 < 1000
    n = 200 * 512
    assert memory([(n,)]) - memory([(512,)]) < 0.02 * n * 4096 / 1024
