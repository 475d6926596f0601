"""AUC, learning times and rank correlations against loops that spell them out."""

import math

import numpy as np
import pytest

from data.random_streams import random_stream
from engine.stats import (
    compute_area,
    compute_auc,
    compute_correlation,
    compute_detection,
    first_epoch_for_good,
    rank_correlation,
)


def slow_auc(positive, negative) -> float:
    won = 0.0
    for p in positive:
        for n in negative:
            won += 1.0 if p > n else 0.5 if p == n else 0.0
    return won / (len(positive) * len(negative))


@pytest.mark.parametrize("values", [2, 5, 1000])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (30, 50)])
def test_the_area_counts_pairs_and_halves_ties(values, sizes):
    draw = np.random.default_rng(values)
    positive, negative = (draw.integers(values, size=size).astype(float) for size in sizes)
    slow = slow_auc(positive, negative)
    assert compute_area(positive, negative, 0).auc == pytest.approx(slow)
    assert compute_auc(positive, negative) == pytest.approx(slow)
    assert math.isnan(compute_auc(positive, negative[:0]))


def test_examples_that_never_flip_count_as_the_longest():
    memorized, clean = np.array([2.0, 3.0, math.inf]), np.array([3.0, math.inf, math.inf])
    assert compute_area(-memorized, -clean, 0).auc == slow_auc(-memorized, -clean)


def test_known_areas():
    low, high = np.arange(10.0), np.arange(10.0, 20.0)
    assert vars(compute_area(high, low, 0)) == {"auc": 1, "low": 1, "high": 1}
    assert compute_area(low, high, 0).auc == 0
    assert compute_area(low, low, 0).auc == 0.5
    assert math.isnan(compute_area(low[:0], high, 0).auc)
    assert math.isnan(compute_area(low, high[:0], 0).auc)


def test_the_interval_is_that_of_a_plain_bootstrap():
    draw = np.random.default_rng(0)
    positive, negative = draw.normal(1, 1, 60), draw.normal(0, 1, 80)
    area = compute_area(positive, negative, seed=1)
    assert area == compute_area(positive, negative, seed=1)
    assert area != compute_area(positive, negative, seed=2)
    resampled = [slow_auc(draw.choice(positive, 60), draw.choice(negative, 80)) for _ in range(300)]
    expected = np.percentile(resampled, [2.5, 97.5])
    assert (area.low, area.high) == pytest.approx(tuple(expected), abs=0.03)
    assert area.low < area.auc < area.high


def test_a_row_for_each_method():
    memorized = np.array([True, False, True, False, False])
    scores = {"a": np.array([2.0, 1, 2, 1, 1]), "b": np.zeros(5)}
    rows = compute_detection(scores, memorized, "all", 0)
    assert [(row["method"], row["on"], row["auc"]) for row in rows] == [
        ("a", "all", 1.0), ("b", "all", 0.5),
    ]  # fmt: skip
    assert all((row["memorized"], row["clean"]) == (2, 3) for row in rows)


def test_first_epoch_from_which_it_stays():
    states = np.random.default_rng(3).random((6, 400)) < 0.7
    expected = []
    for column in states.T:
        epoch = 7
        while epoch > 1 and column[epoch - 2]:
            epoch -= 1
        expected.append(epoch)
    assert first_epoch_for_good(states).tolist() == expected
    assert set(expected) == set(range(1, 8))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [([1, 2, 3], [5, 6, 9], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 1, 2, 2], [1, 2, 1, 2], 0)],
)
def test_known_values(x, y, expected):
    assert rank_correlation(np.array(x), np.array(y)) == pytest.approx(expected)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3)))


@pytest.mark.parametrize("kinds", [3, 1000])
def test_the_interval_is_that_of_ranking_each_resample(kinds):
    """With many ties, and with hardly any."""
    draw = np.random.default_rng(1)
    x = draw.integers(kinds, size=25).astype(float)
    y = x + draw.integers(kinds, size=25)
    found, slow = compute_correlation(x, y, seed=4), []
    draw = random_stream("rank correlation bootstrap", 4)
    for _ in range(1000):
        rows = draw.integers(25, size=25)
        slow.append(rank_correlation(x[rows], y[rows]))
    assert found.n == 25
    assert found.rho == rank_correlation(x, y)
    assert (found.low, found.high) == pytest.approx(np.nanpercentile(slow, (2.5, 97.5)))
    assert found.low < found.rho < found.high


def test_what_is_not_finite_is_left_out():
    x, y = np.arange(6.0), np.array([0.0, 2, 1, np.nan, 4, 3])
    whole = compute_correlation(x[[0, 1, 2, 5]], y[[0, 1, 2, 5]], seed=0)
    assert compute_correlation(np.where(x == 4, np.inf, x), y, seed=0) == whole
    assert whole.n == 4


@pytest.mark.parametrize(("x", "y"), [([], []), ([1], [2]), ([1, 2, 3], [5, 5, 5])])
def test_nothing_to_rank_is_no_number(x, y):
    found = compute_correlation(np.array(x, float), np.array(y, float), seed=0)
    assert found.n == len(x)
    assert np.isnan([found.rho, found.low, found.high]).all()


def test_a_draw_without_a_correlation_is_left_out():
    """Every second draw of two examples takes one of them twice."""
    found = compute_correlation(np.array([1.0, 2]), np.array([3.0, 4]), seed=0)
    assert (found.rho, found.low, found.high) == pytest.approx((1, 1, 1))
