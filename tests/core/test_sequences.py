"""Drawn sequences of what programs do to an optimizer between steps."""

from __future__ import annotations

import copy
import itertools
import pickle

import cases
import layouts
import pytest
import torch
from cases import CASES, Engine, random, same_bits
from contract_helpers import TWINS, assert_close, through_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selection import NONE
from torch.nn import Parameter

pytestmark = [
    pytest.mark.asked(triton=NONE, simt=NONE),
    pytest.mark.filterwarnings("ignore:.*duplicate parameters", "ignore:.*has no effect"),
]

SHAPES = ((7, 5), (6, 4), (4,), (2, 3, 2, 2), (), (0, 3), (64, 64), (5, 1))
DTYPES = [(d,) for d in (*cases.DTYPES, torch.complex64)] + [cases.DTYPES[:3]]


def _inference(x):
    with torch.inference_mode():
        return x.clone()


def _placed(layout):
    return lambda x: layout(x) if x.dim() else x.clone()


WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
PLACES = {
    "elsewhere": layouts.shifted,
    "transposed": _placed(layouts.transposed),
    "strided": _placed(layouts.strided),
    "negated": lambda x: torch._neg_view(-x),
    "conjugated": lambda x: x.conj().resolve_conj().conj() if x.is_complex() else x.clone(),
}
ZEROS = {"zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)}
STATE = PLACES | ZEROS
STATE |= {
    "inference": _inference,
    "expanded": lambda x: torch.full((), 0.25).to(x).expand(x.shape),
    "wide": lambda x: x.to(WIDE.get(x.dtype, x.dtype)),
    "narrow": lambda x: x.clone() if x.is_complex() else x.bfloat16(),
    "longer": lambda x: torch.stack([x, x]),
    "none": lambda x: None,
    "number": lambda x: 0.5,
}
COUNTS = {
    "float": lambda n: n + 1,
    "nan": lambda n: torch.tensor(float("nan")),
    "negative": lambda n: -3.0,
    "negated": lambda n: torch._neg_view(torch.tensor(-n)),
    "zeros": lambda n: torch._efficientzerotensor((), dtype=torch.float32),
}
GRADIENTS = PLACES | ZEROS
GRADIENTS |= {
    "expanded": lambda g: g[:1].expand(g.shape) if g.dim() else g,
    "nan": lambda g: torch.full_like(g, float("nan")),
    "none": lambda g: None,
    "sparse": lambda g: g.to_sparse() if g.dim() else g,
}
SETTINGS = {
    "lr": [0.3, 0.0],
    "weight_decay": [0.2, 0.0],
    "momentum": [0.5, 0.0],
    "betas": [(0.5, 0.9)],
    "rule": [None, "lars", "layca", "hyperball"],
    "adapt": ["all", "kernels", None],
    "on_nonfinite": ["skip", None],
    "max_grad_norm": [0.5, None],
    "precision": ["stochastic", None],
}
OPTIONS = [{"precision": "master"}, {"precision": "kahan"}, {"layers": "module"}, {}]
OPTIONS += [{"state_dtype": "8bit"}, {"state_dtype": "bfloat16"}]


# -- an optimizer, and what is done to it ------------------------------------------------------


class Side:
    """An optimizer with its parameters; the methods from ``gradients`` on are the operations."""

    def __init__(self, make, values, dtypes, device):
        pairs = zip(values, itertools.cycle(dtypes))
        self.params = [Parameter(v.to(device, dtype, copy=True)) for v, dtype in pairs]
        self.names = [f"module{i // 2}.part{i}" for i in range(len(values))]
        self.opt = make(list(zip(self.names, self.params)))

    def member(self, k):
        p = self.params[k % len(self.params)]
        return p, self.opt.state.get(p) or {}

    def gradients(self, k, hows):
        for i, p in enumerate(self.params):
            g = random([p.shape], seed=100 * k + i)[0].to(p)
            p.grad = GRADIENTS[hows[i % len(hows)]](g)

    def weights(self, k, how):
        self.member(k)[0].data = PLACES[how](self.member(k)[0].data)

    def state(self, k, how):
        """Replace the tensors, or, where k is odd, the memory of the same tensors."""
        _, state = self.member(k)
        for key in sorted(state.keys() - {"step", "rounding_seed"}):
            if isinstance(old := state[key], torch.Tensor):
                new = STATE[how](old.detach())
                if k % 2 and how not in ("longer", "none", "number"):
                    old.data = new
                else:
                    state[key] = new

    def count(self, k, how):
        _, state = self.member(k)
        if "step" in state:
            state["step"] = COUNTS[how](float(state["step"]))

    def forget(self, k, how):
        p, state = self.member(k)
        state.clear() if how == "clear" else self.opt.state.pop(p, None)

    def freeze(self, k, how):
        self.member(k)[0].requires_grad_(how)

    def dtype(self, k, how):
        p, _ = self.member(k)
        if not p.is_complex():
            p.data, p.grad = p.data.to(how), None

    def group(self, k, how):
        group = self.opt.param_groups[k % len(self.opt.param_groups)]
        group |= {key: value for key, value in (how,) if key in group}

    def rates(self, k, how):
        self.opt.param_groups[0]["lr_factor"] = how

    def members(self, k, how):
        first = self.opt.param_groups[0]
        if how == "add":  # views of one storage
            flat = random([(30,)], torch.float32, seed=k)[0].to(first["params"][0].device)
            new = [flat[:24].view(6, 4).requires_grad_(), flat[24:].requires_grad_()]
            names = [f"new.part{len(self.params) + i}" for i in range(2)]
            self.opt.add_param_group({"params": list(zip(names, new))})
            self.params, self.names = self.params + new, self.names + names
        elif how == "twice":
            for key in ("params", "param_names"):
                first[key].append(first[key][0])

    def copied(self, k, how):
        if how in ("load", "file"):
            saved = self.opt.state_dict()
            self.opt.load_state_dict(through_file(saved) if how == "file" else saved)
        elif how == "release":
            self.opt.release()
        else:
            copier = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
            self.opt, self.params = copier((self.opt, self.params))

    def step(self):
        """The words of a refusal, which names what is wrong and has changed nothing; or None."""
        before = self.numbers()
        try:
            self.opt.step()
        except (RuntimeError, ValueError) as refused:
            words = str(refused)
            assert any(name in words for name in (*self.names, *SETTINGS)), words
            for then, now in zip(before, self.numbers(), strict=True):
                for key in then.keys() & now.keys() - {"step"}:
                    assert then[key].dtype != now[key].dtype or same_bits([then[key]], [now[key]])
            return words
        return None

    @torch.no_grad()
    def numbers(self):
        """Copies of weights, gradient and state of each parameter."""
        found = []
        for p in self.params:
            tensors = {"weights": p, "gradient": p.grad, **self.opt.state.get(p, {})}.items()
            dense = [(k, x) for k, x in tensors if isinstance(x, torch.Tensor) and not x.is_sparse]
            found.append({k: torch.zeros(x.shape, dtype=x.dtype).copy_(x) for k, x in dense})
        return found


def compare(side, other, exact):
    for mine, theirs in zip(side.numbers(), other.numbers(), strict=True):
        if "gradient" in mine:  # else state that was replaced need not be seen yet
            assert mine.keys() == theirs.keys()
        for key in mine if "gradient" in mine else ["weights"]:
            x, y, close = mine[key], theirs[key], 0.0
            assert (x.dtype, x.shape) == (y.dtype, y.shape), key
            if not exact and key not in ("weights", "step"):
                continue
            if not exact and key == "weights":
                coded = any(name.endswith("_scale") for name in mine)
                close = 0.02 if coded else 64 * torch.finfo(x.dtype).eps
                close *= x.abs().nan_to_num(0.0, 0.0, 0.0).sum().item()
            if not mine.get(f"{key}_scale", x).isnan().any():  # of NaN codes say nothing
                torch.testing.assert_close(x, y, rtol=0.0, atol=close, equal_nan=True)


# -- sequences ---------------------------------------------------------------------------------


of = st.sampled_from


def changes(keys):
    return of([(key, value) for key in keys for value in SETTINGS[key]])


def sequences(cases, examples, **hows):
    """The arguments of a test: operations, each with a number, how, and whether a step follows."""
    one = st.one_of([st.tuples(st.just(n), st.integers(0, 5), how) for n, how in hows.items()])
    always = "gradients", 7, ["elsewhere"]
    program = st.lists(st.tuples(one, st.booleans()), min_size=1, max_size=9)
    given_ = given(
        case=of(cases),
        options=of(OPTIONS),
        shapes=st.lists(of(SHAPES), min_size=2, max_size=4).map(lambda x: random(x, seed=3)),
        dtypes=of(DTYPES),
        program=program.map(lambda x: [(always, len(x) % 4 > 0), *x, (always, True)]),
    )
    well = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
    settings_ = settings(max_examples=examples, deadline=None, derandomize=True, **well)
    return lambda test: settings_(given_(test))


@sequences(
    [case for case in CASES if not case.args.get("centered")],
    1000,
    gradients=st.lists(of([*GRADIENTS]), min_size=1, max_size=3),
    weights=of([*PLACES]),
    state=of([*STATE]),
    count=of([*COUNTS]),
    forget=of(["clear", "delete"]),
    freeze=st.booleans(),
    dtype=of(cases.DTYPES[:3]),
    group=changes(SETTINGS),
    rates=of([0.5, 2.0]),
    members=of(["add", "twice"]),
    copied=of(["load", "file", "deepcopy", "pickle", "release"]),
)
def test_beside_the_reference(other, case, options, shapes, dtypes, program):
    engines = other, Engine("reference", "cpu")
    sides = [
        Side(lambda p, e=e: e.make(case, p, **options), shapes, dtypes, e.device) for e in engines
    ]
    exact = True
    for (name, k, how), steps in program:
        try:
            for side in sides:
                getattr(side, name)(k, how)
        except (RuntimeError, ValueError):  # of a copy: what a step would refuse
            assert name in ("copied", "members")
            return
        if not steps:
            continue
        for group in sides[0].opt.param_groups:
            exact &= group["rule"] is None and group["max_grad_norm"] is None
        words, others = (side.step() for side in sides)
        if words != others:
            assert words and (others or "use backend='reference'" in words), (words, others)
            return
        compare(*sides, exact)
        if words is None:
            mine, theirs = (side.opt.layer_stats() for side in sides)
            assert mine["names"] == theirs["names"]
            assert mine["skipped"].tolist() == theirs["skipped"].tolist()


@sequences(
    [case for case in CASES if case.rule is None and case.cls in TWINS],
    200,
    gradients=st.lists(of([*PLACES, "expanded", "none"]), min_size=1, max_size=3),
    weights=of([*PLACES]),
    forget=of(["delete"]),
    freeze=st.booleans(),
    group=changes(("lr", "weight_decay", "betas")),
    copied=of(["load", "file", "deepcopy", "pickle"]),
)
def test_beside_torch(other, case, options, shapes, dtypes, program):
    twin, dtypes = TWINS[case.cls], [torch.float64]
    sides = [
        Side(lambda p: other.make(case, p), shapes, dtypes, other.device),
        Side(lambda p: twin(p, **case.args), shapes, dtypes, other.device),
    ]
    for (name, k, how), steps in program:
        for side in sides:
            getattr(side, name)(k, how)
        if steps:
            assert [side.step() for side in sides] == [None, None]
            assert_close(*([p.cpu() for p in side.params] for side in sides))
