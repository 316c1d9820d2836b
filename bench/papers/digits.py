"""README's table of scikit-learn's digits as a store, so that it gets cards as the papers do.

``python -m bench.demo --no-bench --out demo-out`` trains; ``python -m bench.papers.digits
demo-out/runs --out bench/papers/results`` collects its runs, and trains nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from bench import demo
from bench.record import Result, write_atomically

from . import report
from .store import Store

NOTES = (
    "Bare: the best of nine rates on a held-out part of the train set. Singh: its bare twin's "
    "rate. Layca: its authors', untuned."
)


FREE = ("seed", "folder", "device", "threads", "checkpoint_every")


def collect(runs: Path, out: Path) -> Store:
    """Every run of the demo's plan that lies in `runs`."""
    found = [Result.load(path) for path in sorted(runs.glob("*.json"))]
    if not found:
        raise ValueError(f"{runs} holds no run of bench.demo")
    about = {
        "experiment": "digits",
        "network": "a small convolutional network",
        "notes": NOTES,
        "data": {"scaling": found[0].config["scaling"]},
    }
    store, pairs = Store.open(out / "digits.json", about), []
    for arm, optimizer, rule in _plan():
        for result in found:
            config = result.config
            if (config["optimizer"], config["rule"]) == (optimizer, rule):
                store.add_arm(arm, {key: config[key] for key in config if key not in FREE})
                pairs.append((arm, config["seed"], result))
    store.add(*pairs)
    return store


def _plan() -> list[tuple[str, str, str]]:
    """Arm, optimizer, rule."""
    return [
        (demo.label(title, rule), optimizer, rule)
        for title, optimizer, rules in demo.PLAN
        for rule in rules
    ]


def table(store: Store) -> Table:
    rows = [
        [arm, f"{store.settings(arm)['lr']:.3g}", report.mean_std(store.last(arm))]
        for arm in store.arms
    ]
    return report.table_of(["", "rate", "test error, %"], rows, NOTES.rstrip("."))


def plot(store: Store, path: Path) -> Path:
    groups = {
        title: {"bare" if rule == "none" else rule: demo.label(title, rule) for rule in rules}
        for title, _, rules in demo.PLAN
    }
    return report.pairs(store, groups, path)


def main(argv: Sequence[str] | None = None) -> Store:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the demo's runs")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"), help="for what is written")
    options = parser.parse_args(argv)
    try:
        store = collect(options.runs, options.out)
    except ValueError as error:
        parser.error(str(error))
    text = report.markdown(table(store))
    write_atomically(store.path.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(text, plot(store, store.path.with_suffix(".png")), sep="\n")
    return store


if __name__ == "__main__":
    main()
