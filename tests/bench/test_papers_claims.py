"""The papers' experiments: rates by time, and claims from result files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_packages  # noqa: F401
import pytest

from bench.papers import (
    by_time,
    cards,
    evidence,
    measures,
    runner,
)
from bench.papers.store import Store

pytestmark = pytest.mark.full("experiments")


# --- rates that are computed, by time ---


def timed(**arms: tuple[str, list[list[float]], float]) -> Store:
    """Rule, losses of each seed and seconds a step of each arm; a test every second step."""
    content: dict[str, object] = {"experiment": "timed", "arms": {}}
    for name, (rule, seeds, seconds) in arms.items():
        runs = {}
        for seed, losses in enumerate(seeds):
            final = {"diverged": losses[-1] is None, "test_error": 0.25, "step_ms": 1e3 * seconds}
            tests = [
                {"step": s, "seconds": s * seconds, "test_error": 0.25}
                for s in range(2, len(losses) + 1, 2)
            ]
            runs[str(seed)] = {
                "final": final | {"seconds": len(losses) * seconds},
                "records": tests,
                "losses": {"step": list(range(1, len(losses) + 1)), "loss": losses},
            }
        title = name.replace("_", ", ").replace("PLUS", " + ")
        settings = {"rule": rule, "optimizer": "momentum", "steps": 4}
        content["arms"][title] = {"settings": settings, "runs": runs}
    return Store(Path("timed.json"), content)


TIMED = timed(
    SGD_low=("none", [[8.0, 7, 6, 5], [8.0, 7, 6, 7]], 1.0),
    SGD_high=("none", [[8.0, 6, 4, 3], [8.0, 6, 4, 3]], 1.0),
    SGD_wild=("none", [[8.0, 2, 1, 1], [8.0, None]], 1.0),
    SGDPLUScurvature=("curvature", [[8.0, 4, 2, 1]], 2.0),
)


def test_train_loss_by_steps_and_in_the_time_of_sgd() -> None:
    table = by_time.table(TIMED)
    lines = [
        [c.strip() for c in r.split("|")[1:-1]] for r in runner.report.markdown(table).split("\n")
    ]
    header, low, high, wild, ruled = (lines[i] for i in (2, 4, 5, 6, 7))
    assert header[2:] == [
        *(f"step {i}" for i in (1, 2, 3, 4)),
        *("in SGD's time", "test error, %", "s a step", "of SGD's"),
    ]
    assert low[:2] == ["SGD, low", "2"] and low[5:] == [
        *("6 ± 1.4", "6 ± 1.4", "25.00 ± 0.00", "1", "1.00")
    ]
    assert high[5] == "3 ± 0"
    assert wild[0] == "SGD, wild (1 of 2 diverged)" and wild[2:6] == ["8", "2", "1", "1"]
    # Two of its steps in the four seconds that SGD takes for four.
    assert ruled == ["SGD + curvature", "1", "8", "4", "2", "1", "4", "25.00", "2", "2.00"]


def test_the_best_fixed_rate_diverges_in_no_seed() -> None:
    arms = by_time.fixed(TIMED, TIMED.arms)
    assert arms == ["SGD, low", "SGD, high", "SGD, wild"]
    assert by_time.best(TIMED, arms) == "SGD, high"
    assert by_time.best(TIMED, ["SGD, wild"]) is None


def test_times_are_those_of_the_nearest_tests() -> None:
    run = {
        "losses": {"step": [1, 2, 3, 4]},
        "records": [{"step": 2, "seconds": 6.0}, {"step": 4, "seconds": 7.0}],
    }
    assert by_time.seconds_of(run) == [3, 6, 6.5, 7]


def test_fixed_rates_are_grey_but_for_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[object] = []
    monkeypatch.setattr(runner.report, "saved", lambda figure, path: figures.append(figure) or path)
    assert by_time.plot(TIMED, tmp_path) == tmp_path
    left, middle, right = figures[0].axes
    lines = {line.get_label(): line for line in left.lines}
    assert sum(line.get_color() == by_time.GREY for line in left.lines) == 2
    assert {name for name in lines if not name.startswith("_")} == {
        *("SGD, high", "SGD + curvature", "other fixed rates")
    }
    assert lines["SGD, high"].get_ydata().tolist() == [8, 6, 4, 3]
    times = [line.get_xdata() for line in middle.lines if line.get_label() == "SGD + curvature"]
    assert list(times[0]) == [2, 4, 6, 8]
    assert [line.get_label() for line in right.lines] == ["SGD, high", "SGD + curvature"]
    # Nothing but a diverged arm, nothing bare to compare with.
    for store in (
        timed(SGD_wild=("none", [[8.0, None]], 1.0)),
        timed(SGDPLUScurvature=("curvature", [[8.0, 4]], 1.0)),
    ):
        by_time.plot(store, tmp_path)
        assert "-" in runner.report.markdown(by_time.table(store))


# --- claim cards ---


def finding(*differences: float, threshold: float = 0.0) -> evidence.Finding:
    values = {str(seed): value for seed, value in enumerate(differences)}
    return evidence.Finding(values, {"ours": values}, threshold)


def test_a_verdict_needs_an_interval_on_one_side() -> None:
    assert finding(1, 2, 3).half == pytest.approx(4.303 / 3**0.5)  # t of 2 degrees of freedom
    assert finding(1, 2, 3).verdict == "not resolved"
    assert finding(2, 2.1, 1.9).verdict == "confirmed"
    assert finding(-2, -2.1, -1.9).verdict == "contradicted"
    assert finding(0.5, 0.51, 0.49, threshold=0.6).verdict == "not resolved"
    assert finding(0.9, 0.91, 0.89, threshold=0.6).verdict == "confirmed"
    assert finding(-0.9, -0.91, -0.89, threshold=0.6).verdict == "contradicted"
    with pytest.raises(ValueError, match="2 to 10 seeds, given 1"):
        finding(1).half  # noqa: B018


def test_values_are_paired_by_seed() -> None:
    a, b = {"0": 1.0, "1": 5.0}, {"1": 2.0, "2": 9.0}
    assert evidence.less(a, b) == {"1": 3.0} and evidence.mean(a, b) == {"1": 3.5}
    assert evidence.best({"a": a, "b": b}) == "b" and evidence.least({"a": a, "b": b}) == "a"
    assert evidence.ranks([3, 1, 3, 7]) == [2.5, 1, 2.5, 4]
    assert evidence.rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)


def answered(errors: dict[str, float], seeds: int = 3) -> Store:
    """Arms and their test errors, a little different for each seed."""
    arms = {}
    for arm, error in errors.items():
        runs = {}
        for seed in range(seeds):
            value = error + 0.001 * seed * (1 + error)
            runs[str(seed)] = {
                "final": {"test_error": value, "diverged": False},
                "records": [{"step": s, "seconds": s, "test_error": value} for s in (600, 700)],
                "losses": {"step": [1], "loss": [value]},
                "rotation": {"names": ["a", "b"], "steps": [9], "distance": [[value, 0.0]]},
            }
        rule = "curvature" if "curvature" in arm else "none"
        alpha = float(arm.rpartition(" ")[2]) if "alpha" in arm else 0.0
        arms[arm] = {
            "settings": {"rule": rule, "alpha": alpha, "batch": 32, "steps": 9},
            "runs": runs,
        }
    return Store(Path("answered.json"), {"experiment": "answered", "network": "none", "arms": arms})


def mean_of(measure: Callable[[Store], evidence.Finding], errors: dict[str, float]) -> float:
    return measure(answered(errors)).mean


def test_claims_are_differences_of_what_they_name() -> None:
    close = partial(pytest.approx, abs=0.3)
    alphas = {"Layca, alpha -0.3": 0.3, "Layca, alpha 0": 0.2, "Layca, alpha 0.6": 0.5}
    alphas |= {"SGD, alpha -0.3": 0.25, "SGD, alpha 0": 0.4, "SGD, alpha 0.6": 0.45}
    assert mean_of(measures.uniform_is_best, alphas) == close(10)
    assert mean_of(measures.first_layers_before_last, alphas) == close(20)
    assert mean_of(measures.sgd_has_no_such_pattern, alphas) == close(15)
    assert mean_of(measures.layca_before_sgd, alphas) == close(5)
    # The rotation made up above grows with the error.
    assert mean_of(measures.rotation_goes_with_accuracy, alphas) == pytest.approx(-1)
    toy = {f"{t}, layer {n}": n / 20 for t in ("SGD", "Layca") for n in (1, 10)}
    assert mean_of(measures.shallow_before_deep, toy) == close(45)
    assert mean_of(measures.deep_before_shallow, toy) == close(-45)
    table = {"SGD": 0.2, "SGD + singh": 0.1, "NAG": 0.3, "NAG + singh": 0.1}
    assert mean_of(measures.singh, table) == mean_of(measures.singh_table, table) == close(15)
    bare = {"SGD": 0.1, "SGD, no weight decay": 0.15}
    bare |= dict(zip(measures.ADAPTIVE, (0.2, 0.3, 0.4), strict=True))
    bare |= {f"{name} + Layca": 0.1 for name in ("SGD", *measures.ADAPTIVE)}
    assert mean_of(measures.adaptive_methods_lose, bare) == close(20)
    assert mean_of(measures.layca_makes_up_for_it, bare) == close(20)
    assert mean_of(measures.sgd_needs_decay, bare) == close(5)
    curved = {"SGD, rate 1": 0.5, "SGD, rate 2": 0.4, "SGD + curvature, hessian": 0.2}
    loss = measures.train_loss("SGD", "hessian")
    assert mean_of(loss, curved) == pytest.approx(0.69, abs=0.01)
    assert mean_of(measures.generalisation("SGD", "hessian"), curved) == close(20)
    rates = {"SGD, rate 1": 0.5, "SGD, rate 2": 0.4, "SGD + probe, rate 1": 0.3}
    assert mean_of(measures.backmatching("probe"), rates) == close(10)


def test_cards_are_made_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cards.main([str(tmp_path)])
    assert "no experiment with 3 seeds" in capsys.readouterr().err
    layers = {f"{t}, layer {n}": n / 20 for t in ("SGD", "Layca") for n in (1, 10)}
    for name, seeds in (("layca_toy_cpu", 3), ("layca_toy_frozen_cpu", 3), ("singh_mnist", 2)):
        content = answered(layers, seeds).content
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = cards.main([str(tmp_path)])
    assert [card.finding.verdict for card in found] == ["confirmed", "contradicted"]
    text = (tmp_path / "cards.md").read_text()
    assert "| **contradicted** |" in text and "![layca_toy_cpu](layca_toy_cpu.png)" in text
    assert "- consistently better than SGD" in text.partition("## Without a card")[2]
    assert (tmp_path / "cards.png").read_bytes().startswith(b"\x89PNG")
    # An arm that lacks a seed keeps the card back.
    content["arms"]["SGD, layer 1"]["runs"].popitem()
    assert not Store(Path(), content).complete(1)
