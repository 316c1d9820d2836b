"""What docs say of figures: each choice has its card, promises come from committed files."""

from __future__ import annotations

import json
from pathlib import Path

import bench_packages  # noqa: F401
import pytest

from bench import demo, plot_angle, promises
from bench.papers import digits
from bench.promise_figures import Spread
from bench.record import Result

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not the source tree")


def test_each_line_of_the_choice_has_its_card_or_says_that_there_is_none() -> None:
    lines = (ROOT / "docs/choosing.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert all("](../bench/papers/results/" in row or "no figures" in row for row in rows)


# --- promises ---


def spreads(*values: tuple[float, float, float]) -> dict[str, Spread]:
    return {str(i): Spread(*value) for i, value in enumerate(values)}


def test_a_promise_is_kept_by_all_figures_and_broken_by_one() -> None:
    promise = promises.Promise("at most 1", "none", 1.0, lambda content: {})
    assert promise.verdict(spreads((0.8, 0.9, 1.0), (0.1, 0.2, 0.3))) == "kept"
    assert promise.verdict(spreads((0.8, 0.9, 1.1), (0.1, 0.2, 0.3))) == "not resolved"
    assert promise.verdict(spreads((1.1, 1.2, 1.3), (0.1, 0.2, 0.3))) == "broken"


def test_the_page_of_promises_is_what_the_committed_results_say() -> None:
    folder = ROOT / "bench/results"
    assert (folder / "promises.md").read_text() == promises.markdown(promises.cards(folder))


def test_promises_without_results_are_an_error(tmp_path: Path) -> None:
    promise = promises.Promise("never measured", "steps", 1.0, lambda content: {})
    with pytest.raises(ValueError, match=r"steps\.json: not a results file"):
        promises.cards(tmp_path, [promise])
    (tmp_path / "steps.json").write_text(json.dumps({"machine": {}}))
    with pytest.raises(ValueError, match="has no figure for: never measured"):
        promises.cards(tmp_path, [promise])


def test_promises_are_drawn(tmp_path: Path) -> None:
    path = promises.plot(promises.cards(ROOT / "bench/results"), tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_the_angle_is_drawn(tmp_path: Path) -> None:
    assert plot_angle.plot(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- digits ---


def test_runs_of_the_demo_become_a_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        digits.collect(tmp_path, tmp_path)
    for title, optimizer, rules in demo.PLAN:
        for rule in rules:
            for seed in (0, 1):
                config = {"scaling": "standard", "optimizer": optimizer, "rule": rule}
                config |= {"lr": 0.1, "seed": seed, "folder": None}
                error = 0.01 * (1 + seed) + 0.1 * (rule == "none")
                Result(f"{title}-{rule}-{seed}", config, {"test_error": error}).save(tmp_path)
    store = digits.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert len(store.arms) == sum(len(rules) for _, _, rules in demo.PLAN)
    assert store.last("SGD + layca") == pytest.approx([1.0, 2.0])
    assert store.last("SGD") == pytest.approx([11.0, 12.0])
    assert "| SGD + layca" in (tmp_path / "out/digits.md").read_text()
