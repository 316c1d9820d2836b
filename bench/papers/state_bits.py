"""State in fewer bits: does training end where float32 state does?

A character-level GPT (AdamW, and AdamW with lamb), or the deep autoencoder of MNIST with
``--autoencoder`` (AdamW, and SGD-momentum), each with state in float32, bfloat16 and
8 bits, over the same seeds. Rates are those that are best, or near it, in ``char_gpt.json`` and
``curvature_autoencoder_cpu.json``; the question is the difference between the kinds of state.
Confirmed: the mean over seeds of 8 bits is within one deviation of float32's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

from . import curvature_autoencoder, gpt, report
from .char_gpt import BETAS, optimizer
from .runner import Arm, Budget, Experiment, Scope, main, network
from .store import Store

KINDS = ("float32", "bfloat16", "8bit")


def _of_gpt(scope: Scope) -> list[Arm]:
    task = network(
        partial(gpt.GPT, width=128, depth=2), loss=gpt.loss, error=None, optimizer=optimizer
    )
    made = []
    for title, rule, rate in (("AdamW", "none", 4e-3), ("AdamW + lamb", "lamb", 0.03)):
        for kind in KINDS:
            config = scope.config(
                optimizer="adamw",
                rule=rule,
                lr=rate,
                plain_lr=4e-3,
                weight_decay=0.1,
                options=(*BETAS, f"state_dtype={kind}"),
                clip=1.0,
                schedule="warmup",
                monitor_every=0,
            )
            made.append(Arm(f"{title}, {kind}", config, task))
    return made


def _of_autoencoder(scope: Scope) -> list[Arm]:
    task, made = partial(curvature_autoencoder.task, False), []
    for title, name, rate in (("AdamW", "adamw", 3e-3), ("SGD-momentum", "momentum", 1e-3)):
        for kind in KINDS:
            config = scope.config(
                optimizer=name,
                lr=rate,
                weight_decay=1e-5,
                options=(f"state_dtype={kind}",),
                monitor_every=0,
            )
            made.append(Arm(f"{title}, {kind}", config, task))
    return made


def table(store: Store) -> Table:
    """The loss at the end, mean and deviation over the seeds."""
    titles = list(dict.fromkeys(arm.rpartition(", ")[0] for arm in store.arms))
    rows = []
    for title in titles:
        known = [arm for kind in KINDS if (arm := f"{title}, {kind}") in store.arms]
        losses = [store.last(arm) for arm in known]
        rows.append([title, *(report.mean_std(values, 4) for values in losses)])
    return report.table_of(["", *KINDS], rows, report.LABELS[store.metric])


def plot(store: Store, path: Path) -> Path:
    """A line a seed, from kind to kind."""
    titles = dict.fromkeys(arm.rpartition(", ")[0] for arm in store.arms)
    groups = {
        title: {k: f"{title}, {k}" for k in KINDS if f"{title}, {k}" in store.arms}
        for title in titles
    }
    return report.pairs(store, groups, path)


def experiment(options: argparse.Namespace) -> Experiment:
    if options.autoencoder:
        return Experiment(
            name="state_bits_autoencoder",
            data="mnist",
            scaling="unit",
            network="784-1000-500-250-30 and back: bench.papers.networks.autoencoder",
            full=Budget(seeds=3, batch=500, iterations=400, items=10000),
            quick=Budget(seeds=1, batch=100, iterations=4, items=400),
            arms=_of_autoencoder,
            table=table,
            plot=plot,
            evals=4,
        )
    return Experiment(
        name="state_bits_gpt",
        data="tiny_shakespeare",
        network="a GPT of 2 layers of 128, 4 heads, 64 characters: bench.papers.gpt",
        full=Budget(seeds=5, batch=16, iterations=600),
        quick=Budget(seeds=1, batch=2, iterations=4, items=16),
        arms=_of_gpt,
        notes="Warm-up over a twentieth of the steps, cosine to a tenth of the rate, gradients "
        "clipped to a norm of 1, betas 0.9 and 0.95.",
        table=table,
        plot=plot,
        evals=4,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--autoencoder", action="store_true", help="MNIST instead of characters")


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
