"""Group key ``precision``: what 16-bit weights keep beyond their bits."""

from __future__ import annotations

import math

import cases
import layouts
import pytest
import torch
from cases import copies, same_bits, same_state, set_grads, state_of, train
from half_weights import (
    BF16,
    DIRECTIONS,
    F16,
    F32,
    KEYS,
    ULP,
    each_precision,
    halves,
    held,
    photograph,
)
from selection import EVERY, NONE
from torch.nn import Parameter

import layerlr
from layerlr.rules import Lamb, Layca, Rated, Singh

#: the 16-bit formats of the weights meet both orders, with and without a state
FEW = ("sgd-none", "momentum-singh", "momentum-layca", "adamw-lamb")
few = pytest.mark.asked(triton=FEW, simt=FEW)
each_half = pytest.mark.parametrize("half", [BF16, F16], ids=["bfloat16", "float16"])
RULES = {"none": None, "singh": Singh(), "layca": Layca(), "lamb": Lamb()}
each_case = pytest.mark.parametrize(
    "case",
    [
        cases.Case(f"{d}-{r}", *[DIRECTIONS[d][0], RULES[r], DIRECTIONS[d][1]])
        for d in DIRECTIONS
        for r in RULES
    ],
    ids=lambda c: c.id,
)


def run(engine, gradients, weight=1.0, half=BF16, n=1, **kwargs):
    """(p, its state) after each step of SGD with given gradients."""
    (p,) = engine.params([torch.full((n,), weight)], half)
    opt = layerlr.SGD([p], backend=engine.backend, **{"lr": 1.0, **kwargs})
    for g in gradients:
        p.grad = torch.full_like(p, g)
        opt.step()
        yield p.detach().clone(), state_of(opt, p)


# -- by hand ---------------------------------------------------------------------------------------


def test_vectors_without(engine):
    assert [p.item() for p, _ in run(engine, [-(2**-10)] * 6)] == [1.0] * 6


def test_vectors_of_the_master(engine):
    found = list(run(engine, [-(2**-10)] * 6, precision="master"))
    assert [s["master"].item() for _, s in found] == [1 + k * 2**-10 for k in range(1, 7)]
    assert [p.item() for p, _ in found] == [1.0] * 4 + [1 + ULP] * 2  # the fourth is a tie
    assert {s["master"].dtype for _, s in found} == {F32}


def test_vectors_of_kahan(engine):
    found = list(run(engine, [-(2**-10)] * 6, precision="kahan"))
    rest = [k * 2**-10 for k in (1, 2, 3, 4, -3, -2)]
    assert [s["compensation"].item() for _, s in found] == rest
    assert [p.item() for p, _ in found] == [1.0] * 4 + [1 + ULP] * 2
    assert {s["compensation"].dtype for _, s in found} == {BF16}


def test_what_overflows_leaves_no_nan(engine):
    (_, state), (p, after) = run(engine, [-1e38, 1e38], 3.38e38, precision="kahan")
    assert state["compensation"].item() == after["compensation"].item() == 0
    assert p.item() == math.inf


def splitmix64(seed: int, n: int) -> int:
    x = (seed + n * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def fmix32(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def rounded(x, seed, t):
    """bfloat16 of a flat float32 tensor, one Python number at a time."""
    key = splitmix64(seed % 2**64, t) >> 32
    bits = [b + (fmix32(key ^ i) >> 16) for i, b in enumerate(x.view(torch.int32).tolist())]
    return torch.tensor([b >> 16 for b in bits]).to(torch.int16).view(BF16)


def test_the_hashes_are_the_published_ones():
    # Vigna's splitmix64.c from seed 1234567; MurmurHash3 of the empty key under seed 1
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, n) for n in (1, 2, 3)] == first
    assert fmix32(1) == 0x514E28B7


def test_vectors_of_stochastic(engine):
    values = cases.random([(300,), (7, 100)], F32, seed=3)
    params = engine.params(values, BF16)
    group = {"params": params, "seed": -7}
    opt = layerlr.SGD([group], 2**-9, backend=engine.backend, precision="stochastic")
    seeds = [opt.state[p]["rounding_seed"].item() for p in params]
    assert [s % 2**64 for s in seeds] == [splitmix64(2**64 - 7, n) for n in range(2)]
    for t in (1, 2):
        before = copies(params)
        set_grads(params, t)
        opt.step()
        for p, old, seed in zip(params, before, seeds):
            x = old.float() - p.grad.float() * 2**-9
            assert same_bits([p.flatten()], [rounded(x.flatten().cpu(), seed, t).to(p.device)])


# -- the arithmetic --------------------------------------------------------------------------------


