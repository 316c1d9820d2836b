"""How large should matrices start, where a rule holds their norm?

Layca and Hyperball keep a layer at the norm that it starts with, where AdamW and Muon let it grow.
The GPT of `char_gpt` starts as GPT-2 does, with a deviation of 0.02, which is little for a narrow
network: torch's own initialisation gives a layer of 64 inputs 0.072. Here the blocks' matrices
start as GPT-2's do, or 4 times as large (2 and 8 times under Adam + hyperball), for bare AdamW and
Muon too. Rules govern the blocks' matrices; the rest takes plain steps at AdamW's best rate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from . import char_gpt, char_gpt_report, report
from .char_gpt import REST, Family, arms_of, best
from .char_gpt_report import best_rate, families
from .runner import Arm, Experiment, Scope, main
from .store import Store

ADAMW = Family("AdamW, decay 0.1", "adamw", -9)
NORMS = {
    ADAMW: (1, 4),
    Family("AdamW, two rates", "adamw", -10, plain="Adam"): (1, 4),
    Family("Adam + hyperball" + REST, "adam", -9, "hyperball", 0.0, "Adam"): (1, 2, 4, 8),
    Family("Adam + layca" + REST, "adam", -9, "layca", 0.0, "Adam"): (1, 4),
    Family("Muon" + REST, "muon", -7, plain="Adam"): (1, 4),
    Family("Muon + hyperball" + REST, "muon", -8, "hyperball", 0.0, "Adam"): (1, 4),
}


def named(family: Family, norms: float) -> Family:
    return replace(family, title=f"{family.title}, norms x{norms:g}", norms=norms)


def arms(scope: Scope) -> list[Arm]:
    """AdamW; once its best rate is known, the others, which leave the rest to it."""
    first = [named(ADAMW, norms) for norms in NORMS[ADAMW]]
    found = [arm for family in first for arm in arms_of(scope, family)]
    known = best(scope, first[:1])
    if known is None:
        return found
    plain = scope.store.settings(known)["lr"]  # type: ignore[union-attr]
    others = [named(f, norms) for f, every in NORMS.items() if f.plain for norms in every]
    return found + [arm for family in others for arm in arms_of(scope, family, plain)]


def plot(store: Store, path: Path) -> Path:
    """Loss at the best rate against the norms, a dot a seed; loss against the rate."""
    found = families(store)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_norms, *valleys = figure.subplots(1, 3, sharey=True)
    for family, every in NORMS.items():
        rule = family.title.removesuffix(REST)
        known = [n for n in every if named(family, n).title in found]
        if not known:
            continue
        colour = char_gpt_report.COLOURS.get(rule, "#444444")
        style = "--" if "layca" in rule else "-"  # hyperball's line is below it
        curves = {n: found[named(family, n).title] for n in known}
        bests = {n: curve[best_rate(curve)].values() for n, curve in curves.items()}
        for norms, values in bests.items():
            by_norms.plot([norms] * len(values), list(values), ".", color=colour)
        means = [statistics.mean(values) for values in bests.values()]
        by_norms.plot(known, means, style, color=colour, label=rule)
        for axes, norms in zip(valleys, (1, 4), strict=True):
            curve = curves.get(norms, {})
            losses = [statistics.mean(values.values()) for values in curve.values()]
            axes.plot(list(curve), losses, marker="o", ls=style, markersize=3, color=colour)
            axes.set(xlabel="rate", title=f"norms x{norms}", xscale="log")
    by_norms.set(xlabel="initial norms, of GPT-2's", ylabel="validation loss", xscale="log")
    by_norms.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    by_norms.minorticks_off()
    lowest = min(statistics.mean(c[best_rate(c)].values()) for c in found.values())
    by_norms.set_ylim(lowest - 0.03, lowest + 0.5)
    for axes in (by_norms, *valleys):
        axes.grid(**report.GRID)
    figure.legend(loc="outside right center", frameon=False)
    return report.saved(figure, path)


def experiment(options: argparse.Namespace) -> Experiment:
    of = char_gpt.experiment(options)
    return replace(of, name="char_gpt_norms", arms=arms, plot=plot)


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, char_gpt.arguments)


if __name__ == "__main__":
    run()
