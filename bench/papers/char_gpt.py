"""A character-level GPT: AdamW, tuned, beside every rule over as many rates.

Four layers of 128 learn tiny_shakespeare in 2,000 steps. Rules govern the matrices of the blocks,
while embeddings, head, norms and biases take plain steps at AdamW's best rate ("plain rest"; SGD's
for SGD), or they govern all matrices at one rate, as after swapping one line. Then what was best
of some arms, with both neighbours, at half and at twice the width and the depth: whose rate
carries over? On a GPU runs are trained together. ``--scale cpu`` is smaller.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import layerlr
from bench.config import Config, build_optimizer
from bench.data import Data
from bench.fleet import train_together
from bench.record import Result

from . import char_gpt_report, gpt
from .char_gpt_report import REST
from .runner import AfterStep, Arm, Budget, Experiment, Job, Scope, main, network, one_by_one
from .store import Store

BETAS = ("betas=(0.9, 0.95)",)
DECAYS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Family:
    """Arms that differ in their rate: powers of 2 from ``2**lowest`` on."""

    title: str
    optimizer: str
    lowest: int
    rule: str = "none"
    decay: float = 0.1
    plain: str = ""  # the optimizer whose best rate the rest takes
    norms: float = 1.0  # how much larger than GPT-2's the blocks' matrices start

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(2.0**power for power in range(self.lowest, self.lowest + 5))

    def name(self, rate: float, size: str = "") -> str:
        return f"{self.title}, rate {rate:.3g}{size}"

    @property
    def known(self) -> bool:
        """Whether this layerlr has its rule."""
        if self.optimizer == "muon" and self.rule != "none":
            return hasattr(layerlr, "wrap") and self.rule in layerlr.rules.RULES
        return self.rule == "none" or self.rule in layerlr.rules.RULES


ADAMW = tuple(Family(f"AdamW, decay {decay:g}", "adamw", -10, decay=decay) for decay in DECAYS)
SGD = Family("SGD", "momentum", -5, decay=0.0)
ONE_LINE = (
    Family("Adam + hyperball", "adam", -8, "hyperball", 0.0),
    Family("Adam + layca", "adam", -8, "layca", 0.0),
    Family("AdamW + lamb", "adamw", -8, "lamb"),
    Family("AdamW + singh", "adamw", -11, "singh"),
    Family("SGD + layca", "momentum", -10, "layca", 0.0),
    Family("SGD + lars", "momentum", -1, "lars", 0.0),
)
CONTROL = "AdamW, two rates"
PLAIN = (
    Family(CONTROL, "adamw", -10, plain="Adam"),
    *(
        replace(family, title=family.title + REST, plain=family.title.split()[0].rstrip("W"))
        for family in ONE_LINE
    ),
    Family("Muon" + REST, "muon", -8, plain="Adam"),
    Family("Muon + hyperball" + REST, "muon", -8, "hyperball", 0.0, plain="Adam"),
)
CARRIED = ("Adam + hyperball", "Adam + layca", "AdamW + lamb", "Muon", "Muon + hyperball")


class Both(torch.optim.Optimizer):
    """Two optimizers that step one after the other, each its own parameters."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Matrices decay, norms and biases do not; with `plain_lr` the rule has the blocks' alone."""
    named = list(model.named_parameters())

    def group(of: Any, **more: Any) -> dict[str, Any]:
        return {"params": [(name, p) for name, p in named if of(name, p)], **more}

    no_decay = group(lambda name, p: p.ndim < 2, weight_decay=0.0)
    if config.plain_lr is None:
        return build_optimizer(config, model, [group(lambda name, p: p.ndim == 2), no_decay])
    ruled = group(lambda name, p: gpt.matrix(name))
    rest = [group(lambda name, p: p.ndim == 2 and not gpt.matrix(name)), no_decay]
    if config.optimizer != "muon":
        rest = [part | {"rule": None, "lr": config.plain_lr} for part in rest]
        return build_optimizer(config, model, [ruled, *rest])
    muon = torch.optim.Muon([ruled], lr=config.rate, weight_decay=config.weight_decay or 0.0)
    if config.rule != "none":
        muon = layerlr.wrap(muon, rule=config.rule, lr=config.rate)  # type: ignore[attr-defined]
    adamw = replace(config, optimizer="adamw", rule="none", options=BETAS, lr=config.plain_lr)
    return Both(muon, build_optimizer(replace(adamw, weight_decay=0.1), model, rest))


# --- arms ---


def arms(scope: Scope) -> list[Arm]:
    """AdamW and SGD; once they are known what takes their rate; at last the other sizes."""
    found = [arm for family in (*ADAMW, SGD) for arm in arms_of(scope, family)]
    for family in (*PLAIN, *ONE_LINE):
        rate = _plain(scope, family)
        if family.known and (rate is not None or not family.plain):
            found += arms_of(scope, family, rate)
    return found + [arm for family in _carried(scope) for arm in _elsewhere(scope, family)]