@few
@each_case
@each_half
def test_a_master_is_a_run_in_float32(engine, case, half):
    params = halves(engine, half)
    wide = [Parameter(p.detach().float()) for p in params]
    opt, other = (engine.make(case, ps) for ps in (params, wide))
    opt = engine.make(case, params, precision="master")
    for step in range(4):
        set_grads(params, step)
        for p, q in zip(params, wide):
            q.grad = p.grad.float()
        opt.step()
        other.step()
    masters = held(opt, params, "master")
    assert same_bits(masters, wide)
    assert same_bits(params, [m.to(half) for m in masters])
    for p, q in zip(params, wide):
        state = state_of(opt, p)
        del state["master"]
        assert same_state(state, state_of(other, q))
    mine, theirs = opt.layer_stats(), other.layer_stats()
    # compiled, Triton lays sums out by dtype: they have other last bits
    same = torch.allclose if engine == ("triton", "cuda") else torch.equal
    assert all(same(mine[k], theirs[k]) for k in mine if k != "names")


@few
@each_case
@each_half
def test_kahan_stays_close_to_float32(engine, case, half):
    """A step loses half a unit in the last place of c, which is half a unit of p at most: 2^-10 of
    that unit in bfloat16, 2^-13 in float16, where c has 2^-24 at the finest. Norms and decay carry
    that over to other elements, by less than it is of the largest."""
    params = halves(engine, half)
    wide = [Parameter(p.detach().float()) for p in params]
    opt, other = engine.make(case, params, precision="kahan"), engine.make(case, wide)
    for step in range(10):
        set_grads(params, step)
        for p, q in zip(params, wide):
            q.grad = p.grad.float()
        opt.step()
        other.step()
    bits = 8 if half == BF16 else 11
    for p, q, c in zip(params, wide, held(opt, params, "compensation")):
        size = q.detach().abs().double()
        if case.id != "sgd-none" and p.numel():
            size = size.max()
        unit = 2.0 ** (1 - bits) * 2 ** size.log2().ceil().clamp(-14)
        error = (p.double() + c.double() - q.double()).abs()
        assert (error <= 2e-2 * unit + 10 * 2.0**-24 * (half == F16)).all()


@pytest.mark.asked(triton=EVERY)
@each_precision
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rule", [None, Rated()], ids=["none", "rated"])
@each_half
def test_all_engines_give_the_same_bits(other, direction, rule, precision, half):
    if (precision, half) == ("stochastic", F16):
        pytest.skip(reason="refused")
    case = cases.Case(direction, DIRECTIONS[direction][0], rule, DIRECTIONS[direction][1])
    reference = cases.Engine("reference", "cpu")
    sides = []
    for engine in (other, reference):
        torch.manual_seed(5)
        params = halves(engine, half)
        opt = engine.make(case, params, precision=precision)
        train(opt, params, 4)
        sides.append([*params, *held(opt, params, KEYS[precision])])
    assert same_bits(*sides)


@few
@each_precision
@each_case
def test_rules_see_the_same_in_all_engines(other, case, precision):
    stats = []
    for engine in (other, cases.Engine("reference", "cpu")):
        params = halves(engine)
        opt = engine.make(case, params, precision=precision, on_nonfinite="skip")
        train(opt, params, 1)
        stats.append(opt.layer_stats())
    for key in ("ww", "gg", "uu", "wu", "scale", "lr"):
        torch.testing.assert_close(stats[0][key].cpu(), stats[1][key], rtol=1e-12, atol=1e-15)


@pytest.mark.quick(triton=NONE)
def test_what_is_too_small_to_round_up_moves(engine):
    """64 steps of 2^-12 from 1 on: 2 units in the last place together."""
    moved = {
        precision: list(run(engine, [-(2**-12)] * 64, n=256, precision=precision))[-1][0]
        for precision in (None, *KEYS)
    }
    assert (moved[None] == 1).all()
    assert (moved["master"] == 1 + 2 * ULP).all()
    assert (moved["kahan"] == 1 + 2 * ULP).all()
    mean = moved["stochastic"].double().mean().item()
    error = ULP * math.sqrt(64 / 32 * 31 / 32 / 256)  # of 64 draws with chance 1/32
    assert abs(mean - 1 - 2 * ULP) < 5 * error


