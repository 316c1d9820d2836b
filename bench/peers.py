"""The contenders of the step-time benchmark: torch.optim, timm, pytorch_optimizer, layerlr.

`bench.builds` says how each is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.builds import (
    Build,
    eight_bits,
    ours,
    pytorch_optimizer,
    timm_lamb,
    timm_lars,
    torch_adamw,
    torch_sgd,
)


@dataclass(frozen=True)
class Traffic:
    """Element accesses (reads + writes) per parameter by design: weights, gradients, state."""

    weights: int
    grads: int
    state: int

    def bytes_per_param(self, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
        return (self.weights + self.grads) * dtype.itemsize + self.state * state_dtype.itemsize


# Each operand read once and each result written once; in float32 20 and 28 bytes. What a plain step
# moves, and a layer rule's where a layer stays on the chip between its two passes.
ONCE = {
    "sgd": Traffic(2, 1, 2),  # read w g m, write w m: 20
    "adam": Traffic(2, 1, 4),  # read w g m v, write w m v: 28
}
# What the two passes of a layer rule move where a layer does not stay.
TWO_PASS = {
    ("sgd", None): ONCE["sgd"],
    ("sgd", "singh"): Traffic(2, 2, 2),  # g once more, for its norm: 24
    ("sgd", "lars"): Traffic(3, 2, 2),  # w and g once more, for their norms: 28
    ("sgd", "layca"): Traffic(3, 1, 3),  # pass one stores m, pass two reads w and m again: 28
    ("adam", None): ONCE["adam"],
    ("adam", "singh"): Traffic(2, 2, 4),  # 32
    ("adam", "layca"): Traffic(3, 1, 6),  # pass two reads w m v again: 40
    ("adam", "lamb"): Traffic(3, 1, 6),
}
# tensors of state per parameter tensor, at most
STATES = {"sgd": 1, "adam": 2, "held": 3, "coded": 2}
OURS = {
    "sgd": (("SGD", None), ("SGD", "singh"), ("SGD", "lars"), ("SGD", "layca")),
    "adam": (("AdamW", None), ("Adam", "singh"), ("Adam", "layca"), ("AdamW", "lamb")),
}


@dataclass(frozen=True)
class Contender:
    """One bar of the plot; ``build`` gets the parameters, whose gradients are set."""

    name: str
    package: str
    build: Build
    traffic: Traffic | None = None  # by design; None: not ours to say
    rule: str | None = None
    writes_grad: bool = False  # .grad has to be restored between samples
    models: tuple[str, ...] | None = None  # that it runs on; None: all
    once: Traffic | None = None  # the least that any implementation moves; None as above
    backend: str | None = None  # of layerlr

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """layerlr's state is never half, torch's and the peers' has the dtype of the weights."""
        return torch.float32 if self.package == "layerlr" and dtype.itemsize < 4 else dtype

    def bytes_per_param(self, dtype: torch.dtype) -> int | None:
        return self.traffic and self.traffic.bytes_per_param(dtype, self.state_dtype(dtype))

    def once_bytes_per_param(self, dtype: torch.dtype) -> int | None:
        return self.once and self.once.bytes_per_param(dtype, self.state_dtype(dtype))


# What the reference runs on, by device: under each rule, and under the last of a family's. It takes
# seconds where a model is large, and thousands of launches where a model is but many tensors.
REFERENCE_MODELS = {
    "cpu": ((), ("resnet50",)),
    "cuda": (
        ("resnet50", "vit_b"),
        ("resnet50", "vit_b", "gpt2", "vit_l", "gpt2_xl", "llama3_8b_16of32", "l2"),
    ),
}
# The loop of torch's that speeds are held against. A CPU's in-place loop is its fastest.
STREAM = {"cpu": "memory in place", "cuda": "memory copy"}
BASELINES = {
    "sgd": "torch SGD fused",
    "adam": "torch AdamW fused",
    "held": "torch AdamW fused",  # AdamW whose 16-bit weights are held in other ways
    "coded": "torch AdamW fused",  # AdamW whose state has fewer bits
}


class Stream:
    """A loop of torch's bound by memory alone: what the achieved bandwidth is held against."""

    def __init__(self, kind: str, dtype: torch.dtype, device: torch.device):
        size = 1 << (30 if device.type == "cuda" else 28)  # many times the largest cache
        a = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        b = torch.ones_like(a) if kind == "copy" else a
        self.step: Callable[[], Any] = {
            "copy": lambda: b.copy_(a),
            "in place": lambda: a.neg_(),  # two steps change nothing
            "read": lambda: a.sum(),
        }[kind]
        self.bytes = size * (1 if kind == "read" else 2)


def stream(kind: str) -> Contender:
    def build(params: list[Tensor]) -> Stream:
        return Stream(kind, params[0].dtype, params[0].device)

    return Contender(f"memory {kind}", "memory", build)


