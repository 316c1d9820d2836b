"""Zhang, Chen and Liu 2018: rates from back-matching, on a VGG with batch normalisation.

VGG13 learns CIFAR-10, as in the authors' follow-up ("On the Local Hessian in Back-propagation").
The paper (of which we know the abstract) finds SGD with the layer-wise rates that back-matching
gives favourable over SGD with one. SGD-momentum with and without ``rule="backmatching"``, by both
of its estimators, over a grid of rates. ``--width 0.125`` takes an eighth of the channels, for a
CPU; ``--scale cpu`` that of images of 16x16, in four stages.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from . import report
from .networks import VGG13, batch_vgg
from .runner import Arm, Budget, Experiment, Scope, main, network
from .store import Store

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
# name: the rule's options
KINDS: dict[str, tuple[str, ...] | None] = {
    "SGD": None,
    "SGD + structural": ("estimator=structural",),
    "SGD + probe": ("estimator=probe",),
}
NOTES = (
    "Rates, budget, decay (L2 of 5e-4) and schedule (a tenth after a half and after three quarters "
    "of the run) are ours. No augmentation; weights are drawn as He has it (normal)."
)


def arms(scope: Scope) -> list[Arm]:
    task = network(partial(batch_vgg, stages=VGG13, scale=scope.options.width))
    if scope.options.scale == "cpu":
        task = network(partial(batch_vgg, stages=VGG13[:4], scale=1 / 8, shrink=2))
    found = []
    for kind, options in KINDS.items():
        for rate in RATES:
            config = scope.config(
                optimizer="momentum",
                rule="none" if options is None else "backmatching",
                rule_options=options or (),
                lr=rate,
                weight_decay=5e-4,
                drops=(0.5, 0.75),
                drop_factor=0.1,
            )
            found.append(Arm(_name(kind, rate), config, task))
    return found


def _name(kind: str, rate: float) -> str:
    return f"{kind}, rate {rate:g}"


def _rates(store: Store, kind: str) -> dict[float, str]:
    """Rate -> the arm of this kind."""
    named = {rate: _name(kind, rate) for rate in RATES}
    return {rate: arm for rate, arm in named.items() if arm in store.arms}


def table(store: Store) -> Table:
    """Test error at the end by rate and rule, and the time of a step."""
    rows = []
    for kind in KINDS:
        found = _rates(store, kind)
        if not found:
            continue
        cells = []
        for rate in RATES:
            arm = found.get(rate)
            runs = store.runs(arm) if arm else []
            diverged = sum(run["final"]["diverged"] for run in runs)
            cells.append(report.mean_std(store.last(arm) if arm else []))
            cells[-1] += f" ({diverged} of {len(runs)} diverged)" if diverged else ""
        times = [run["final"]["step_ms"] for arm in found.values() for run in store.runs(arm)]
        rows.append([kind, *cells, f"{statistics.median(times) / 1e3:.3g}"])
    seeds = max(len(store.runs(arm)) for arm in store.arms)
    header = ["", *(f"rate {rate:g}" for rate in RATES), "s a step"]
    return report.table_of(header, rows, f"test error at the end, %, seeds: {seeds}")


def plot(store: Store, path: Path) -> Path:
    """Test error by rate; over the steps, at each kind's best rate; that arm's rates by layer."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    chosen = []
    for kind, colour in zip(KINDS, report.COLOURS, strict=False):
        found = {rate: store.last(arm) for rate, arm in _rates(store, kind).items()}
        means = {rate: statistics.mean(errors) for rate, errors in found.items() if errors}
        if not means:
            continue
        left.plot(list(means), list(means.values()), "o-", color=colour, label=kind)
        chosen.append((_name(kind, min(means, key=lambda rate: means[rate])), colour))
    left.set(xlabel="rate", xscale="log", ylabel="test error at the end, %")
    left.grid(**report.GRID)
    report.lines(middle, store, [arm for arm, _ in chosen], [colour for _, colour in chosen])
    for arm, colour in chosen:
        curve = store.runs(arm)[0]["rates"]
        if curve:
            right.plot(curve["lr"][-1], "o-", color=colour, label=arm)
    right.set(xlabel="layer", yscale="log", ylabel="rate of the layer at the end")
    right.grid(**report.GRID)
    if chosen:
        left.legend(frameon=False, fontsize="small")
    return report.saved(figure, path)


def experiment(options: argparse.Namespace) -> Experiment:
    width, words = options.width, f"VGG13 with batch norm, widths times {options.width:g}"
    if options.scale == "cpu":
        words = "the first four stages of VGG13 at an eighth of their width, on images of 16x16"
    return Experiment(
        name="backmatching_vgg" + ("" if width == 1 else f"_{width:g}"),
        data="cifar10",
        network=f"{words}: bench.papers.networks.batch_vgg",
        full=Budget(seeds=3, batch=128, epochs=100),
        cpu=Budget(seeds=3, batch=32, iterations=1000, items=5000),
        quick=Budget(seeds=1, batch=16, iterations=3, items=32),
        arms=arms,
        notes=NOTES,
        table=table,
        plot=plot,
        evals=4 if options.scale == "cpu" else 50,
        records=25 if options.scale == "cpu" else 50,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=float, default=1.0, help="factor on every width")


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
