"""Claim cards: what the papers claim, what was measured, and a verdict.

``python -m bench.papers.cards FOLDER`` writes ``cards.md`` and ``cards.png`` beside the results in
FOLDER, from those results alone. A claim whose experiment has fewer than three seeds gets no card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from bench.record import write_atomically

from . import report
from .claims import CLAIMS
from .evidence import FEWEST, Claim, Finding, words
from .store import Store

COLOURS = {"confirmed": "#009E73", "not resolved": "#888888", "contradicted": "#D55E00"}
INTRODUCTION = (
    "# Claim cards\n\n"
    "Written by `python -m bench.papers.cards` from the JSON files beside it; the protocol stands "
    "in [README.md](../README.md). Differences are paired by seed and above 0 where the claim "
    "holds; ± is half their 95% interval. *Not resolved*: the interval holds 0 at this scale. Of "
    "twenty intervals one misses its mark by chance. What is promised of times and memory is in "
    "[promises.md](../../results/promises.md), what follows for a user in "
    "[choosing.md](../../../docs/choosing.md).\n"
)


@dataclass(frozen=True)
class Card:
    """A claim, the results that answer it and what they say."""

    claim: Claim
    store: Store
    finding: Finding

    @property
    def difference(self) -> str:
        finding, digits = self.finding, self.claim.digits
        return f"{finding.mean:+.{digits}f} ± {finding.half:.{digits}f}{self.claim.unit}"

    def markdown(self, number: int) -> str:
        claim, finding, name = self.claim, self.finding, self.store.path.stem
        settings = self.store.settings(self.store.arms[0])
        parts = finding.sides.items()
        sides = "; ".join(f"{side} {words(values, claim.digits)}" for side, values in parts)
        return (
            f"## {claim.words[0].upper()}{claim.words[1:]}\n\n"
            f"Card {number}. {claim.paper}. Asked: {claim.asked}. "
            f"Measured with {self.store.content['network']}; "
            f"{settings['steps']:,} steps of {settings['batch']} examples, "
            f"{finding.seeds} seeds.\n\n"
            f"**{finding.verdict.capitalize()}**: {self.difference}. {sides}. "
            f"[Figures]({name}.md), [runs]({name}.json).\n\n"
            f"![{name}]({name}.png)\n"
        )


def cards(folder: Path, claims: Sequence[Claim] = CLAIMS) -> list[Card]:
    """Of the claims whose experiment has been run with enough seeds in all its arms."""
    found = []
    for claim in claims:
        for path in (folder / f"{name}.json" for name in claim.stores):
            store = Store.load(path) if path.exists() else None
            if store and all(store.complete(FEWEST, arms) for arms in claim.needs):
                found.append(Card(claim, store, claim.measure(store)))
                break
    return found


def markdown(found: Sequence[Card], claims: Sequence[Claim] = CLAIMS) -> str:
    """The summary, then the cards."""
    rows = [
        [
            f"{number}. {card.claim.paper}: {card.claim.words}",
            f"{card.difference}, n = {card.finding.seeds}",
            f"**{card.finding.verdict}**",
        ]
        for number, card in enumerate(found, 1)
    ]
    parts = [INTRODUCTION, report.markdown(report.table_of(["claim", "figure", "verdict"], rows))]
    parts.append("![all claims at a glance](cards.png)\n")
    parts += [card.markdown(number) for number, card in enumerate(found, 1)]
    answered = [card.claim for card in found]
    missing = [f"- {claim.words} ({claim.stores[0]})" for claim in claims if claim not in answered]
    if missing:
        parts.append("## Without a card: not measured with three seeds yet\n")
        parts.append("\n".join(missing) + "\n")
    return "\n".join(parts)


def plot(found: Sequence[Card], path: Path) -> Path:
    """Each difference in units of half its interval: what crosses 0 is not resolved."""
    figure = Figure(figsize=(14, 1.3 + 0.3 * (len(found) + 4)), layout="constrained")
    axes = figure.subplots()
    rows, papers = [], {}  # a row without a point for each paper's name
    for card in found:
        papers.setdefault(card.claim.paper, len(rows) + len(papers))
        rows.append(len(rows) + len(papers))
    for at, card in zip(rows, found, strict=True):
        finding = card.finding
        scale = finding.half + finding.threshold
        x, colour = finding.mean / scale, COLOURS[finding.verdict]
        axes.errorbar(x, at, xerr=finding.half / scale, fmt="o", color=colour, capsize=3)
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    for paper, at in papers.items():
        axes.axhspan(at - 0.5, at + 0.5, color="#eeeeee", linewidth=0)
        axes.text(0.01, at, paper, transform=beside, va="center", weight="bold")
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=2)
    side = 1.5 * max(4.0, *(abs(value) for value in axes.get_xlim()))
    axes.set(xlim=(-side, side), ylim=(rows[-1] + 0.5, -0.5))
    ticks = [tick for tick in (1, 2, 10, 100) if tick < side]
    axes.set_xticks([*(-tick for tick in ticks), 0, *ticks])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(rows, [f"{card.claim.words}   {i}" for i, card in enumerate(found, 1)])
    axes.set_xlabel("against the claim  <  difference over half its 95% interval  >  for the claim")
    right = axes.secondary_yaxis("right")
    right.set_yticks(rows, [card.difference for card in found])
    for verdict, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=verdict)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return report.saved(figure, path)


def main(argv: Sequence[str] | None = None) -> list[Card]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the results")
    folder = parser.parse_args(argv).folder
    found = cards(folder)
    if not found:
        parser.error(f"{folder} holds no experiment with {FEWEST} seeds")
    text = markdown(found)
    write_atomically(folder / "cards.md", lambda file: file.write(text.encode()))
    print(text.partition("\n## ")[0], plot(found, folder / "cards.png"), sep="\n")
    return found


if __name__ == "__main__":
    main()
