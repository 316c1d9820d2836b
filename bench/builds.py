"""How the optimizers of the benchmarks are built: torch.optim, timm, pytorch_optimizer, layerlr.

Each does what its rule needs and no more: layer-wise adaptation switched on for every layer, no
global clipping, weight decay in AdamW and LAMB, which are defined with it, and nowhere else. Peers
get whatever else makes them cheapest.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

MOMENTUM = 0.9
# Small, because all contenders share weights and gradients and take thousands of steps: the weights
# must stay ordinary numbers, and layca must not arrive at weights parallel to the update.
LR_SGD, LR_ADAM = 1e-4, 1e-5
DECAY = 0.01  # of AdamW and LAMB: the default of torch and of timm
# packages that need not be there: they are compared where they are installed
PEERS = ("timm", "pytorch_optimizer", "torchao", "bitsandbytes")


class Stepper(Protocol):
    """All that is timed: an optimizer, or a stream over memory."""

    def step(self) -> Any: ...


Build = Callable[[list[Tensor]], Stepper]


def torch_sgd(**kind: bool) -> Build:
    return lambda params: torch.optim.SGD(params, lr=LR_SGD, momentum=MOMENTUM, **kind)


def torch_adamw(**kind: bool) -> Build:
    return lambda params: torch.optim.AdamW(params, lr=LR_ADAM, weight_decay=DECAY, **kind)


def timm_class(name: str) -> Any:
    """A class of timm.optim, also where ``import timm`` fails for want of torchvision.

    timm's ``__init__`` imports its models, its optimizers need torch alone: where the plain import
    fails, timm's ``optim`` folder is loaded as a package of its own, under a name of its own.
    """
    try:
        return getattr(importlib.import_module("timm.optim"), name)
    except ImportError:
        timm = importlib.util.find_spec("timm")
        if timm is None or not timm.submodule_search_locations:
            raise
        alias = "_bench_timm_optim"
        spec = importlib.machinery.ModuleSpec(alias, None, is_package=True)
        spec.submodule_search_locations = [f"{timm.submodule_search_locations[0]}/optim"]
        sys.modules.setdefault(alias, importlib.util.module_from_spec(spec))
        return getattr(importlib.import_module(f"{alias}.{name.lower()}"), name)


def load() -> None:
    """Import the peers that are there; what fails is said when it is built."""
    for module in ("timm.optim", "pytorch_optimizer"):
        with contextlib.suppress(Exception):
            importlib.import_module(module)


def timm_lars(foreach: bool) -> Build:
    more = {"lr": LR_SGD, "momentum": MOMENTUM, "always_adapt": True, "foreach": foreach}
    return lambda params: timm_class("Lars")(params, **more)


def timm_lamb(foreach: bool) -> Build:
    more = {"lr": LR_ADAM, "weight_decay": DECAY, "max_grad_norm": None, "always_adapt": True}
    return lambda params: timm_class("Lamb")(params, foreach=foreach, **more)


def pytorch_optimizer(name: str, foreach: bool) -> Build:
    own = {"lr": LR_SGD} if name == "LARS" else {"lr": LR_ADAM, "weight_decay": DECAY}

    def build(params: list[Tensor]) -> Stepper:
        cls = getattr(importlib.import_module("pytorch_optimizer"), name)
        return cls(params, foreach=foreach, **own)

    return build


def ours(name: str, rule: str | None, backend: str, **more: Any) -> Build:
    """layerlr's optimizer ``name``; imported when built, so that its absence is a row left out."""

    def build(params: list[Tensor]) -> Stepper:
        cls = getattr(importlib.import_module("layerlr"), name)
        own = {"lr": LR_SGD, "momentum": MOMENTUM} if name == "SGD" else {"lr": LR_ADAM}
        if name == "AdamW":
            own["weight_decay"] = DECAY
        return cls(params, **own, **more, rule=rule, backend=backend)

    return build


def eight_bits(module: str, name: str) -> Build:
    def build(params: list[Tensor]) -> Stepper:
        cls = getattr(importlib.import_module(module), name)
        return cls(params, lr=LR_ADAM, weight_decay=DECAY)

    return build
