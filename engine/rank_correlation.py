"""Whether two numbers of each example go together: Spearman's rank correlation, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.random_streams import random_stream
from engine.detection import INTERVAL, RESAMPLES


@dataclass(frozen=True)
class Correlation:
    """Of n examples, with its 95% interval."""

    n: int
    rho: float
    low: float
    high: float


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, with mean ranks for ties; nan where one of them is constant, or has no values."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[place.reshape(-1)]

    x, y = ranks(x), ranks(y)
    if len(x) == 0 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def compute_correlation(x: np.ndarray, y: np.ndarray, seed: int) -> Correlation:
    """Of the examples whose two numbers are finite.

    For the interval, examples are drawn again with replacement, as many as there are; a draw in
    which one of the numbers is constant has no correlation and is left out.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    n, rho = len(x), rank_correlation(x, y)
    if np.isnan(rho):
        return Correlation(n, rho, np.nan, np.nan)
    places = [np.unique(values, return_inverse=True)[1].reshape(-1) for values in (x, y)]
    draw = random_stream("rank correlation bootstrap", seed)
    drawn = (np.bincount(draw.integers(n, size=n), minlength=n) for _ in range(RESAMPLES))
    resampled = np.array([_resampled_correlation(places, times) for times in drawn])
    low, high = np.percentile(resampled[np.isfinite(resampled)], INTERVAL)
    return Correlation(n, rho, float(low), float(high))


def _resampled_correlation(places: Sequence[np.ndarray], times: np.ndarray) -> float:
    """The rank correlation where each example comes so many times.

    `places` are the examples' places among the different values: nothing is sorted again.
    """
    centered = []
    for place in places:
        counts = np.bincount(place, times)
        ranks = (counts.cumsum() - (counts - 1) / 2)[place]
        centered.append(ranks - (times.sum() + 1) / 2)
    x, y = centered
    spread = np.sqrt((times * x * x).sum() * (times * y * y).sum())
    return (times * x * y).sum() / spread if spread > 0 else np.nan
