"""The differences that answer the papers' claims, as README.md states them beforehand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from . import by_time, curvature_line, layca_toy, singh_mnist
from . import char_gpt_report as gpt
from .by_time import Run
from .evidence import (
    Finding,
    Values,
    accuracy,
    best,
    least,
    less,
    mean,
    rank_correlation,
    test_error,
)
from .store import Store

Measure = Callable[[Store], Finding]

# --- Singh et al. ---


def singh(store: Store) -> Finding:
    """Bare less ruled, at the end."""
    bare, ruled = (
        mean(*(test_error(store, title + suffix) for title in _directions(store)))
        for suffix in ("", " + singh")
    )
    return _finding("bare", bare, "singh", ruled)


def singh_table(store: Store) -> Finding:
    """Bare less ruled, over the points of the paper's table."""
    asked = set(singh_mnist.PAPER["SGD"])

    def error(run: Run) -> float:
        tests = [test["test_error"] for test in run["records"] if test["step"] in asked]
        return 100 * statistics.mean(tests)

    bare, ruled = (
        mean(*(store.by_seed(title + suffix, error) for title in _directions(store)))
        for suffix in ("", " + singh")
    )
    return _finding("bare", bare, "singh", ruled)


def singh_on(title: str) -> Measure:
    """Test error of one optimizer at the end: bare less ruled."""

    def measure(store: Store) -> Finding:
        ruled = f"{title} + singh"
        return _finding(title, test_error(store, title), ruled, test_error(store, ruled))

    return measure


def _directions(store: Store) -> list[str]:
    return [title for title in singh_mnist.DIRECTIONS if title in store.arms]


def on_digits(rule: str, *titles: str) -> Measure:
    """Test error of README's table, mean over the optimizers: bare less ruled."""

    def measure(store: Store) -> Finding:
        bare, ruled = (
            mean(*(test_error(store, title + suffix) for title in titles))
            for suffix in ("", f" + {rule}")
        )
        return _finding("bare", bare, rule, ruled)

    return measure


# --- Layca ---


def _by_alpha(store: Store, title: str) -> dict[str, Values]:
    """Arm -> accuracies."""
    return {arm: accuracy(store, arm) for arm in store.arms if arm.startswith(f"{title}, ")}


def uniform_is_best(store: Store) -> Finding:
    sides = _by_alpha(store, "Layca")
    uniform = sides.pop("Layca, alpha 0")
    other = best(sides)
    return _finding("alpha 0", uniform, other.partition(", ")[2], sides[other])


def first_layers_before_last(store: Store) -> Finding:
    sides = {store.settings(arm)["alpha"]: v for arm, v in _by_alpha(store, "Layca").items()}
    first = mean(*(values for alpha, values in sides.items() if alpha < 0))
    last = mean(*(values for alpha, values in sides.items() if alpha > 0))
    return _finding("alpha < 0", first, "alpha > 0", last)


def sgd_has_no_such_pattern(store: Store) -> Finding:
    sides = _by_alpha(store, "SGD")
    uniform = sides.pop("SGD, alpha 0")
    other = best(sides)
    return _finding(other.partition(", ")[2], sides[other], "alpha 0", uniform)


def layca_before_sgd(store: Store) -> Finding:
    layca, sgd = _by_alpha(store, "Layca"), _by_alpha(store, "SGD")
    a, b = best(layca), best(sgd)
    return _finding(a, layca[a], b, sgd[b])


def rotation_goes_with_accuracy(store: Store) -> Finding:
    turned = {arm: store.by_seed(arm, _turned) for arm in store.arms}
    right = {arm: accuracy(store, arm) for arm in store.arms}
    seeds = mean(*turned.values(), *right.values())
    correlations = {
        seed: rank_correlation(
            [turned[arm][seed] for arm in store.arms], [right[arm][seed] for arm in store.arms]
        )
        for seed in seeds
    }
    return Finding(correlations, {"rank correlation": correlations}, threshold=0.648)


def _turned(run: Run) -> float:
    """Mean cosine distance of the layers from their start, at the end."""
    return statistics.mean(run["rotation"]["distance"][-1])


def shallow_before_deep(store: Store) -> Finding:
    return _toy(store, 1, 10)


def deep_before_shallow(store: Store) -> Finding:
    return _toy(store, 10, 1)


def _toy(store: Store, ahead: int, behind: int) -> Finding:
    a, b = (
        mean(*(accuracy(store, f"{title}, layer {layer}") for title in layca_toy.RATES))
        for layer in (ahead, behind)
    )
    return _finding(f"layer {ahead}", a, f"layer {behind}", b)


ADAPTIVE = ("RMSprop", "Adagrad", "Adam")


def adaptive_methods_lose(store: Store) -> Finding:
    adaptive = mean(*(accuracy(store, title) for title in ADAPTIVE))
    return _finding("SGD", accuracy(store, "SGD"), "adaptive", adaptive)


