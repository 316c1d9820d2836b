"""Every backend against the float64 spec and against the reference, bit by bit where it can be."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import (
    CASES,
    SHORT,
    Engine,
    copies,
    ids,
    random,
    same_bits,
    same_state,
    set_grads,
    state_of,
)
from layouts import channels_last, columns, plain, shifted, strided, transposed
from selection import DTYPE_ROWS, EDGES, EVERY
from spec import Spec, array
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import layerlr
from layerlr.directions import DIRECTIONS
from layerlr.rules import RULES

REFERENCE = Engine("reference", "cpu")
short = pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))


def test_the_table_is_complete():
    found = {name for name, *_ in cases.DIRECTION_ROWS.values()}
    for id, (name, *_) in cases.DIRECTION_ROWS.items():
        opt = cases.BY_ID[f"{id}-none"].make([Parameter(torch.ones(1))])
        assert opt.direction(opt.param_groups[0]).name == name
    assert found == set(DIRECTIONS)
    assert {c.rule.name for c in CASES if c.rule is not None} == set(RULES)
    assert len({c.id for c in CASES}) == len(CASES)
    assert {*EDGES, *DTYPE_ROWS} <= {c.id for c in CASES}
    # a direction beside which every rule and every option of one stands
    for row in {**cases.RULE_ROWS, **cases.VARIANT_ROWS}:
        assert any(c.id.endswith(f"-{row}") for c in CASES), row


def follow(case, opt, params, steps=2, **spec):
    """Hold each step against the spec, started from the optimizer's own weights and state."""
    expected = Spec(case.kind, opt.param_groups[0], params, **spec)
    for seed in range(steps):
        expected.follow(opt, params)
        set_grads(params, seed)
        expected.step([p.grad for p in params])
        opt.step()
        expected.check(params, opt)
    for layer, radius in zip(expected.layers, expected.radius):
        if radius:
            # the norm at the first step, in float64 on both sides
            assert opt.state[params[layer[0]]]["radius"].item() == pytest.approx(radius, rel=1e-14)


@pytest.mark.asked(triton=DTYPE_ROWS)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_spec(engine, dtype, case):
    params = engine.params(random(cases.SHAPES, seed=3), dtype)
    follow(case, engine.make(case, params), params)


# -- against the reference -------------------------------------------------------------------------


def within(bound, a, b, size):
    """Whether a and b are equal but for ``bound`` units in the last place of ``size``."""
    if not bound:
        return same_bits([a], [b])
    finfo = torch.finfo(a.dtype)
    size = size.double().abs().clamp(min=finfo.smallest_normal)
    unit = torch.ldexp(torch.full_like(size, finfo.eps), torch.frexp(size).exponent - 1)
    return bool(((a.double() - b.double()).abs() <= bound * unit).all())


def bounds(case, dtype):
    """ulp by which weights and state may differ from the reference; 0: not by a bit.

    Without a rule every bit is equal. With one, sums may differ in their last float64 bits, so
    weights may by 2 ulp (of the larger of the weight before and after: a step may cancel most of
    it), and so may buffers that are linear in a scaled gradient; no other state may. float64 is
    its own last bits: two sums, a quotient, a and b, each off by an ulp or two on terms that partly
    cancel, 16 (7 measured).
    """
    if case.rule is None:
        return 0, 0
    scaled = case.rule.order == "gradient" and case.kind in ("SGD", "AMomSGD")
    most = 16 if dtype == torch.float64 else 2
    return most, most if scaled else 0


def beside(case, one, two, values, steps=2, dtype=None):
    """Step two engines together; after each step the second takes over the first's values."""
    a, b = one.params(values, dtype), two.params(values, dtype)
    opt, other = one.make(case, a), two.make(case, b)
    for seed in range(steps):
        before = copies(a)
        set_grads(a, seed)
        set_grads(b, seed)
        opt.step()
        other.step()
        for p, q, w in zip(a, b, before):
            p, q, left, right = p.detach(), q.detach(), opt.state[p], other.state[q]
            of_weights, of_state = bounds(case, p.dtype)
            assert within(of_weights, p, q.cpu(), torch.maximum(w.abs(), p.abs()))
            assert left.keys() == right.keys()
            for key in left:
                if key in ("radius", "second_moment"):  # of a sum: equal to a few eps of float64
                    torch.testing.assert_close(left[key], right[key].cpu(), rtol=1e-14, atol=0)
                elif key == "step":
                    assert left[key] == right[key]
                elif left[key].numel():
                    size = left[key].abs().max()
                    assert within(of_state, left[key], right[key].cpu(), size), key
                right[key].copy_(left[key])
            q.copy_(p)


