"""Rules on other optimizers, written apart from the package: what wrappers are held against.

The oracle has an optimizer of the base's class on copies of the parameters. The base takes its step
from v to v - u; then the weights are set to what the paper's formula makes of v and u. Under
gradient rules the base's gradients are set to f*g before its step.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import RATE, random, set_grads
from torch import Tensor
from torch.nn import Parameter

import layerlr
from layerlr import rules

#: two kernels and two vectors, which rules leave alone unless they are for all parameters
SHAPES = ((7, 5), (33,), (2, 3, 2, 2), (4,))
MATRICES = ((7, 5), (6, 9))
#: large enough for states of 8 bits, which come in blocks
BLOCKS = ((64, 128), (8, 16))


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


# -- formulas: what becomes of v - u, lr being the rule's ------------------------------------------


def layca(v, u, lr, radius):
    """The four operations of the paper's algorithm 1."""
    across = u - (v * u).sum() / (v * v).sum() * v
    turned = v - lr * v.norm() * unit(across)
    return radius * unit(turned)


def capped(v, u, lr, radius):
    """The angle between v and v - u, but no more than .02, on the circle through both."""
    across = unit(u - (v * u).sum() / (v * v).sum() * v)
    after = v - u
    phi = min(math.acos(float((unit(v) * unit(after)).sum().clamp(max=1.0))), 0.02)
    return radius * (math.cos(phi) * unit(v) - math.sin(phi) * across)


def hyperball(v, u, lr, radius):
    return radius * unit(v - lr * radius * unit(u))


def relative(v, u, lr, radius):
    return v - lr * v.norm() * unit(u)


def brake(v, u, lr, radius):
    after = v - u
    growth = after.norm() - v.norm()
    return unit(after) * (v.norm() + 0.3 * growth) if growth > 0 else after


def rated(v, u, lr, radius):
    return v - RATE * u


def singh(w, g):
    return 1 + math.log1p(1 / float(g.norm()))


def lars(w, g):
    return 0.3 * float(w.norm()) / (float(g.norm()) + 1e-8)


class Row(NamedTuple):
    """A rule, the formula that it must equal, the lr of the rule (None: the base's), its layers."""

    rule: rules.LayerRule
    formula: Callable[..., Any]
    lr: float | None = None
    every: bool = False  # vectors too


RULES = {
    "layca": Row(rules.Layca(), layca, 0.05),
    "hyperball": Row(rules.Hyperball(), hyperball, 0.05),
    "lamb": Row(rules.Lamb(), relative, 0.05),
    "relative": Row(rules.Relative(), relative, 0.05),
    "layca-cap": Row(rules.Layca(max_angle=0.02), capped),
    "hyperball-1.5": Row(rules.Hyperball(radius=1.5), hyperball, 0.05),
    "brake": Row(rules.Brake(outward=0.3), brake),
    "rated": Row(rules.Rated(), rated, None, True),
    "singh": Row(rules.Singh(), singh, None, True),
    "lars": Row(rules.Lars(trust=0.3), lars),
}


# -- bases -----------------------------------------------------------------------------------------

ADAM = {"lr": 0.01, "betas": (0.8, 0.95)}
#: id -> module, class, arguments, shapes
BASES: dict[str, tuple[str, str, dict[str, Any], tuple[Any, ...]]] = {
    "sgd": ("torch.optim", "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, SHAPES),
    "adam": ("torch.optim", "Adam", {**ADAM, "maximize": True}, SHAPES),
    "adamw": ("torch.optim", "AdamW", {**ADAM, "weight_decay": 0.2, "foreach": True}, SHAPES),
    "rmsprop": ("torch.optim", "RMSprop", {"lr": 0.01, "momentum": 0.5}, SHAPES),
    "adagrad": ("torch.optim", "Adagrad", {"lr": 0.1, "lr_decay": 0.2}, SHAPES),
    "nadam": ("torch.optim", "NAdam", {"lr": 0.01}, SHAPES),
    "adafactor": ("torch.optim", "Adafactor", {"lr": 0.02}, SHAPES),
    "muon": ("torch.optim", "Muon", {"lr": 0.02}, MATRICES),
    "soap": ("pytorch_optimizer", "SOAP", {"lr": 0.01}, SHAPES),
    "shampoo": ("pytorch_optimizer", "Shampoo", {"lr": 0.05, "momentum": 0.5}, SHAPES),
    "lion": ("pytorch_optimizer", "Lion", {"lr": 0.003, "weight_decay": 0.1}, SHAPES),
    "timm-nadamw": ("timm.optim", "NAdamW", {"lr": 0.01}, SHAPES),
    "bnb-8bit": ("bitsandbytes.optim", "Adam8bit", {"lr": 0.01}, BLOCKS),
    "torchao-8bit": ("torchao.optim", "AdamW8bit", {"lr": 0.01}, BLOCKS),
}
#: those that know no float64
NARROW = ("bnb-8bit", "torchao-8bit")


def has(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def base_param(name: str):
    """A pytest row, skipped where the base is not installed."""
    module = BASES[name][0]
    missing = not has(module)
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"no {module}"))