def layca_makes_up_for_it(store: Store) -> Finding:
    bare = adaptive_methods_lose(store).differences
    adaptive = mean(*(accuracy(store, f"{title} + Layca") for title in ADAPTIVE))
    layca = less(accuracy(store, "SGD + Layca"), adaptive)
    return _finding("gap, bare", bare, "gap under Layca", layca)


def sgd_needs_decay(store: Store) -> Finding:
    without = accuracy(store, "SGD, no weight decay")
    return _finding("with decay", accuracy(store, "SGD"), "without", without)


# --- curvature, back-matching ---


def train_loss(direction: str, kind: str) -> Measure:
    """Logarithm of the final train loss: of the best fixed rate less that of the rule."""

    def measure(store: Store) -> Finding:
        fixed, ruled = _fixed_and_ruled(store, direction, kind)
        return _finding(fixed, _log_loss(store, fixed), ruled, _log_loss(store, ruled))

    return measure


def generalisation(direction: str, kind: str) -> Measure:
    """Test error of the fixed rate of the best test error less that of the rule."""

    def measure(store: Store) -> Finding:
        _, ruled = _fixed_and_ruled(store, direction, kind)
        arms = _fixed(store, direction)
        sides = {arm: test_error(store, arm) for arm in arms}
        chosen = least(sides)
        return _finding(chosen, sides[chosen], ruled, test_error(store, ruled))

    return measure


def minimum_along(arm: str) -> Measure:
    """Where the loss is least along the steps of a fixed rate, less where they end."""

    def measure(store: Store) -> Finding:
        found = store.by_seed(arm, curvature_line.second_half)
        ends = dict.fromkeys(found, 1.0)
        return _finding("the minimum at", found, "the step's end at", ends)

    return measure


def _fixed(store: Store, direction: str) -> list[str]:
    return [arm for arm in store.arms if arm.startswith(f"{direction}, rate")]


def _fixed_and_ruled(store: Store, direction: str, kind: str) -> tuple[str, str]:
    fixed = by_time.best(store, _fixed(store, direction))
    if fixed is None:
        raise ValueError(f"{store.path}: no fixed rate of {direction} that did not diverge")
    return fixed, f"{direction} + curvature, {kind}"


def _log_loss(store: Store, arm: str) -> Values:
    """Of the last stretch; a diverged run counts as if it had stayed in its first."""
    return store.by_seed(
        arm, lambda run: math.log(run["losses"]["loss"][0 if run["final"]["diverged"] else -1])
    )


def backmatching(estimator: str) -> Measure:
    """Test error of SGD less that of the rule, each at its best rate."""

    def measure(store: Store) -> Finding:
        found = []
        for kind in ("SGD", f"SGD + {estimator}"):
            sides = {a: test_error(store, a) for a in store.arms if a.startswith(f"{kind}, ")}
            arm = least(sides)
            found += [arm, sides[arm]]
        return _finding(*found)

    return measure


def _finding(a: str, ours: Values, b: str, theirs: Values) -> Finding:
    return Finding(less(ours, theirs), {a: ours, b: theirs})


# --- the language model ---


def language_model(title: str, against: str | None = None) -> Measure:
    """Loss at the best rate: of another family, or of AdamW, less the title's."""

    def measure(store: Store) -> Finding:
        found, other = gpt.families(store), against or gpt.adamw(store)
        sides = [(name, found[name][gpt.best_rate(found[name])]) for name in (other, title)]
        return _finding(*sides[0], *sides[1])

    return measure


def from_larger_norms(title: str, against: str) -> Measure:
    """Loss at the best rate and initial norms: of another family less the title's."""

    def measure(store: Store) -> Finding:
        found = gpt.families(store)
        sides = []
        for family in (against, title):
            curves = {name: found[name] for name in found if name.startswith(f"{family}, norms")}
            bests = {name: curve[gpt.best_rate(curve)] for name, curve in curves.items()}
            chosen = least(bests)
            sides += [chosen, bests[chosen]]
        return _finding(*sides)

    return measure


def valley(title: str) -> Measure:
    """Octaves of good rates, less AdamW's."""

    def measure(store: Store) -> Finding:
        found, names = gpt.families(store), (title, gpt.adamw(store))
        return _finding(*(part for name in names for part in (name, gpt.valley(found[name]))))

    return measure


def carries_over(title: str, against: str | None = None, place: int = 0) -> Measure:
    """What carrying the rate to other sizes costs AdamW, or another, less what it costs the title.

    ``place``: which of the other's rates is carried, the best one or the second best.
    """

    def measure(store: Store) -> Finding:
        other = against or gpt.adamw(store)
        sides = [(other, gpt.regrets(store, other, place)), (title, gpt.regrets(store, title))]
        return _finding(*sides[0], *sides[1])

    return measure
