"""Bytes between the two visits to an element, counted from the CUDA engine's schedule."""

from __future__ import annotations

import pytest

from bench import reuse_distance

ITEM = 8192  # elements, under a rule


@pytest.fixture(scope="module")
def rows():
    return reuse_distance.schedule([2 * ITEM, ITEM, 10], multiprocessors=1, distance=1)


def test_by_hand(rows):
    """A1 A2 B1; the second visits to A2, A1, as one item lies in between; to B; C1; to C."""
    assert rows[:, 0].tolist() == [ITEM, ITEM, ITEM, 10]
    assert rows[:, 1].tolist() == [ITEM, 2 * ITEM, 0, 0]  # first visits in between
    assert rows[:, 2].tolist() == [0, ITEM, 2 * ITEM, 0]  # second ones


def test_share_and_median_are_by_elements(rows):
    share, median = reuse_distance.near(rows, 16, 12, within=16 * ITEM + 1)
    assert share == pytest.approx((ITEM + 10) / (3 * ITEM + 10))
    assert median == 2 * ITEM * 12


def test_table(capsys):
    reuse_distance.main(["--models", "tiny128"])
    assert "tiny128" in capsys.readouterr().out
