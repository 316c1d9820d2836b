"""Every choice of a training run: one frozen dataclass, its command line, its optimizer.

The command line is generated from the fields, so a choice is written down once.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

import layerlr

from .data import DATASETS, SCALINGS
from .models import MODELS

# name -> class (same name in layerlr and torch.optim) and its own keyword arguments
OPTIMIZERS: dict[str, tuple[str, dict[str, object]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nag": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "amom": ("AMomSGD", {"momentum": 0.9}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
    "muon": ("Muon", {}),  # torch's, for matrices alone
}

# The best of the grid that `python -m bench.demo --grid` runs: error in % on a validation third of
# the digits' train set, mean of 5 seeds, 500 steps. Singh takes its bare twin's rate.
#               0.0001 0.0003  0.001  0.003   0.01   0.03    0.1    0.3      1
# sgd            87.55  68.75  29.30  12.70   6.00   3.90   4.05   7.20  89.90
# momentum       30.65  12.55   6.15   4.00   3.25   4.15  78.50  90.15  89.80
# nag            30.15  12.65   6.25   3.95   3.20   4.20  75.80  90.35  89.75
# amom           87.70  69.50  30.65  12.55   6.15   4.00   3.25   4.20  73.95
# adagrad        88.30  65.10  19.35   7.30   3.95   4.70   7.15  19.20  70.30
# rmsprop        13.20   5.85   3.50   3.95   6.40  21.85  68.75  89.10  89.70
# adam           19.45   7.00   3.75   2.95   3.50  27.40  85.25  90.50  89.90
# adamw          19.35   7.25   3.55   3.00   3.40  26.10  86.25  90.50  89.90
BARE_RATES = {
    "sgd": 0.03,
    "momentum": 0.01,
    "nag": 0.01,
    "amom": 0.1,
    "adagrad": 0.01,
    "rmsprop": 0.001,
    "adam": 0.003,
    "adamw": 0.003,
}
# Layca's rate is an angle, so the paper's values need no tuning to the task.
LAYCA_RATE, LAYCA_RATE_AVERAGED = 3.0**-3, 3.0**-5
_AVERAGED = ("momentum", "nag", "amom", "adam", "adamw")


def default_rate(optimizer: str, rule: str) -> float:
    """The rate the demo uses; for the other rules there is no value that suits any task."""
    if rule in ("none", "singh") and optimizer in BARE_RATES:
        return BARE_RATES[optimizer]
    if rule == "layca":
        return LAYCA_RATE_AVERAGED if optimizer in _AVERAGED else LAYCA_RATE
    if rule == "curvature":
        return 1.0  # a factor on the step that the rule computes
    raise ValueError(f"no default learning rate for {optimizer}, rule {rule!r}: give one")


def option(default: Any, help: str, kind: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field that is also a command-line option."""
    return field(default=default, metadata={"help": help, "type": kind or type(default), **more})


@dataclass(frozen=True)
class Config:
    """A training run, complete: the same Config on the same machine gives the same bits."""

    data: str = option("digits", "data set", choices=sorted(DATASETS))
    folder: str | None = option(None, "folder of the data set, in torchvision's layout", str)
    scaling: str = option("standard", "inputs standardised or in 0..1", choices=SCALINGS)
    model: str = option("convnet", "network", choices=sorted(MODELS))
    optimizer: str = option("sgd", "direction", choices=list(OPTIMIZERS))
    rule: str = option("none", "layer rule: none, singh, layca, lars, lamb, ...")
    lr: float | None = option(None, "learning rate (default: the demo's, where it has one)", float)
    momentum: float | None = option(None, "default: 0.9 for momentum, nag and amom", float)
    weight_decay: float | None = option(None, "default: the optimizer's own", float)
    plain_lr: float | None = option(None, "rate of what the rule does not govern (lr)", float)
    clip: float | None = option(None, "largest norm of all gradients together", float)
    options: tuple[str, ...] = option((), "optimizer keyword, KEY=VALUE", str, nargs="*")
    rule_options: tuple[str, ...] = option((), "rule keyword, KEY=VALUE", str, nargs="*")
    layers: str = option("tensor", "what forms a layer", choices=("tensor", "module"))
    backend: str = option("auto", "backend of layerlr")
    library: str = option("layerlr", "torch: the bare twin", choices=("layerlr", "torch"))
    alpha: float = option(0.0, "rates by depth: > 0 favours last layers, < 0 first ones")
    schedule: str = option(
        "steps", "course of the rate", choices=("constant", "steps", "cosine", "warmup", "inv")
    )
    drops: tuple[float, ...] = option(
        (0.8, 0.9, 0.97), "when, in parts of the run", float, nargs="*"
    )
    drop_factor: float = option(0.2, "what each drop multiplies the rate by")
    gamma: float = option(1e-4, "inv: (1 + gamma*step)^-power")
    power: float = option(0.75, "inv: see gamma")
    batch: int = option(32, "examples a step")
    steps: int = option(500, "optimizer steps")
    seed: int = option(0, "of weights and data order")
    holdout: bool = option(False, "test on the last third of the train set instead")
    eval_every: int = option(100, "steps between tests, 0: only at the end")
    monitor_every: int = option(10, "steps between records of layer rotation, 0: none")
    checkpoint_every: int = option(0, "steps between checkpoints, 0: none")
    device: str = option("cpu", "device")
    threads: int = option(1, "CPU threads; for small networks one is fastest")

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 1),
            ("steps", 1),
            ("threads", 1),
            ("eval_every", 0),
            ("monitor_every", 0),
            ("checkpoint_every", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, given {getattr(self, name)}")
        for item in fields(self):
            allowed = item.metadata.get("choices")
            if allowed and getattr(self, item.name) not in allowed:
                raise ValueError(
                    f"unknown {item.name} {getattr(self, item.name)!r}; there are: "
                    + ", ".join(allowed)
                )
        if self.library == "torch" and (self.rule != "none" or self.alpha):
            raise ValueError("torch.optim has no layer rules and no rates by depth")

    @property
    def name(self) -> str:
        alpha = f"-alpha{self.alpha:g}" if self.alpha else ""
        twin = "-torch" if self.library == "torch" else ""
        return f"{self.data}-{self.model}-{self.optimizer}-{self.rule}{alpha}{twin}-seed{self.seed}"

    @property
    def rate(self) -> float:
        return default_rate(self.optimizer, self.rule) if self.lr is None else self.lr

    def factor(self, step: int) -> float:
        """What the schedule multiplies the rate by at `step`."""
        if self.schedule == "steps":
            return self.drop_factor ** sum(step >= round(d * self.steps) for d in self.drops)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        if self.schedule == "warmup":  # over a twentieth, then a cosine to a tenth
            warm = max(self.steps // 20, 1)
            left = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))
            return min((step + 1) / warm, 1.0) * (0.1 + 0.9 * left if step > warm else 1.0)
        if self.schedule == "inv":
            return (1 + self.gamma * step) ** -self.power
        return 1.0


