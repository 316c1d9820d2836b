"""Claim cards: what the papers claim, what was measured, and a verdict.

``python -m bench.papers.cards FOLDER`` writes ``cards.md`` and ``cards.png`` beside the results in
FOLDER, from those results alone. A claim whose experiment has fewer than three seeds gets no card.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

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
    "twenty intervals one misses its mark by chance.\n"
)


def findings(folder: Path, claims: Sequence[Claim] = CLAIMS) -> dict[Claim, Finding]:
    """Of the claims whose experiment has been run with enough seeds, in all arms compared."""
    found = {}
    for claim in claims:
        path = folder / f"{claim.store}.json"
        if not path.exists():
            continue
        store = Store.load(path)
        if store.complete(FEWEST):
            found[claim] = claim.measure(store)
    return found


def markdown(found: Mapping[Claim, Finding], claims: Sequence[Claim] = CLAIMS) -> str:
    """The summary, then a card a claim."""
    rows = []
    for number, claim in enumerate(found, 1):
        finding = found[claim]
        figure = f"{difference(claim, finding)}, n = {finding.seeds}"
        rows.append([f"{number}. {claim.paper}: {claim.words}", figure, f"**{finding.verdict}**"])
    parts = [INTRODUCTION, report.markdown(report.table_of(["claim", "figure", "verdict"], rows))]
    parts.append("![all claims at a glance](cards.png)\n")
    for number, (claim, finding) in enumerate(found.items(), 1):
        parts.append(_card(number, claim, finding))
    missing = [f"{claim.words} ({claim.store})" for claim in claims if claim not in found]
    if missing:
        parts.append("## Without a card: not measured with three seeds yet\n")
        parts.append("\n".join(f"- {line}" for line in missing) + "\n")
    return "\n".join(parts)


def _card(number: int, claim: Claim, finding: Finding) -> str:
    sides = "; ".join(f"{side} {words(values)}" for side, values in finding.sides.items())
    return (
        f"## {number}. {claim.words}\n\n{claim.paper}. Asked: {claim.asked}.\n\n"
        f"**{finding.verdict.capitalize()}**: {difference(claim, finding)} over {finding.seeds} "
        f"seeds. {sides}. [Figures]({claim.store}.md), [runs]({claim.store}.json).\n\n"
        f"![{claim.store}]({claim.store}.png)\n"
    )


def difference(claim: Claim, finding: Finding) -> str:
    return f"{finding.mean:+.2f} ± {finding.half:.2f}{claim.unit}"


def plot(found: Mapping[Claim, Finding], path: Path) -> Path:
    """Each difference in units of half its interval: what crosses 0 is not resolved."""
    count = len(found)
    figure = Figure(figsize=(14, 1.3 + 0.4 * count), layout="constrained")
    axes = figure.subplots()
    for at, finding in enumerate(found.values()):
        scale = finding.half + finding.threshold
        x, colour = finding.mean / scale, COLOURS[finding.verdict]
        axes.errorbar(x, at, xerr=finding.half / scale, fmt="o", color=colour, capsize=3)
    papers = [claim.paper for claim in found]
    for at in range(1, count):
        if papers[at] != papers[at - 1]:
            axes.axhline(at - 0.5, color="#aaaaaa", linewidth=0.8)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=2)
    side = max(4.0, *(abs(value) for value in axes.get_xlim()))
    axes.set(xlim=(-side, side), ylim=(count - 0.5, -0.5))
    ticks = [tick for tick in (1, 2, 10, 100) if tick < side]
    axes.set_xticks([*(-tick for tick in ticks), 0, *ticks])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(count), [f"{claim.words}   {i}" for i, claim in enumerate(found, 1)])
    axes.set_xlabel("against the claim  <  difference over half its 95% interval  >  for the claim")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(count), [difference(*pair) for pair in found.items()])
    for verdict, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=verdict)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return report.saved(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[Claim, Finding]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the results")
    folder = parser.parse_args(argv).folder
    found = findings(folder)
    if not found:
        parser.error(f"{folder} holds no experiment with {FEWEST} seeds")
    text = markdown(found)
    write_atomically(folder / "cards.md", lambda file: file.write(text.encode()))
    print(text.partition("\n## ")[0], plot(found, folder / "cards.png"), sep="\n")
    return found


if __name__ == "__main__":
    main()
