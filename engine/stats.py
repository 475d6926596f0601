"""ROC areas and rank correlations of per-example numbers, with bootstrap intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.random_streams import random_stream

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Area:
    """The area under the ROC curve, and its 95% interval."""

    auc: float
    low: float
    high: float


def compute_area(positive: np.ndarray, negative: np.ndarray, seed: int) -> Area:
    """Return compute_auc and a bootstrap interval around it.

    For the interval, positive and negative examples are drawn again with replacement, each as many
    as there are. nan where either has no examples.
    """
    if not len(positive) or not len(negative):
        return Area(np.nan, np.nan, np.nan)
    places = _places(positive, negative)
    draw = random_stream("detection bootstrap", seed)
    resampled = [
        _share_above(*(p[draw.integers(len(p), size=len(p))] for p in places))
        for _ in range(RESAMPLES)
    ]
    return Area(_share_above(*places), *map(float, np.percentile(resampled, INTERVAL)))


def compute_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the share of pairs whose positive score is the higher one; ties count one half.

    nan where either has no examples.
    """
    if not len(positive) or not len(negative):
        return np.nan
    return _share_above(*_places(positive, negative))


def _places(positive: np.ndarray, negative: np.ndarray) -> list[np.ndarray]:
    """Return the rank of each score among the distinct scores of both."""
    _, place = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    return np.split(place.reshape(-1), [len(positive)])


def _share_above(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the share of pairs of ranks, from 0, in which the positive one is the higher."""
    ranks = max(positive.max(), negative.max()) + 1
    above, below = (np.bincount(places, minlength=ranks) for places in (positive, negative))
    pairs = above * (below.cumsum() - below / 2)
    return float(pairs.sum() / (len(positive) * len(negative)))


def compute_detection(
    scores: Mapping[str, np.ndarray], memorized: np.ndarray, on: str, seed: int
) -> list[dict[str, object]]:
    """A row for each method, whose scores are high for examples that it takes to be memorized."""
    rows = []
    for method, score in scores.items():
        area = compute_area(score[memorized], score[~memorized], seed)
        counts = {"memorized": int(memorized.sum()), "clean": int((~memorized).sum())}
        rows.append({"method": method, "on": on, **counts, **vars(area)})
    return rows


def count_neurons(row: Mapping[str, float], max_neurons: int) -> float:
    """Return the neurons of a search; one that gave up counts as one more than it was allowed."""
    return row["neurons"] if row["flipped"] else max_neurons + 1


def first_epoch_for_good(states: np.ndarray) -> np.ndarray:
    """Return the epoch, from 1, since which each example's state [epochs, n] stays true.

    One more than there are epochs where it is not true at the end.
    """
    epochs = len(states)
    since = states[::-1].argmin(axis=0)  # epochs at the end for which it was true
    return epochs + 1 - np.where(states.all(axis=0), epochs, since)


# ---------------------------------------------------------------- rank correlation


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of n examples, with its 95% interval."""

    n: int
    rho: float
    low: float
    high: float


def mean_ranks(values: Sequence[float]) -> np.ndarray:
    """Rank values from 1, ties at their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place.reshape(-1)]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, with mean ranks for ties; nan where one of them is constant, or has no values."""
    x, y = mean_ranks(x), mean_ranks(y)
    if len(x) == 0 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def compute_correlation(x: np.ndarray, y: np.ndarray, seed: int) -> Correlation:
    """Correlate the examples whose two numbers are finite.

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
