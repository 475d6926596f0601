"""Published scores of every training example; of each, higher means more memorized.

Every function takes what a training recorded after each epoch (arrays [epochs, n]) and returns one
number per example, float64 [n], nan where an epoch was not recorded. Scores that are published the
other way round (confidence, area under the margin) are negated. docs/measurements.md says where the
papers and their code differ.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from engine.stats import mean_ranks

DISTANCES = 2**24  # numbers that the distances of one block of queries may take: 64 MB


# ---------------------------------------------------------------- from the record of a training


def forgetting_events(correct: np.ndarray) -> np.ndarray:
    """Count the epochs after which a correct example is wrong (Toneva et al., 2019).

    An example that is never correct counts as many events as there are epochs, as in their code.
    """
    events = (correct[:-1] & ~correct[1:]).sum(axis=0)
    return np.where(correct.any(axis=0), events, len(correct)).astype(float)


def summed_loss(loss: np.ndarray) -> np.ndarray:
    """Sum the loss over epochs: the cumulative sample loss, CSL (Ravikumar et al., 2025)."""
    return loss.sum(axis=0, dtype=float)


def area_under_margin(margin: np.ndarray) -> np.ndarray:
    """Average the margin over epochs, negated (AUM; Pleiss et al., 2020).

    The margin is the trained label's logit minus the largest other logit.
    """
    return -margin.mean(axis=0, dtype=float)


def el2n(error_norm: np.ndarray, epoch: int) -> np.ndarray:
    """Take the error norm after one early epoch, counted from 1 (EL2N; Paul et al., 2021)."""
    return error_norm[epoch - 1].astype(float)


def confidence(loss: np.ndarray) -> np.ndarray:
    """Average the trained label's probability over epochs, negated (Swayamdipta et al., 2020)."""
    return -np.exp(-loss.astype(float)).mean(axis=0)


def variability(loss: np.ndarray) -> np.ndarray:
    """Return the standard deviation over epochs of the trained label's probability (ibid.)."""
    return np.exp(-loss.astype(float)).std(axis=0)


# ---------------------------------------------------------------- prediction depth


def neighbour_votes(features: Tensor, label: Tensor, k: int, classes: int) -> Tensor:
    """Predict each row's class [n] by its k nearest other rows in Euclidean distance.

    The row itself is left out. A tie of votes goes to the lowest class. Distances are computed a
    block of rows at a time.
    """
    n = len(features)
    # Distances do not change, and their rounding shrinks with the norms.
    features = features - features.mean(dim=0)
    squares = features.square().sum(dim=1)
    k, votes = min(k, n - 1), []
    for rows in torch.arange(n, device=features.device).split(max(1, DISTANCES // n)):
        # A row's own square is the same for all its neighbours.
        distance = squares - 2 * features[rows] @ features.T
        distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        near = label[distance.topk(k, dim=1, largest=False, sorted=False).indices]
        counts = torch.zeros(len(rows), classes, device=rows.device)
        votes.append(counts.scatter_add_(1, near, torch.ones_like(near, dtype=counts.dtype)))
    return torch.cat(votes).argmax(dim=1)


def depth_of_agreement(votes: Iterable[Tensor], prediction: Tensor) -> np.ndarray:
    """Return the first stage from which on every vote is the network's prediction.

    Stages count from 0, the input. Without agreement at the last stage the depth is their number.
    """
    agree = torch.stack([vote == prediction for vote in votes]).cpu().numpy()
    stages = len(agree)
    return np.where(agree.all(axis=0), 0, stages - agree[::-1].argmin(axis=0)).astype(float)


# ---------------------------------------------------------------- what one score adds to another


def summed_ranks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Combine two scores without fitting anything: the sum of their ranks."""
    return mean_ranks(x) + mean_ranks(y)


def partial_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Return Spearman's rank correlation of x and y with the ranks of a third held fixed.

    nan where one of the three is constant, or where the third decides one of the others.
    """
    ranks = np.stack([mean_ranks(values) for values in (x, y, given)])
    if ranks.shape[1] == 0 or (np.ptp(ranks, axis=1) == 0).any():
        return np.nan
    (_, xy, xz), (_, _, yz), _ = np.corrcoef(ranks)
    left = (1 - xz**2) * (1 - yz**2)
    return float((xy - xz * yz) / np.sqrt(left)) if left > 1e-12 else np.nan