def timm_optimizer(name):
    """An optimizer of timm: all of timm needs torchvision, its optimizers need torch alone."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip(reason="timm is not installed")
    if "timm_optim" not in sys.modules:
        package = types.ModuleType("timm_optim")
        package.__path__ = [str(Path(found.origin).parent / "optim")]
        sys.modules["timm_optim"] = package
    return getattr(importlib.import_module(f"timm_optim.{name.lower()}"), name)


def make_base(name: str, params, **kwargs) -> torch.optim.Optimizer:
    module, cls, args, _ = BASES[name]
    if module == "timm.optim":
        return timm_optimizer(cls)(params, **{**args, **kwargs})
    return getattr(importlib.import_module(module), cls)(params, **{**args, **kwargs})


def set_rates(opt, rate=RATE) -> None:
    for state in opt.state.values():
        if "rate" in state:
            state["rate"].fill_(rate)


class Oracle:
    """The base and a formula on copies of parameters."""

    def __init__(self, base: str, rule: str, params, dtype=torch.float64) -> None:
        self.params = [Parameter(p.detach().to(dtype, copy=True)) for p in params]
        self.base, self.row = make_base(base, self.params), RULES[rule]
        self.governed = [p for p in self.params if self.row.every or p.dim() >= 2]
        fixed = getattr(self.row.rule, "radius", None)
        self.radii = [
            fixed if isinstance(fixed, float) else p.detach().norm() for p in self.governed
        ]

    @torch.no_grad()
    def step(self) -> None:
        if self.row.rule.order == "gradient":
            for p in self.governed:
                p.grad *= self.row.formula(p, p.grad)
            self.base.step()
            return
        before = [p.detach().clone() for p in self.governed]
        self.base.step()
        for p, v, radius in zip(self.governed, before, self.radii, strict=True):
            if (v != p).any():  # else nothing is to turn; SOAP's first step prepares the second
                p.copy_(self.row.formula(v, v - p, self.row.lr, radius))


def wrapped(base: str, rule: str, params, backend: str = "auto", **kwargs):
    row = RULES[rule]
    opt = layerlr.wrap(make_base(base, params), row.rule, lr=row.lr, backend=backend, **kwargs)
    set_rates(opt)
    return opt


def params_of(dtype=torch.float32, seed=0, shapes=SHAPES) -> list[Parameter]:
    return [Parameter(v) for v in random(shapes, dtype, seed)]


def values(base: str, dtype=torch.float64, seed=0) -> list[Tensor]:
    return random(BASES[base][3], dtype, seed)


def compare(opt, params, oracle: Oracle, steps: int, rtol: float) -> None:
    """Step both with the same gradients."""
    for step in range(steps):
        set_grads(params, step)
        for p, q in zip(params, oracle.params, strict=True):
            q.grad = p.grad.to(q.dtype, copy=True)
        grads = [(p.grad, p.grad.clone()) for p in params]
        opt.step()
        oracle.step()
        for p, (g, before) in zip(params, grads, strict=True):
            # pytorch_optimizer's Shampoo writes into the gradients, without a wrapper too
            assert p.grad is g and (torch.equal(g, before) or type(opt.base).__name__ == "Shampoo")
        for p, q in zip(params, oracle.params, strict=True):
            distance = float((p.double() - q).detach().norm() / q.detach().norm())
            assert distance < rtol, (step, tuple(p.shape), distance)
