"""Singh et al. 2015, table I: Caffe's LeNet on MNIST, each optimizer with and without singh.

Test error after 600 to 1,800 of 2,000 iterations, beside the paper's figures (10 runs). As the
rule always raises the rate, ``--also 0.02`` adds bare arms at another rate: a control that the
paper does not have. ``--scale cpu`` decides it: each arm at the best of five rates of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from . import report
from .runner import Arm, Budget, Experiment, Scope, Search, main, rate_name
from .store import Store

# The paper's table I: error in %, mean and deviation of 10 runs.
PAPER = {
    "SGD": {600: (3.29, 0.22), 1000: (1.89, 0.08), 1400: (1.60, 0.11), 1800: (1.52, 0.09)},
    "SGD + singh": {600: (3.05, 0.21), 1000: (1.80, 0.13), 1400: (1.49, 0.09), 1800: (1.41, 0.12)},
    "NAG": {600: (3.01, 0.19), 1000: (1.92, 0.07), 1400: (1.74, 0.12), 1800: (1.56, 0.09)},
    "NAG + singh": {600: (2.84, 0.17), 1000: (1.83, 0.18), 1400: (1.52, 0.11), 1800: (1.37, 0.09)},
    "AdaGrad": {600: (2.21, 0.14), 1000: (1.68, 0.11), 1400: (1.61, 0.08), 1800: (1.41, 0.09)},
    "AdaGrad + singh": {
        600: (1.95, 0.16),
        1000: (1.57, 0.14),
        1400: (1.61, 0.09),
        1800: (1.34, 0.08),
    },
}
DIRECTIONS = {"SGD": "momentum", "NAG": "nag", "AdaGrad": "adagrad"}
CPU_RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
NOTES = (
    "Biases have their weights' rate (Caffe: twice it). Images in an order drawn anew each epoch "
    "(Caffe: the order of its database). The rate stands outside the momentum buffer, as in torch."
)


def arms(scope: Scope) -> list[Arm]:
    found = []
    for title, optimizer in DIRECTIONS.items():
        bare = [(rate_name(title, rate), "none", rate) for rate in scope.options.also]
        for name, rule, rate in ((title, "none", 0.01), (f"{title} + singh", "singh", 0.01), *bare):
            config = scope.config(
                model="lenet",
                optimizer=optimizer,
                rule=rule,
                layers="module",
                lr=rate,
                weight_decay=5e-4,
                # AdaGrad's global rate is constant in the paper.
                schedule="constant" if optimizer == "adagrad" else "inv",
                options=("eps=1e-8",) if optimizer == "adagrad" else (),
            )
            search = Search(name, config, CPU_RATES) if scope.options.scale == "cpu" else None
            found.append(Arm(name, config, search=search))
    return found


def table(store: Store) -> Table:
    """Ours / the paper's."""
    steps = sorted({step for arm in store.arms for step in store.series(arm)})
    asked = [step for step in steps if step in PAPER["SGD"]] or steps
    rows = []
    for step in asked:
        cells = []
        for arm in store.arms:
            ours = report.mean_std(store.series(arm).get(step, []))
            mean, deviation = _paper(store).get(arm, {}).get(step, (None, None))
            cells.append(ours if mean is None else f"{ours} / {mean:.2f} ± {deviation:.2f}")
        rows.append([str(step), *cells])
    seeds = max(len(store.runs(arm)) for arm in store.arms)
    title = f"test error, %: ours over {seeds} seeds"
    title += " / the paper's over 10" if _paper(store) else ""
    return report.table_of(["iteration", *store.arms], rows, title)


def _paper(store: Store) -> dict[str, dict[int, tuple[float, float]]]:
    """The paper's figures, where the settings are the paper's."""
    return PAPER if store.settings(store.arms[0])["batch"] == 64 else {}


def plot(store: Store, path: Path) -> Path:
    """Error over the iterations; where there is but one test, each seed, bare beside ruled."""
    if all(len(store.series(arm)) == 1 for arm in store.arms):
        titles = [title for title in DIRECTIONS if f"{title} + singh" in store.arms]
        sides = {title: {"bare": title, "singh": f"{title} + singh"} for title in titles}
        return report.pairs(store, sides, path)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, title in zip(figure.subplots(1, 3, sharey=True), DIRECTIONS, strict=True):
        shown = [arm for arm in store.arms if arm.startswith(title)]
        axes.set_title(title, fontsize="medium")
        colours = {title: "#444444", f"{title} + singh": "#E69F00"}
        report.lines(axes, store, shown, [colours.get(arm, "#0072B2") for arm in shown])
        for arm in [arm for arm in shown if arm in _paper(store)]:
            points = [(step + (12 if arm == title else -12), *v) for step, v in PAPER[arm].items()]
            x, y, spread = zip(*points, strict=True)
            style = {"capsize": 2, "markersize": 5, "linewidth": 0, "elinewidth": 0.8}
            label = f"{arm}, paper"
            axes.errorbar(x, y, spread, fmt="x", color=colours[arm], label=label, **style)
        if shown:
            axes.legend(frameon=False, fontsize="small")
        if axes.get_ylim()[1] > 8:
            axes.set_ylim(0, 8)
    return report.saved(figure, path)


def experiment(options: argparse.Namespace) -> Experiment:
    return Experiment(
        name="singh_mnist",
        data="mnist",
        scaling="unit",
        network="Caffe's LeNet: bench.models.lenet",
        full=Budget(seeds=10, batch=64, iterations=2000),
        cpu=Budget(seeds=5, batch=32, iterations=600),
        quick=Budget(seeds=1, batch=64, iterations=400, items=2000),
        arms=arms,
        notes=NOTES,
        table=table,
        plot=plot,
        evals=1 if options.scale == "cpu" else 10,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "bare arms at these rates too"
    parser.add_argument("--also", type=float, nargs="+", default=[], metavar="RATE", help=text)


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
