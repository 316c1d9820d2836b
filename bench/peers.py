"""The contenders of the step-time benchmark: torch.optim, timm, pytorch_optimizer, layerlr.

Every contender does what its rule needs and no more: layer-wise adaptation switched on for every
layer, no global clipping, weight decay in AdamW and LAMB, which are defined with it, and nowhere
else. Peers get whatever else makes them cheapest.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MOMENTUM = 0.9
# Small, because all contenders share weights and gradients and take thousands of steps: the weights
# must stay ordinary numbers, and layca must not arrive at weights parallel to the update.
LR_SGD, LR_ADAM = 1e-4, 1e-5
DECAY = 0.01  # of AdamW and LAMB: the default of torch and of timm


class Stepper(Protocol):
    """All that is timed: an optimizer, or a stream over memory."""

    def step(self) -> Any: ...


Build = Callable[[list[Tensor]], Stepper]


@dataclass(frozen=True)
class Traffic:
    """Element accesses (reads + writes) per parameter by design: weights, gradients, state."""

    weights: int
    grads: int
    state: int

    def bytes_per_param(self, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
        return (self.weights + self.grads) * dtype.itemsize + self.state * state_dtype.itemsize


# In float32: 20 and 28 bytes for the plain steps, then what two passes under a layer rule need.
SGD = Traffic(2, 1, 2)  # read w g m, write w m: 20
SGD_SINGH = Traffic(2, 2, 2)  # g once more, for its norm: 24
SGD_LARS = Traffic(3, 2, 2)  # w and g once more, for their norms: 28
SGD_LAYCA = Traffic(3, 1, 3)  # pass one stores m, pass two reads w and m again: 28
ADAM = Traffic(2, 1, 4)  # read w g m v, write w m v: 28
ADAM_SINGH = Traffic(2, 2, 4)  # 32
ADAM_UPDATE = Traffic(3, 1, 6)  # layca, lamb: pass two reads w m v again: 40


@dataclass(frozen=True)
class Contender:
    """One bar of the plot; ``build`` gets the parameters, whose gradients are set."""

    name: str
    package: str
    build: Build
    traffic: Traffic | None = None  # None: not ours to say
    rule: str | None = None
    writes_grad: bool = False  # .grad has to be restored between samples
    slow: bool = False  # runs on SLOW_MODEL alone

    def bytes_per_param(self, dtype: torch.dtype) -> int | None:
        if self.traffic is None:
            return None
        wide = self.package == "layerlr" and dtype.itemsize < 4  # whose state is never half
        return self.traffic.bytes_per_param(dtype, torch.float32 if wide else dtype)


SLOW_MODEL = "resnet50"
STREAM_IN_PLACE = "memory in place"
BASELINES = {"sgd": "torch SGD fused", "adam": "torch AdamW fused"}


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


def ours(name: str, rule: str | None, backend: str) -> Build:
    """layerlr's optimizer ``name``; imported when built, so that its absence is a row left out."""

    def build(params: list[Tensor]) -> Stepper:
        cls = getattr(importlib.import_module("layerlr"), name)
        own = {"lr": LR_SGD, "momentum": MOMENTUM} if name == "SGD" else {"lr": LR_ADAM}
        if name == "AdamW":
            own["weight_decay"] = DECAY
        return cls(params, **own, rule=rule, backend=backend)

    return build


class Stream:
    """A loop of torch's bound by memory alone: what the achieved bandwidth is held against."""

    def __init__(self, kind: str, like: Tensor, elements: int = 1 << 26):
        a = torch.ones(elements, dtype=like.dtype, device=like.device)
        b = torch.ones_like(a) if kind == "copy" else a
        self.step: Callable[[], Any] = {
            "copy": lambda: b.copy_(a),
            "in place": lambda: a.neg_(),  # two steps change nothing
            "read": lambda: a.sum(),
        }[kind]
        self.bytes = elements * like.element_size() * (1 if kind == "read" else 2)


def stream(kind: str) -> Contender:
    return Contender(f"memory {kind}", "memory", lambda params: Stream(kind, params[0]))


def _sgd(backend: str) -> list[Contender]:
    po, lars = "pytorch_optimizer", {"rule": "lars", "writes_grad": True}
    return [
        Contender("torch SGD fused", "torch", torch_sgd(fused=True), SGD),
        # The same again: how far its ratio is from 1 is what this run cannot tell apart.
        Contender("torch SGD fused (A/A)", "torch", torch_sgd(fused=True), SGD),
        Contender("torch SGD foreach", "torch", torch_sgd(foreach=True)),
        Contender("torch SGD loop", "torch", torch_sgd(foreach=False)),
        Contender("timm Lars foreach", "timm", timm_lars(True), rule="lars"),
        Contender("timm Lars loop", "timm", timm_lars(False), rule="lars"),
        Contender(f"{po} LARS foreach", po, pytorch_optimizer("LARS", True), **lars),
        Contender(f"{po} LARS loop", po, pytorch_optimizer("LARS", False), **lars),
        _ours("SGD", None, SGD, backend),
        _ours("SGD", "singh", SGD_SINGH, backend),
        _ours("SGD", "lars", SGD_LARS, backend),
        _ours("SGD", "layca", SGD_LAYCA, backend),
        _ours("SGD", "layca", None, "reference", slow=True),
    ]


def _adam(backend: str) -> list[Contender]:
    po = "pytorch_optimizer"
    return [
        Contender("torch AdamW fused", "torch", torch_adamw(fused=True), ADAM),
        Contender("torch AdamW fused (A/A)", "torch", torch_adamw(fused=True), ADAM),
        Contender("torch AdamW foreach", "torch", torch_adamw(foreach=True)),
        Contender("torch AdamW loop", "torch", torch_adamw(foreach=False)),
        Contender("timm Lamb foreach", "timm", timm_lamb(True), rule="lamb"),
        Contender("timm Lamb loop", "timm", timm_lamb(False), rule="lamb"),
        Contender(f"{po} Lamb foreach", po, pytorch_optimizer("Lamb", True), rule="lamb"),
        Contender(f"{po} Lamb loop", po, pytorch_optimizer("Lamb", False), rule="lamb"),
        _ours("AdamW", None, ADAM, backend),
        _ours("Adam", "singh", ADAM_SINGH, backend),
        _ours("Adam", "layca", ADAM_UPDATE, backend),
        _ours("AdamW", "lamb", ADAM_UPDATE, backend),
        _ours("AdamW", "lamb", None, "reference", slow=True),
    ]


def _ours(
    name: str, rule: str | None, traffic: Traffic | None, backend: str, slow: bool = False
) -> Contender:
    label = f"layerlr {name} {rule}" + (" reference" if slow else "")
    return Contender(label, "layerlr", ours(name, rule, backend), traffic, rule, slow=slow)


def contenders(family: str, backend: str = "cpu") -> list[Contender]:
    """All contenders of a family ("sgd" or "adam"), its baseline first."""
    streams = [stream("copy"), stream("in place"), stream("read")]
    return [*{"sgd": _sgd, "adam": _adam}[family](backend), *streams]
