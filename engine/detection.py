"""Telling memorized from clean examples by one number each: ROC AUC, with bootstrap intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data.random_streams import random_stream

DETECTION_COLUMNS = ("method", "on", "memorized", "clean", "auc", "low", "high")
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Area:
    """The area under the ROC curve, and its 95% interval."""

    auc: float
    low: float
    high: float


def compute_area(positive: np.ndarray, negative: np.ndarray, seed: int) -> Area:
    """How often a positive score is the higher one of a random pair; ties count one half.

    For the interval, positive and negative examples are drawn again with replacement, each as many
    as there are. nan where either has no examples.
    """
    if not len(positive) or not len(negative):
        return Area(np.nan, np.nan, np.nan)
    values, place = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    places = np.split(place.reshape(-1), [len(positive)])

    def area(positive_place: np.ndarray, negative_place: np.ndarray) -> float:
        above, below = (
            np.bincount(p, minlength=len(values)) for p in (positive_place, negative_place)
        )
        pairs = above * (below.cumsum() - below / 2)
        return pairs.sum() / (len(positive_place) * len(negative_place))

    draw = random_stream("detection bootstrap", seed)
    resampled = [
        area(*(p[draw.integers(len(p), size=len(p))] for p in places)) for _ in range(RESAMPLES)
    ]
    return Area(float(area(*places)), *map(float, np.percentile(resampled, INTERVAL)))


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
    """Of a search's result; one that gave up counts as one more than the most that were allowed."""
    return row["neurons"] if row["flipped"] else max_neurons + 1


def first_epoch_for_good(states: np.ndarray) -> np.ndarray:
    """From which epoch on each example's state [epochs, n] stays true, counted from 1.

    One more than there are epochs where it is not true at the end.
    """
    epochs = len(states)
    since = states[::-1].argmin(axis=0)  # epochs at the end for which it was true
    return epochs + 1 - np.where(states.all(axis=0), epochs, since)
