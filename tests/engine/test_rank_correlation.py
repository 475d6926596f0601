"""Rank correlations: known values, and intervals against ranking every resample anew."""

import numpy as np
import pytest

from data.random_streams import random_stream
from engine.rank_correlation import compute_correlation, rank_correlation


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
    """Of two examples, one is drawn twice every second time."""
    found = compute_correlation(np.array([1.0, 2]), np.array([3.0, 4]), seed=0)
    assert (found.rho, found.low, found.high) == pytest.approx((1, 1, 1))
