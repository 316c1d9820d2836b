"""What the documentation promises of times and messages, from the results that are committed.

``python -m bench.promises bench/results`` writes ``promises.md`` and ``promises.png`` into that
folder. A promise is *kept* where all its medians with their 20 and 80% quantiles are on the right
side of the limit, *broken* where one is wholly on the wrong side, *not resolved* else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.promise_figures import (
    ADAM,
    BARE,
    SGD,
    Figures,
    Spread,
    beside_peers,
    host,
    in_backward,
    in_backward_memory,
    messages,
    sharded,
    steps,
)
from bench.record import write_atomically

COLOURS = {"kept": "#009E73", "not resolved": "#888888", "broken": "#D55E00"}
INTRODUCTION = (
    "# What is promised of times and messages\n\n"
    "Written by `python -m bench.promises bench/results` from the JSON files beside it. Figures "
    "are medians over rounds, with their 20 and 80% quantiles in brackets; the worst one stands "
    "first. **Kept**: all of them within the limit, quantiles too. **Broken**: one of them wholly "
    "beyond it. **Not resolved**: else. The limits are the sentences of [the documentation]"
    "(../../docs/speed.md), written with the figures known: a verdict says whether their spread "
    "carries the sentence. What is said of training has [cards](../papers/results/cards.md).\n"
)
WITHOUT = (
    "## Without figures\n\n"
    "- several GPUs, NCCL, an H100: not reached "
    '([bench/README.md](../README.md), "Unverified on a GPU")\n'
    "- CUDA graphs with numbers that change between replays, `precision`, telemetry: on a GPU not "
    "measured, on a CPU emulated\n"
    "- the same bits on every grid, the same step on every engine, resumes: not figures but tests; "
    "on the H200 `bench.agree` and `bench.repeat` ([verdicts](h200_check_verdicts.txt))\n"
    "- bytes that a 16-bit weight costs under `precision`: by design, held by tests\n"
)


@dataclass(frozen=True)
class Promise:
    """`words` hold where each of the figures `of` a result is at most the limit."""

    words: str
    file: str
    limit: float
    of: Callable[[Any], Figures]
    note: str = ""

    def verdict(self, figures: Figures) -> str:
        if all(spread.high <= self.limit for spread in figures.values()):
            return "kept"
        broken = any(spread.low > self.limit for spread in figures.values())
        return "broken" if broken else "not resolved"


@dataclass(frozen=True)
class Card:
    promise: Promise
    figures: Figures
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return self.promise.verdict(self.figures)


# --- promises ---

PROMISES = (
    Promise(
        "on a CPU a layer-wise step takes at most 1.5 times torch's fused step",
        "step_time_cpu",
        1.5,
        steps((*SGD, *ADAM), "float32"),
    ),
    Promise(
        "on a CPU a step without a rule takes at most the time of torch's",
        "step_time_cpu",
        1.0,
        steps(BARE, "float32"),
    ),
    Promise(
        "on a CPU LARS and LAMB take at most half of the fastest peer's time",
        "step_time_cpu",
        0.5,
        beside_peers("float32"),
    ),
    Promise(
        "on a CPU, over 300 tiny tensors, a layer-wise step takes at most half of torch's time",
        "step_time_cpu",
        0.5,
        steps((*SGD, *ADAM), "float32", ("tiny300",)),
    ),
    Promise(
        "on an H200 a layer-wise step takes at most 1.4 times torch's fused step",
        "h200",
        1.4,
        steps((*SGD, *ADAM), "float32"),
    ),
    Promise(
        "on an H200 in bfloat16 at most 1.6 times",
        "h200",
        1.6,
        steps((*SGD, *ADAM), "bfloat16"),
        "State is float32 here and bfloat16 in torch's step.",
    ),
    Promise(
        "on an H200 a step without a rule takes at most the time of torch's",
        "h200",
        1.0,
        steps(BARE, "float32"),
    ),
    Promise(
        "on an H200 LARS and LAMB take at most half of the fastest peer's time",
        "h200",
        0.5,
        beside_peers("float32"),
    ),
    Promise(
        "on an H200 the host spends at most half of torch's time on 300 tiny tensors",
        "h200",
        0.5,
        host,
    ),
    Promise("a sharded step sends one message", "sharded_step_cpu", 1.0, messages),
    Promise(
        "a sharded step over 300 parameters takes at most 1.2 times torch's SGD",
        "sharded_step_cpu",
        1.2,
        sharded("300"),
        "torch's step sends nothing: over 60 parameters ours take 2.0 to 2.4 times its time, over "
        "one 8 to 10.",
    ),
    Promise(
        'a bfloat16 step with precision="master" takes at most 1.1 times torch\'s fused AdamW',
        "precision_cpu",
        1.1,
        steps(("layerlr AdamW None master",), "bfloat16"),
    ),
    Promise(
        "a step inside backward holds at most 0.6 of the plain loop's memory",
        "step_in_backward_cpu",
        0.6,
        in_backward_memory,
    ),
    Promise(
        "a step inside backward takes at most 1.05 times the plain loop's time",
        "step_in_backward_cpu",
        1.05,
        in_backward,
    ),
)


# --- the page ---


def cards(folder: Path, promises: Sequence[Promise] = PROMISES) -> list[Card]:
    """A card for each promise; a file that is missing, or has nothing of it, is an error."""
    found = []
    for promise in promises:
        path = folder / f"{promise.file}.json"
        try:
            content = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a results file: {error}") from error
        figures = promise.of(content)
        if not figures:
            raise ValueError(f"{path} has no figure for: {promise.words}")
        found.append(Card(promise, figures, content["machine"]))
    return found


def words(spread: Spread) -> str:
    low, median, high = spread
    return f"{median:.2f}" + (f" ({low:.2f} to {high:.2f})" if low != high else "")


def markdown(found: Sequence[Card]) -> str:
    lines = ["| promise | worst figure | verdict |", "|---|---|---|"]
    for number, card in enumerate(found, 1):
        worst = max(card.figures.values(), key=lambda spread: spread.high)
        lines.append(f"| {number}. {card.promise.words} | {words(worst)} | **{card.verdict}** |")
    parts = [INTRODUCTION, "\n".join(lines) + "\n", "![promises](promises.png)\n"]
    for number, card in enumerate(found, 1):
        promise, machine = card.promise, card.machine
        order = sorted(card.figures.items(), key=lambda item: -item[1].high)
        shown = "; ".join(f"{name} {words(spread)}" for name, spread in order)
        where = f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}"
        title = promise.words[0].upper() + promise.words[1:]
        note = f" {promise.note}" if promise.note else ""
        parts.append(
            f"## {number}. {title}\n\n**{card.verdict.capitalize()}**. {shown}.{note} "
            f"[{promise.file}.json]({promise.file}.json): {where}; `{machine['command']}`.\n"
        )
    return "\n".join([*parts, WITHOUT])


def plot(found: Sequence[Card], path: Path) -> Path:
    """Each figure over its promise's limit: what reaches beyond 1 is not kept."""
    figure = Figure(figsize=(12, 1.2 + 0.34 * len(found)), layout="constrained")
    axes = figure.subplots()
    for at, card in enumerate(found):
        colour, limit = COLOURS[card.verdict], card.promise.limit
        for low, median, high in card.figures.values():
            axes.plot([low / limit, high / limit], [at, at], color=colour, alpha=0.35, linewidth=2)
            axes.plot([median / limit], [at], "o", color=colour, markersize=4, alpha=0.8)
    axes.axvline(1, color="#444444", linewidth=0.8)
    labels = [f"{card.promise.words}   {number}" for number, card in enumerate(found, 1)]
    axes.set_yticks(range(len(found)), labels)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1.6)
    axes.set_xlabel("kept  <  each figure over the limit, median and 20 to 80%  >  broken")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    for verdict, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=verdict)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=110)
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.promises", description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path, help="folder of the results")
    return p


def main(argv: Sequence[str] | None = None) -> list[Card]:
    ours = parser()
    folder = ours.parse_args(argv).folder
    try:
        found = cards(folder)
    except ValueError as error:
        ours.error(str(error))
    text = markdown(found)
    write_atomically(folder / "promises.md", lambda file: file.write(text.encode()))
    print(text.partition("\n## ")[0], plot(found, folder / "promises.png"), sep="\n")
    return found


if __name__ == "__main__":
    main()
