"""THE table: every direction and every rule, with hyper-parameters that leave no term out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

import layerlr
from layerlr.rules import (
    AdamMini,
    Brake,
    Hyperball,
    Lamb,
    Lars,
    Layca,
    LayerRule,
    Plain,
    Rated,
    Relative,
    Singh,
)

#: id -> the direction it must resolve to, class, arguments
DIRECTION_ROWS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "sgd": ("sgd", layerlr.SGD, {"lr": 0.1}),
    "sgd-max": ("sgd", layerlr.SGD, {"lr": 0.1, "weight_decay": 0.3, "maximize": True}),
    "mom": ("momentum", layerlr.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "damp": ("momentum", layerlr.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    "nag": (
        "nesterov",
        layerlr.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "amom": ("averaged_momentum", layerlr.AMomSGD, {"lr": 0.2, "weight_decay": 0.1}),
    "adagrad": (
        "adagrad",
        layerlr.Adagrad,
        {"lr": 0.1, "lr_decay": 0.2, "initial_accumulator_value": 0.3, "weight_decay": 0.1},
    ),
    "rms": ("rmsprop", layerlr.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "rms-c": ("rmsprop_centered", layerlr.RMSprop, {"lr": 0.01, "alpha": 0.9, "centered": True}),
    "rms-m": ("rmsprop_momentum", layerlr.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "rms-cm": (
        "rmsprop_centered_momentum",
        layerlr.RMSprop,
        {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "centered": True, "eps": 1e-3},
    ),
    "adam": ("adam", layerlr.Adam, {"lr": 0.01}),
    "adam-l2": (
        "adam",
        layerlr.Adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": True},
    ),
    "adam-d": (
        "adam",
        layerlr.Adam,
        {"lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True, "eps": 1e-3},
    ),
    "ams": ("amsgrad", layerlr.Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.7)}),
    "adamw": ("adam", layerlr.AdamW, {"lr": 0.01, "weight_decay": 0.2}),
    "adamw-ams": ("amsgrad", layerlr.AdamW, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.7)}),
    "lion": ("lion", layerlr.Lion, {"lr": 0.02, "weight_decay": 0.2}),
    "signum": ("lion", layerlr.Lion, {"lr": 0.02, "betas": (0.8, 0.8), "maximize": True}),
}

#: id -> rule, with every direction; trust is large enough for half precisions to move
RULE_ROWS: dict[str, LayerRule | None] = {
    "none": None,
    "plain": Plain(),
    "singh": Singh(),
    "lars": Lars(trust=0.3),
    "lamb": Lamb(),
    "layca": Layca(),
    "rated": Rated(),
    "hyperball": Hyperball(),
    "relative": Relative(),
    "brake": Brake(outward=0.3),
}

#: options of the rules, with the directions that show them
VARIANT_ROWS: dict[str, LayerRule] = {
    "lars-clip": Lars(trust=0.05, eps=0.1, trust_clip=True),
    "lamb-clip": Lamb(clip=0.5),
    "lamb-limit": Lamb(trust_clip=True),
    "lamb-raw": Lamb(bias_correction=False, grad_averaging=False),
    "layca-now": Layca(radius="current"),
    "layca-frozen": Layca(others="freeze"),
    "layca-wide": Layca(eps=0.5),
    "layca-cap": Layca(max_angle=0.02),
    "lamb-range": Lamb(min_ratio=2.0, max_ratio=2.5),
    "hyperball-now": Hyperball(radius="current"),
    "hyperball-1.5": Hyperball(radius=1.5),
}


#: what the rates of the rule that leaves them to others are set to
RATE = 0.7


class Case(NamedTuple):
    """One row: an optimizer class, its rule, its hyper-parameters."""

    id: str
    cls: type
    rule: LayerRule | None
    args: dict[str, Any]

    def make(self, params, rate=RATE, **kwargs):
        opt = self.cls(params, **{**self.args, **kwargs}, rule=self.rule)
        for state in opt.state.values():
            if "rate" in state:
                state["rate"].fill_(rate)
        return opt

    @property
    def kind(self) -> str:
        return self.cls.__name__


def _case(direction: str, rule: str, value: LayerRule | None) -> Case:
    _, cls, args = DIRECTION_ROWS[direction]
    return Case(f"{direction}-{rule}", cls, value, args)


#: the whole product, to take single rows from
BY_ID = {f"{d}-{r}": _case(d, r, v) for d in DIRECTION_ROWS for r, v in RULE_ROWS.items()}
BY_ID |= {
    f"{d}-{r}": _case(d, r, v) for d in ("mom", "adamw", "ams") for r, v in VARIANT_ROWS.items()
}

#: Pairs instead of the product. A kernel is instantiated for a direction and asks the rule, whose
#: numbers are data, once a layer: what they share is the order of the passes, the factor of a
#: gradient rule, a and b of an update rule and the latched radius. So every direction meets no
#: rule, a gradient rule and a rotating update rule; every rule meets a first-order direction with
#: one state and another with two; and those that look at the direction meet the others that answer
#: differently. tests/mutants/ lists mistakes in every engine that this table catches.
PAIRS = [(d, r) for d in DIRECTION_ROWS for r in ("none", "lars", "layca")]
PAIRS += [(d, r) for d in ("nag", "adamw") for r in ("plain", "singh", "lamb", "rated")]
PAIRS += [("lion", r) for r in ("singh", "lamb", "hyperball")]
PAIRS += [("adagrad", "singh"), ("rms-cm", "rated"), ("rms-c", "rated"), ("ams", "lamb")]
PAIRS += [("mom", r) for r in ("singh", "lamb", "lars-clip")]
PAIRS += [("mom", r) for r in ("layca-now", "layca-frozen", "layca-wide")]
PAIRS += [("adamw", r) for r in ("lars-clip", "lamb-clip", "lamb-limit", "lamb-raw", "layca-now")]
PAIRS += [("ams", "lamb-raw")]
PAIRS += [(d, r) for d in ("mom", "adamw") for r in ("hyperball", "relative", "brake")]
PAIRS += [("mom", "hyperball-now"), ("adamw", "hyperball-1.5")]
PAIRS += [("mom", "layca-cap"), ("adamw", "layca-cap"), ("adamw", "lamb-range")]

#: a rule that goes with one class alone
OWN = [
    Case(
        "adam-mini",
        layerlr.AdamMini,
        AdamMini(),
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    )
]
BY_ID |= {case.id: case for case in OWN}

CASES = [BY_ID[f"{d}-{r}"] for d, r in PAIRS] + OWN
RULED = [case for case in CASES if case.rule is not None]
#: those of one direction for each class and number of states
SHORT = [BY_ID[f"{d}-{r}"] for d, r in PAIRS if d in ("nag", "amom", "adagrad", "adamw", "rms-cm")]
SHORT += [BY_ID[f"ams-{r}"] for r in ("none", "layca")]
SHORT += [BY_ID[f"mom-{r}"] for r in ("layca-frozen", "layca-wide")] + OWN

CLASSES = list(dict.fromkeys(cls for _, cls, _ in DIRECTION_ROWS.values()))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: kernels and vectors, one element, no dimension, nothing at all
SHAPES = ((7, 5), (33,), (2, 3, 2, 2), (), (0, 3), (1,), (1, 1))


class Engine(NamedTuple):
    """A backend and a device that it runs on."""

    backend: str
    device: str

    def params(self, values, dtype=None) -> list[Parameter]:
        return [Parameter(v.detach().to(self.device, dtype, copy=True)) for v in values]

    def make(self, case: Case, params, **kwargs):
        return case.make(params, backend=self.backend, **kwargs)


def ids(rows) -> list[str]:
    return [row.id for row in rows]


def random(shapes, dtype=torch.float64, seed=0, scale=1.0) -> list[Tensor]:
    """Normal values, the same for a seed whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [(v * scale).to(dtype) for v in values]


def set_grads(params, seed: int, scale: float = 1.0) -> None:
    """Gradients of a step, with the strides of the parameters."""
    for p, g in zip(params, random([p.shape for p in params], seed=1000 + seed, scale=scale)):
        p.grad = torch.empty_like(p).copy_(g.to(p.dtype)).detach()


def train(opt, params, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        set_grads(params, seed + step)
        opt.step()


def copies(params) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def bits(t):
    """The bits of a tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    if not t.is_floating_point():
        return t.detach().clone()
    return t.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


def bits_of(tensors) -> list[Tensor]:
    """Bits of tensors, on the CPU, so that -0.0 differs from 0.0 and NaN equals itself."""
    return [bits(torch.view_as_real(t) if t.is_complex() else t).cpu() for t in tensors]


def same_bits(a, b) -> bool:
    pairs = zip(bits_of(a), bits_of(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def state_of(opt, p) -> dict[str, Tensor]:
    """Copies of one parameter's state."""
    return {k: v.detach().clone() for k, v in opt.state.get(p, {}).items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and same_bits(a.values(), [b[k] for k in a])
