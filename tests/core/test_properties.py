"""Random shapes, dtypes, strides, rules and hyper-parameters against the float64 spec."""

from __future__ import annotations

import cases
import layouts
import pytest
import torch
from cases import Case, Engine, random, same_bits
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from selection import NONE
from spec import Spec, Undecided
from torch.nn import Parameter

import layerlr
from layerlr.rules import Lamb, Lars, Layca, Plain, Singh

EPS = st.sampled_from([1e-8, 1e-3])
DECAY = st.sampled_from([0.0, 0.01, 0.3])
MU = st.sampled_from([0.0, 0.5, 0.9, 0.99])
BETAS = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.99, 0.999]))
FLAG = st.booleans()
#: log-uniform; for layca tangents of angles up to 84 degrees
RATE = st.floats(-4, 1).map(lambda x: 10.0**x)

#: class -> its arguments
ARGUMENTS = {
    layerlr.SGD: {"momentum": MU, "dampening": st.sampled_from([0.0, 0.4]), "nesterov": FLAG},
    layerlr.AMomSGD: {"momentum": MU},
    layerlr.Adagrad: {
        "lr_decay": st.sampled_from([0.0, 0.3]),
        "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
        "eps": EPS,
    },
    # a centered average of one gradient alone has no variance at alpha = 0
    layerlr.RMSprop: {
        "alpha": st.sampled_from([0.5, 0.9, 0.99]),
        "momentum": MU,
        "centered": FLAG,
        "eps": EPS,
    },
    layerlr.Adam: {"betas": BETAS, "eps": EPS, "amsgrad": FLAG, "decoupled_weight_decay": FLAG},
    layerlr.AdamW: {"betas": BETAS, "eps": EPS, "amsgrad": FLAG},
    layerlr.Lion: {"betas": BETAS},
}
RULES = st.one_of(
    st.none(),
    st.just(Plain()),
    st.just(Singh()),
    st.builds(
        Lars,
        trust=st.sampled_from([1e-3, 0.1, 5.0]),
        eps=st.sampled_from([0.0, 1e-8]),
        trust_clip=FLAG,
    ),
    st.builds(
        Lamb,
        clip=st.sampled_from([None, 0.5, 10.0]),
        trust_clip=FLAG,
        bias_correction=FLAG,
        grad_averaging=FLAG,
    ),
    st.builds(
        Layca,
        radius=st.sampled_from(["initial", "current"]),
        eps=st.sampled_from([1e-6, 0.1]),
        others=st.sampled_from(["plain", "freeze"]),
    ),
)
SIZE = st.one_of(st.integers(0, 9), st.sampled_from([17, 64, 65]))
SHAPE = st.one_of(
    st.lists(SIZE, max_size=3).map(tuple),
    st.tuples(*[st.integers(1, 6)] * 4),
    st.sampled_from([(40000,), (33, 1000), (32769,)]),
)
PLACED = {
    1: [layouts.plain, layouts.shifted, layouts.strided, layouts.transposed, layouts.columns],
    4: [layouts.channels_last],
}


@st.composite
def cases_(draw):
    cls = draw(st.sampled_from(list(ARGUMENTS)))
    args = {name: draw(values) for name, values in ARGUMENTS[cls].items()}
    args |= {"lr": draw(RATE), "weight_decay": draw(DECAY), "maximize": draw(FLAG)}
    if args.get("nesterov"):
        args |= {"dampening": 0.0, "nesterov": args["momentum"] > 0}
    return Case("drawn", cls, draw(RULES), args)


@st.composite
def tensors(draw):
    """A shape, the layouts of the parameter and its gradient, their sizes (0: all zero)."""
    shape = draw(SHAPE)
    choices = PLACED[1] + (PLACED[4] if len(shape) == 4 else [])
    if not shape:
        choices = [layouts.plain, layouts.shifted]
    scales = st.sampled_from([1.0, 1.0, 1e-2, 30.0, 0.0])
    layout = st.sampled_from(choices)
    return shape, draw(layout), draw(layout), draw(scales), draw(scales)


def groups_of(draw, n):
    """Layers: one for each tensor, or tensors joined by random keys."""
    keys = draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    return list(range(n)) if draw(FLAG) else keys


@pytest.mark.quick(triton=NONE)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # the engine is a constant, safe to share between examples
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_against_the_spec(engine, data):
    case = data.draw(cases_(), label="case")
    dtype = data.draw(st.sampled_from(cases.DTYPES), label="dtype")
    drawn = data.draw(st.lists(tensors(), min_size=1, max_size=4), label="tensors")
    keys = groups_of(data.draw, len(drawn))
    kernels = data.draw(FLAG, label="kernels alone")
    seed = data.draw(st.integers(0, 99), label="seed")
    steps = data.draw(st.integers(1, 3), label="steps")

    shapes = [shape for shape, *_ in drawn]
    inside = [not kernels or sum(n > 1 for n in shape) >= 2 for shape in shapes]
    layers = [[i for i in range(len(drawn)) if keys[i] == k and inside[i]] for k in sorted(keys)]
    layers = [list(x) for x in dict.fromkeys(map(tuple, layers)) if x]

    def start(on: Engine):
        values = random(shapes, seed=seed)
        params = [
            Parameter(layout((v * size).to(on.device, dtype)))
            for v, (_, layout, _, size, _) in zip(values, drawn)
        ]
        opt = on.make(
            case,
            [(str(i), p) for i, p in enumerate(params)],
            layers=lambda name, p: keys[int(name)],
            adapt="kernels" if kernels else "all",
        )
        return params, opt

    def give_grads(params, step):
        values = random(shapes, seed=1000 * (step + 1) + seed)
        for p, v, (_, _, layout, _, size) in zip(params, values, drawn):
            p.grad = layout((v * size).to(p))

    params, opt = start(engine)
    spec = Spec(case.kind, opt.param_groups[0], params, layers=layers)
    for step in range(steps):
        spec.follow(opt, params)
        give_grads(params, step)
        try:
            spec.step([p.grad for p in params])
        except Undecided:
            assume(False)
        largest = max((abs(w).max() for w in spec.w if w.size), default=0.0)
        assume(largest < torch.finfo(dtype).max)  # float16 may overflow, as it does in torch
        opt.step()
        spec.check(params, opt)

    if case.rule is None:
        others, reference = start(Engine("reference", "cpu"))
        for step in range(steps):
            give_grads(others, step)
            reference.step()
        assert same_bits(params, [p.cpu() for p in others])