def add_arguments(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    for item in fields(Config):
        if item.name in skip:
            continue
        flag, how = "--" + item.name.replace("_", "-"), dict(item.metadata)
        if how["type"] is bool:
            parser.add_argument(flag, action="store_true", help=how["help"])
            continue
        if item.default not in (None, ()):
            how["help"] += " (default: %(default)s)"
        parser.add_argument(flag, default=item.default, **how)


def from_arguments(arguments: argparse.Namespace, **more: Any) -> Config:
    given = {
        f.name: getattr(arguments, f.name) for f in fields(Config) if hasattr(arguments, f.name)
    }
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in (given | more).items()}
    return Config(**values)


def build_optimizer(
    config: Config, model: nn.Module, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all parameters, or of these groups."""
    class_name, arguments = OPTIMIZERS[config.optimizer]
    arguments = {"lr": config.rate, **arguments, **parse_options(config.options)}
    for key in ("momentum", "weight_decay"):
        if (value := getattr(config, key)) is not None:
            arguments[key] = value
    if config.library == "torch":
        if not hasattr(torch.optim, class_name):
            raise ValueError(f"torch.optim has no {class_name}")
        make = getattr(torch.optim, class_name)
    elif not hasattr(layerlr, class_name):
        raise ValueError(f"layerlr has no {class_name}: choose --library torch")
    else:
        make = getattr(layerlr, class_name)
        arguments |= {"rule": _rule(config), "layers": config.layers, "backend": config.backend}
    try:
        return make(groups or _parameters(config, model), **arguments)
    except TypeError as error:
        raise ValueError(f"{config.optimizer} with {arguments}: {error}") from error


def parse_options(pairs: tuple[str, ...]) -> dict[str, object]:
    """``("betas=(0.9, 0.99)", "radius=initial")`` -> keyword arguments."""
    out: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"not KEY=VALUE: {pair!r}")
        try:
            out[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            out[key] = text  # a plain word
    return out


def _rule(config: Config) -> object:
    options = parse_options(config.rule_options)
    if config.rule == "none":
        if options:
            raise ValueError(f"rule options {options} without a rule")
        return None
    try:
        return layerlr.rules.resolve({"name": config.rule, **options})
    except TypeError as error:
        raise ValueError(f"{config.rule} with {options}: {error}") from error


def _parameters(config: Config, model: nn.Module) -> Any:
    """Named parameters; with `alpha`, one group per kernel and what follows it (bias, norm).

    The papers count kernels as layers, so a bias takes the rate of the kernel before it.
    """
    named = list(model.named_parameters())
    if not config.alpha:
        return named
    groups: list[list[tuple[str, nn.Parameter]]] = [[]]
    for name, parameter in named:
        if parameter.ndim >= 2 and any(p.ndim >= 2 for _, p in groups[-1]):
            groups.append([])
        groups[-1].append((name, parameter))
    scales = layerlr.depth_multipliers(len(groups), config.alpha)
    return [
        {"params": group, "lr_factor": float(scale)}
        for group, scale in zip(groups, scales, strict=True)
    ]