def _sgd(loops: bool) -> list[Contender]:
    po, lars = "pytorch_optimizer", {"rule": "lars", "writes_grad": True}
    fused = {"traffic": ONCE["sgd"], "once": ONCE["sgd"]}
    return [
        Contender("torch SGD fused", "torch", torch_sgd(fused=True), **fused),
        # The same again: how far its ratio is from 1 is what this run cannot tell apart.
        Contender("torch SGD fused (A/A)", "torch", torch_sgd(fused=True), **fused),
        Contender("torch SGD foreach", "torch", torch_sgd(foreach=True)),
        Contender("torch SGD loop", "torch", torch_sgd(foreach=False)),
        Contender("timm Lars foreach", "timm", timm_lars(True), rule="lars"),
        *([Contender("timm Lars loop", "timm", timm_lars(False), rule="lars")] if loops else ()),
        Contender(f"{po} LARS foreach", po, pytorch_optimizer("LARS", True), **lars),
        Contender(f"{po} LARS loop", po, pytorch_optimizer("LARS", False), **lars),
    ]


def _adam(loops: bool) -> list[Contender]:
    po = "pytorch_optimizer"
    fused = {"traffic": ONCE["adam"], "once": ONCE["adam"]}
    return [
        Contender("torch AdamW fused", "torch", torch_adamw(fused=True), **fused),
        Contender("torch AdamW fused (A/A)", "torch", torch_adamw(fused=True), **fused),
        Contender("torch AdamW foreach", "torch", torch_adamw(foreach=True)),
        Contender("torch AdamW loop", "torch", torch_adamw(foreach=False)),
        Contender("timm Lamb foreach", "timm", timm_lamb(True), rule="lamb"),
        *([Contender("timm Lamb loop", "timm", timm_lamb(False), rule="lamb")] if loops else ()),
        Contender(f"{po} Lamb foreach", po, pytorch_optimizer("Lamb", True), rule="lamb"),
        Contender(f"{po} Lamb loop", po, pytorch_optimizer("Lamb", False), rule="lamb"),
    ]


def _ours(family: str, backend: str, label: str = "") -> list[Contender]:
    """layerlr under each rule."""
    return [
        Contender(
            f"layerlr {name} {rule}{label}",
            "layerlr",
            ours(name, rule, backend),
            TWO_PASS[family, rule],
            rule,
            once=ONCE[family],
            backend=backend,
        )
        for name, rule in OURS[family]
    ]


# Options of AdamW that families of their own compare: the keyword, its values, under which rules.
OPTIONS: dict[str, tuple[str, tuple[str | None, ...], tuple[str | None, ...]]] = {
    "held": ("precision", (None, "master", "kahan", "stochastic"), (None, "layca")),
    "coded": ("state_dtype", ("float32", "bfloat16", "8bit"), (None, "layca", "lamb")),
}


def _options(family: str, backend: str, label: str = "") -> list[Contender]:
    """layerlr's AdamW with each value of an option; what moves is not weights and state alone."""
    option, values, rules = OPTIONS[family]
    return [
        Contender(
            f"layerlr AdamW {rule} {value or 'nearest'}{label}",
            "layerlr",
            ours("AdamW", rule, backend, **{option: value}),
            rule=rule,
            backend=backend,
        )
        for rule in rules
        for value in values
    ]


def _others_coded() -> list[Contender]:
    """Peers with 8-bit state, none of which has a layer rule."""
    return [
        Contender("torchao AdamW8bit", "torchao", eight_bits("torchao.optim", "AdamW8bit")),
        Contender(
            "bitsandbytes AdamW8bit", "bitsandbytes", eight_bits("bitsandbytes.optim", "AdamW8bit")
        ),
    ]


def _reference(family: str, device: str) -> list[Contender]:
    """The pure PyTorch backend, whose traffic is that of many passes and not by design."""
    each, last = REFERENCE_MODELS.get(device, ((), ()))
    *others, final = _ours(family, "reference", " reference")
    found = [replace(c, traffic=None, models=each) for c in others]
    return [*found, replace(final, traffic=None, models=last)]


def contenders(
    family: str, backends: Sequence[str] = ("cpu",), device: str = "cpu"
) -> list[Contender]:
    """All contenders of a family (those of `BASELINES`) on a type of device, its baseline first.

    The first of layerlr's backends goes without its name, so that goals need not know it.
    """
    first, *others = backends
    if family in OPTIONS:
        mine = _options(family, first)
        for backend in others:
            mine += _options(family, backend, f" {backend}")
        return [*_adam(False)[:2], *mine, *(_others_coded() if family == "coded" else ())]
    mine = _ours(family, first)
    for backend in others:
        mine += _ours(family, backend, f" {backend}")
    if "reference" not in others:
        mine += _reference(family, device)
    streams = [stream("copy"), stream("in place"), stream("read")]
    return [*{"sgd": _sgd, "adam": _adam}[family](device == "cpu"), *mine, *streams]