@pytest.mark.asked(triton=EVERY)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_reference(other, dtype, case):
    beside(case, REFERENCE, other, random(cases.SHAPES, seed=3), dtype=dtype)


#: above one chunk of every engine, a chunk to the element and one more, a tiny one beside them
LARGE = ((100, 700), (32768,), (3, 10923), (2, 3))
BIG = [c for c in SHORT if c.id.partition("-")[0] in ("nag", "adamw")]


@pytest.mark.parametrize("case", BIG, ids=ids(BIG))
def test_large_layers(engine, case):
    values = random(LARGE, seed=6)
    params = engine.params(values, torch.float32)
    follow(case, engine.make(case, params), params)
    if engine != REFERENCE:
        beside(case, REFERENCE, engine, values, steps=1, dtype=torch.bfloat16)


def test_sums_of_a_large_layer_in_float64(engine):
    """Few rounded squares in a row: of float32's numbers, all of whose squares round alike."""
    rounded = {"dtype": torch.float32, "scale": 0.02}
    (w,), (g,) = (random([(32768,)], seed=seed, **rounded) for seed in (1, 2))
    w, g = w.double(), g.double()
    (p,) = engine.params([w], torch.float64)
    p.grad = g.to(p.device)
    opt = layerlr.SGD([p], lr=0.1, rule="layca", backend=engine.backend)
    opt.step()
    found = opt.layer_stats()
    for key, x in (("ww", w), ("gg", g)):
        exact = math.fsum(value * value for value in x.flatten().tolist())
        assert abs(found[key].item() - exact) <= 8 * torch.finfo(torch.float64).eps * exact


# -- the same bits again ---------------------------------------------------------------------------


def run(engine, case, params, steps=2, **kwargs):
    """Bits of weights and state, as values, after some steps."""
    opt = engine.make(case, params, **kwargs)
    for seed in range(steps):
        set_grads(params, seed)
        opt.step()
    return [p.detach().clone() for p in params], [state_of(opt, p) for p in params]


def equal(a, b):
    return same_bits(a[0], b[0]) and all(map(same_state, a[1], b[1]))


MIXED = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
SIZES = ((17, 59), (41, 24), (9, 9), (3, 1))


def mixed(engine, sizes=SIZES, seed=8):
    return [p for v, d in zip(random(sizes, seed=seed), MIXED) for p in engine.params([v], d)]


@short
def test_run_to_run(engine, case):
    assert equal(run(engine, case, mixed(engine)), run(engine, case, mixed(engine)))


@short
def test_place_in_the_list(engine, case):
    values = random([(17, 59)] * 2 + [(3,), (40, 5)], seed=8)
    order = [3, 1, 0, 2]
    there = [engine.params([v], torch.float32)[0] for v in values]
    grads = random([v.shape for v in values], seed=50)

    def once(params, grads):
        opt = engine.make(case, params)
        for _ in range(2):
            for p, g in zip(params, grads):
                p.grad = g.to(p)
            opt.step()
        return [p.detach() for p in params], [state_of(opt, p) for p in params]

    weights, states = once(there, grads)
    back = [engine.params([v], torch.float32)[0] for v in values]
    moved = once([back[i] for i in order], [grads[i] for i in order])
    assert equal(([weights[i] for i in order], [states[i] for i in order]), moved)


@short
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_alignment(engine, case, offset):
    expected = run(engine, case, mixed(engine))
    params = [Parameter(shifted(p.detach(), offset)) for p in mixed(engine)]
    opt = engine.make(case, params)
    for p in params:
        for key, value in opt.state[p].items():
            if value.shape == p.shape:
                opt.state[p][key] = shifted(value, offset)
    for seed in range(2):
        set_grads(params, seed)
        for p in params:
            p.grad = shifted(p.grad, offset)
        opt.step()
    assert equal(([p.detach() for p in params], [state_of(opt, p) for p in params]), expected)


