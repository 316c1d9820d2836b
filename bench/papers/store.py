"""What an experiment has measured so far: one JSON file, written whole after each run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import Result, finite, write_atomically

_POINTS = 100


class Store:
    """The file of an experiment.

    ``arms`` maps an arm's name to its ``settings`` and its ``runs`` by seed. A run has ``final``,
    ``records`` (a dict a test), ``losses`` (means of the mini-batch losses up to ``step``),
    ``rotation`` and ``rates`` as in `bench.record.Result`, and ``machine``, its place in
    ``machines``.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def open(cls, path: Path, about: dict[str, Any]) -> Store:
        """The store of an earlier run of the same experiment on the same data, or a new one."""
        about = _plain(about)
        if not path.exists():
            return cls(path, about | {"machines": [], "arms": {}})
        store = cls.load(path)
        for key in ("experiment", "data"):
            _same(path, "", {key: store.content.get(key)}, {key: about[key]})
        store.content |= about
        return store

    @classmethod
    def load(cls, path: Path) -> Store:
        try:
            content = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a results file: {error}") from error
        if not isinstance(content, dict) or not content.keys() >= {"experiment", "arms"}:
            raise ValueError(f"{path}: not a results file")
        return cls(path, content)

    def add_arm(self, arm: str, settings: dict[str, Any]) -> None:
        entry = self.content["arms"].setdefault(arm, {"settings": _plain(settings), "runs": {}})
        _same(self.path, f"{arm}: ", entry["settings"], _plain(settings))

    def has(self, arm: str, seed: int) -> bool:
        return str(seed) in self.content["arms"][arm]["runs"]

    def add(self, *runs: tuple[str, int, Result]) -> None:
        """Arm, seed and result of what has been run; the file is written once."""
        machines = self.content["machines"]
        for arm, seed, result in runs:
            if result.machine not in machines:
                machines.append(result.machine)
            self.content["arms"][arm]["runs"][str(seed)] = _plain(
                {
                    "final": result.final,
                    "records": result.records,
                    "losses": _means(result.losses),
                    "rotation": _thinned(result.rotation, "distance"),
                    "rates": _thinned(result.rates, "lr"),
                    "machine": machines.index(result.machine),
                }
            )
        text = json.dumps(self.content, indent=1, allow_nan=False)
        text = re.sub(r"\n {5,}|\n {4}(?=[]}])", " ", text)  # each run on one line
        write_atomically(self.path, lambda file: file.write(text.encode()))

    # --- what reports read ---

    @property
    def arms(self) -> list[str]:
        """Those that have been run."""
        return [arm for arm, entry in self.content["arms"].items() if entry["runs"]]

    def settings(self, arm: str) -> dict[str, Any]:
        return self.content["arms"][arm]["settings"]

    def runs(self, arm: str) -> list[dict[str, Any]]:
        """By seed, in whatever order they finished."""
        runs = self.content["arms"].get(arm, {"runs": {}})["runs"]
        return [runs[seed] for seed in sorted(runs, key=int)]

    def complete(self, seeds: int, needs: str = "") -> bool:
        """Whether every arm that matches has as many seeds, and none of them more than another."""
        arms = {arm: entry for arm, entry in self.content["arms"].items() if re.match(needs, arm)}
        counts = {len(entry["runs"]) for entry in arms.values()}
        return len(counts) == 1 and counts.pop() >= seeds

    def by_seed(self, arm: str, of: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        """Seed -> what `of` says of its run."""
        runs = self.content["arms"].get(arm, {"runs": {}})["runs"]
        return {seed: of(run) for seed, run in runs.items()}

    @property
    def metric(self) -> str:
        """The test error, or the loss of a task without."""
        return "test_error" if "test_error" in self.runs(self.arms[0])[0]["final"] else "test_loss"

    def series(self, arm: str) -> dict[int, list[float]]:
        """Step -> the metric of each seed then; in per cent where it is an error."""
        scale = 100 if self.metric == "test_error" else 1
        found: dict[int, list[float]] = {}
        for run in self.runs(arm):
            for record in run["records"]:
                if record[self.metric] is not None:
                    found.setdefault(record["step"], []).append(scale * record[self.metric])
        return dict(sorted(found.items()))

    def last(self, arm: str) -> list[float]:
        """The metric of each seed at its end."""
        scale = 100 if self.metric == "test_error" else 1
        finals = [run["final"].get(self.metric) for run in self.runs(arm)]
        return [scale * value for value in finals if value is not None]


def _same(path: Path, what: str, stored: dict[str, Any], ours: dict[str, Any]) -> None:
    for key in {**ours, **stored}:
        if stored.get(key) != ours.get(key):
            raise ValueError(
                f"{path} holds another experiment: {what}{key} was {stored.get(key)!r}, now "
                f"{ours.get(key)!r}: choose another --out"
            )


def _plain(value: Any) -> Any:
    """As it comes back from the file; six digits are plenty for curves."""
    value = finite(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _means(losses: list[float | None]) -> dict[str, list[Any]]:
    """Means over at most `_POINTS` stretches; of a diverged one None."""
    width = max(-(-len(losses) // _POINTS), 1)
    pieces = [losses[i : i + width] for i in range(0, len(losses), width)]
    means = [None if None in piece else sum(piece) / len(piece) for piece in pieces]  # type: ignore
    ends = [min((i + 1) * width, len(losses)) for i in range(len(pieces))]
    return {"step": ends, "loss": means}


def _thinned(curves: dict[str, Any], key: str) -> dict[str, Any]:
    if not curves:
        return {}
    every = max(-(-len(curves["steps"]) // _POINTS), 1)
    return curves | {"steps": curves["steps"][::every], key: curves[key][::every]}