def arms_of(scope: Scope, family: Family, plain: float | None = None) -> list[Arm]:
    width, depth = _size(scope.options)
    return [_arm(scope, family, rate, plain, width, depth) for rate in family.rates]


def _arm(
    scope: Scope, family: Family, rate: float, plain: float | None, width: int, depth: int
) -> Arm:
    config = scope.config(
        optimizer=family.optimizer,
        rule=family.rule,
        lr=rate,
        plain_lr=plain,
        weight_decay=family.decay,
        options=BETAS if family.optimizer.startswith("adam") else (),
        clip=1.0,
        schedule="warmup",
        monitor_every=0,
    )
    base_width, base_depth = _size(scope.options)
    size = f", width {width}" * (width != base_width) + f", depth {depth}" * (depth != base_depth)
    build = partial(gpt.GPT, width=width, depth=depth, norms=family.norms)
    task = network(build, loss=gpt.loss, error=None, optimizer=optimizer)
    return Arm(family.name(rate, size), config, task)


def _plain(scope: Scope, family: Family) -> float | None:
    """The best rate of the optimizer that the rest is left to, once it is known."""
    if not family.plain:
        return None
    arm = best(scope, ADAMW if family.plain == "Adam" else (SGD,))
    return None if arm is None else scope.store.settings(arm)["lr"]  # type: ignore[union-attr]


def best(scope: Scope, families: Sequence[Family]) -> str | None:
    """The arm of the lowest mean loss of all; None as long as a run is missing."""
    store, names = scope.store, [f.name(rate) for f in families for rate in f.rates]
    if store is None or any(len(store.runs(name)) < scope.seeds for name in names):
        return None
    sound = {
        name: statistics.mean(store.last(name))
        for name in names
        if not any(run["final"]["diverged"] for run in store.runs(name))
    }
    return min(sound, key=lambda name: sound[name], default=None)


def _carried(scope: Scope) -> list[Family]:
    """Those whose rates are tried elsewhere: AdamW at its best decay, with two rates, rules."""
    arm = best(scope, ADAMW)
    adamw = [family for family in ADAMW if arm and arm.startswith(f"{family.title}, ")]
    titles = (CONTROL, *(title + REST for title in CARRIED))
    return adamw + [family for family in PLAIN if family.title in titles]


def _elsewhere(scope: Scope, family: Family) -> list[Arm]:
    """The best rate and its neighbours at half and at twice the width and the depth."""
    arm = best(scope, [family])
    if arm is None:
        return []
    settings, (width, depth) = scope.store.settings(arm), _size(scope.options)  # type: ignore
    sizes = [(width // 2, depth), (2 * width, depth), (width, depth // 2), (width, 2 * depth)]
    return [
        _arm(scope, family, settings["lr"] * factor, settings["plain_lr"], *size)
        for size in sizes
        for factor in (0.5, 1.0, 2.0)
    ]


def _size(options: argparse.Namespace) -> tuple[int, int]:
    """Width and depth."""
    return (64, 2) if options.scale == "cpu" else (128, 4)


# --- the experiment ---


def together(arm: Arm, config: Config) -> Hashable:
    """What one go trains: the rates and seeds of a family; elsewhere all families of a seed.

    Muon takes hundreds of launches a step and run, so its seeds are apart.
    """
    title, _, rest = arm.name.partition(", rate ")
    size, muon = rest.partition(", ")[2], config.optimizer == "muon"
    return (size or title, muon, config.seed if size or muon else None)


def fleet(job: Job, data: Data, after_step: AfterStep) -> list[Result]:
    tasks = [arm.task(config, data) for arm, config in job]
    return train_together([config for _, config in job], tasks, after_step)


def experiment(options: argparse.Namespace) -> Experiment:
    width, depth = _size(options)
    as_one = options.together or options.device.startswith("cuda")
    return Experiment(
        name="char_gpt",
        data="tiny_shakespeare",
        network=f"a GPT of {depth} layers of {width}, 4 heads, 64 characters: bench.papers.gpt",
        full=Budget(seeds=3, batch=16, iterations=2000),
        cpu=Budget(seeds=3, batch=8, iterations=1000),
        quick=Budget(seeds=2, batch=2, iterations=6, items=16),
        arms=arms,
        evals=10 if options.scale == "cpu" else 20,
        notes="Warm-up over a twentieth of the steps, cosine to a tenth of the rate, gradients "
        "clipped to a norm of 1, betas 0.9 and 0.95. Norms and biases do not decay. On a GPU "
        "products are in TF32.",
        table=char_gpt_report.table,
        plot=char_gpt_report.plot,
        train=fleet if as_one else one_by_one,
        together=together if as_one else None,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "train the runs of a family as one, as always on a GPU"
    parser.add_argument("--together", action="store_true", help=text)


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