@pytest.mark.parametrize("case", BIG, ids=ids(BIG))
def test_threads(threads, case):
    # 300,000 elements are shared between threads, small layers are dealt out whole
    engine, sizes = Engine("cpu", "cpu"), ((300, 1000), (41, 24), (200, 300), (3, 1))
    results = []
    for n in (1, 3):
        threads(n)
        results.append(run(engine, case, mixed(engine, sizes)))
    assert equal(*results)


# -- layouts ---------------------------------------------------------------------------------------

#: name -> shape, layout of the parameter, of its gradient
LAYOUTS = {
    "contiguous": ((7, 19), plain, plain),
    "transposed": ((7, 19), transposed, transposed),
    "strided": ((5, 37), strided, strided),
    "columns": ((3, 23), columns, plain),
    "channels_last": ((4, 3, 3, 5), channels_last, channels_last),
    "channels_last, plain gradient": ((4, 3, 3, 5), channels_last, plain),
    "transposed gradient": ((11, 6), plain, transposed),
    "strided gradient": ((11, 6), transposed, strided),
    "one number as gradient": ((6, 5), plain, None),
    "offset": ((13, 3), shifted, shifted),
    "no dimension": ((), plain, plain),
    "empty": ((0, 4), plain, plain),
    "vector": ((21,), strided, plain),
}


@short
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layouts(engine, case, dtype):
    rows = LAYOUTS.values()
    values = [v.to(engine.device, dtype) for v in random([shape for shape, *_ in rows], seed=9)]
    params = [Parameter(layout(v)) for v, (_, layout, _) in zip(values, rows)]
    same = engine.params(values)
    opt, usual = engine.make(case, params), engine.make(case, same)
    expected = Spec(case.kind, opt.param_groups[0], params)
    for seed in range(2):
        expected.follow(opt, params)
        grads = random([shape for shape, *_ in rows], seed=seed)
        for p, q, g, (shape, _, layout) in zip(params, same, grads, rows):
            g = g.to(p)
            p.grad = layout(g) if layout else g[0, 0].expand(shape)
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        expected.step([p.grad for p in params])
        opt.step()
        usual.step()
        expected.check(params, opt)
    if case.rule is None:
        assert same_bits(params, same)
    for name, p in zip(LAYOUTS, params):
        room = torch.tensor([], dtype=dtype, device=engine.device).set_(
            p.detach().untyped_storage()
        )
        if LAYOUTS[name][1] in (strided, columns):  # what lies between is not ours
            assert (room == 7).sum() == room.numel() - p.numel(), name
        assert array(p).shape == LAYOUTS[name][0]


#: gradients whose memory does not hold their elements as they are, from others
FORMS = {
    "zero": lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype, device=g.device),
    "negated": torch._neg_view,
    "conjugate": torch.conj,
    "wrapped": lambda g: TwoTensor(g, g.clone()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", [None, "layca"])
def test_gradients_that_memory_does_not_hold(engine, rule, form):
    """Autograd makes the first itself, of ``sgn`` for one: it has no memory at all."""
    if form == "wrapped" and engine.backend == "reference":
        pytest.skip(reason="the reference computes with gradients as their class does")
    dtype = torch.complex64 if form == "conjugate" else torch.float32
    values = random([(300, 40)] * 4, dtype, seed=3)
    params = [*engine.params(values[:1]), *engine.params(values[:1])]
    clip = 1.0 if rule is None else None
    opts = [
        layerlr.Adam([p], rule=rule, backend=engine.backend, max_grad_norm=clip) for p in params
    ]
    for number, g in enumerate(values[1:]):
        g = FORMS[form](g.to(engine.device)) if number == 1 else g.to(engine.device)
        params[0].grad, params[1].grad = g, torch.empty(g.shape).to(params[1]).copy_(g)
        for opt in opts:
            opt.step()
    assert same_bits(params[:1], params[1:])