@pytest.mark.parametrize("share", [1 / 512, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_unbiased(engine, share, sign):
    n = 20_000
    ((p, _),) = run(engine, [-sign * share * ULP], sign, n=n, precision="stochastic")
    p = sign * p.double().cpu()
    assert set(p.tolist()) == {1.0, 1.0 + ULP}
    error = math.sqrt(share * (1 - share) / n)
    assert abs(((p - 1) / ULP).mean().item() - share) < 5 * error


# -- layouts ---------------------------------------------------------------------------------------

LAYOUTS = {
    "channels_last": ((4, 3, 5, 2), layouts.channels_last),
    "transposed": ((13, 6), layouts.transposed),
    "strided": ((11, 6), layouts.strided),
    "columns": ((9, 7), layouts.columns),
    "shifted": ((40, 31), layouts.shifted),
}


@each_precision
@pytest.mark.parametrize("split", [None, 1, "rows"])
def test_layouts(engine, precision, split):
    values = cases.random([shape for shape, _ in LAYOUTS.values()], BF16, seed=9)
    params = [Parameter(f(v.to(engine.device))) for v, (_, f) in zip(values, LAYOUTS.values())]
    same = [
        Parameter(p.detach().cpu().clone(memory_format=torch.contiguous_format)) for p in params
    ]
    laid = [Parameter(f(v)) for v, (_, f) in zip(values, LAYOUTS.values())]
    sides = []
    for backend, ps in ((engine.backend, params), ("reference", same), ("reference", laid)):
        torch.manual_seed(0)
        groups = [{"params": [p], "split": len(p) if split == "rows" else split} for p in ps]
        opt = layerlr.SGD(
            groups, 2**-8, momentum=0.9, rule=Rated(), backend=backend, precision=precision
        )
        train(opt, ps, 3)
        sides.append([*ps, *held(opt, ps, KEYS[precision])])
    assert same_bits(sides[0], sides[2])
    if precision != "stochastic":  # whose bits go by the place in memory
        assert same_bits(sides[0], sides[1])


# -- errors, compiled steps ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", cases.CLASSES)
def test_stochastic_is_for_bfloat16(cls):
    p = Parameter(torch.ones(3, dtype=F16))
    with pytest.raises(ValueError, match=r"precision='stochastic'.*'fc.weight'.*'master'.*'kahan'"):
        cls([("fc.weight", p)], precision="stochastic")
    opt = cls([("fc.weight", p)], precision="master")
    before = photograph(opt, [p])
    p.grad = torch.ones_like(p)
    opt.param_groups[0]["precision"] = "stochastic"
    with pytest.raises(ValueError, match=r"'fc\.weight'"):
        opt.step()
    assert same_bits(photograph(opt, [p]), before)


def test_refusals():
    p = Parameter(torch.ones(3, dtype=BF16))
    with pytest.raises(ValueError, match="Invalid precision: 'float32', wanted None, 'master'"):
        layerlr.SGD([p], precision="float32")
    with pytest.raises(ValueError, match=r"Invalid seed: 0\.5"):
        layerlr.SGD([{"params": [p], "seed": 0.5}], precision="stochastic")
    with pytest.raises(ValueError, match="differentiable=True"):
        layerlr.SGD([p], precision="master", differentiable=True)
    opt = layerlr.SGD([p], precision="master")
    saved = opt.state_dict()
    saved["state"][0]["master"] = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"'master'.*group0.param0.*shape"):
        opt.load_state_dict(saved)


@each_precision
def test_compiled_steps_equal_eager_ones(precision):
    torch._dynamo.reset()
    engine = cases.Engine("auto", "cpu")
    sides = []
    for compiled in (False, True):
        torch.manual_seed(0)
        params = halves(engine)
        opt = layerlr.SGD(params, 1e-3, momentum=0.9, rule="singh", precision=precision)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for k in range(3):
            set_grads(params, k)
            step()
        sides.append([*params, *held(opt, params, KEYS[precision])])
    assert same_bits(*sides)


def test_steps_in_backward():
    sides = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)).to(BF16)
        opt = layerlr.SGD(model.parameters(), 1e-3, rule="singh", precision="stochastic")
        if inside:
            handle = layerlr.step_in_backward(model, opt)  # noqa: F841
        for _ in range(3):
            model(
                torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(BF16)
            ).sum().backward()
            opt.step()
            opt.zero_grad()
        sides.append(list(model.parameters()))
    assert same_bits(*sides)


def test_places_beside_codes_are_those_of_a_copy(other):
    """Codes have one order, so weights that lie in another one are stepped in a copy."""
    values = torch.randn(16, 32, 3, 3).bfloat16()
    results = []
    for backend in ("reference", other.backend):
        p = Parameter(values.to(other.device).to(memory_format=torch.channels_last))
        how = dict(state_dtype="8bit", precision="stochastic", backend=backend)
        opt = layerlr.AdamW([{"params": [p], "seed": 5}], lr=1e-3, **how)
        train(opt, [p], 3)
        results.append(p.detach())
    assert same_bits(results[:1], results[1:])
