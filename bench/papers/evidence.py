"""What a claim is measured by: differences of pairs, their interval, a verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import report
from .store import Store

# Student's t, two-sided 5%, by degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FEWEST = 3  # seeds, for a card

Values = dict[str, float]  # by seed


@dataclass(frozen=True)
class Finding:
    """`differences` by seed, above 0 where the claim holds; `sides` are what was compared."""

    differences: Values
    sides: Mapping[str, Values]
    threshold: float = 0.0  # what the interval must pass, on either side

    @property
    def seeds(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float:
        return statistics.mean(self.differences.values())

    @property
    def half(self) -> float:
        """Half the 95% interval of the mean."""
        count = self.seeds
        if not 2 <= count <= len(T95) + 1:
            raise ValueError(f"intervals are known for 2 to {len(T95) + 1} seeds, given {count}")
        return T95[count - 2] * statistics.stdev(self.differences.values()) / count**0.5

    @property
    def verdict(self) -> str:
        if self.mean - self.half > self.threshold:
            return "confirmed"
        return "contradicted" if self.mean + self.half < -self.threshold else "not resolved"


@dataclass(frozen=True)
class Claim:
    """What a paper says and how a file of results answers it: the first of `stores` that can."""

    paper: str
    words: str
    asked: str  # the difference, in words
    stores: tuple[str, ...]
    measure: Callable[[Store], Finding]
    unit: str = " points"  # of per cent
    needs: tuple[str, ...] = ("",)  # the arms that must be complete, as regular expressions


# --- values by seed ---


def less(a: Values, b: Values) -> Values:
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def mean(*parts: Values) -> Values:
    """Of the parts, for each seed that all of them have."""
    seeds = [seed for seed in parts[0] if all(seed in part for part in parts)]
    return {seed: statistics.mean(part[seed] for part in parts) for seed in seeds}


def best(sides: Mapping[str, Values], key: Callable[[float], float] = float) -> str:
    """The side of the highest mean."""
    return max(sides, key=lambda side: key(statistics.mean(sides[side].values())))


def least(sides: Mapping[str, Values]) -> str:
    return best(sides, lambda value: -value)


def test_error(store: Store, arm: str) -> Values:
    return store.by_seed(arm, lambda run: 100 * run["final"]["test_error"])


def accuracy(store: Store, arm: str) -> Values:
    return {seed: 100 - error for seed, error in test_error(store, arm).items()}


def words(values: Values, digits: int = 2) -> str:
    return report.mean_std(list(values.values()), digits)


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    return statistics.correlation(ranks(a), ranks(b))
