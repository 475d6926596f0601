"""Scores of examples against cases computed by hand and loops that spell the definitions out."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from beyond import scores
from engine.stats import mean_ranks


def series(*epochs) -> np.ndarray:
    return np.array(epochs)


def slow_forgetting_events(correct) -> list[int]:
    found = []
    for example in range(correct.shape[1]):
        states = [bool(value) for value in correct[:, example]]
        if not any(states):
            found.append(len(states))
            continue
        found.append(sum(before and not after for before, after in pairwise(states)))
    return found


def slow_votes(features, label, k, classes) -> list[int]:
    found = []
    for i, own in enumerate(features.double()):
        distances = [
            (math.sqrt(((own - other.double()) ** 2).sum()), j)
            for j, other in enumerate(features)
            if j != i
        ]
        near = [int(label[j]) for _, j in sorted(distances)[:k]]
        found.append(max(range(classes), key=lambda c: (near.count(c), -c)))
    return found


def slow_depth(votes, prediction) -> list[int]:
    found = []
    for example, wanted in enumerate(prediction.tolist()):
        depth = len(votes)
        while depth > 0 and int(votes[depth - 1][example]) == wanted:
            depth -= 1
        found.append(depth)
    return found


# ---------------------------------------------------------------- from the record of a training


def test_forgetting_events_by_hand():
    correct = series([0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0]).astype(bool)
    assert scores.forgetting_events(correct).tolist() == [1, 2, 0, 4]


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_forgetting_events_against_a_loop(epochs):
    correct = np.random.default_rng(epochs).random((epochs, 50)) < 0.4
    assert scores.forgetting_events(correct).tolist() == slow_forgetting_events(correct)


def test_scores_by_hand():
    loss = series([np.log(2), 0.0], [np.log(4), 0.0]).astype(np.float32)
    assert scores.summed_loss(loss) == pytest.approx([np.log(8), 0])
    assert scores.confidence(loss) == pytest.approx([-(1 / 2 + 1 / 4) / 2, -1])
    assert scores.variability(loss) == pytest.approx([1 / 8, 0])
    margin = series([1.0, -2.0], [3.0, -4.0]).astype(np.float16)
    assert scores.area_under_margin(margin).tolist() == [-2, 3]
    norms = series([0.5, 1.25], [0.25, 1.0]).astype(np.float16)
    assert scores.el2n(norms, 1).tolist() == [0.5, 1.25]
    assert scores.el2n(norms, 2).tolist() == [0.25, 1.0]


def test_an_example_that_is_learned_late_scores_higher_by_every_score():
    """Two examples: the probability of the label rises early, or stays low for most of the time."""
    probability = np.stack([np.linspace(0.5, 0.99, 10), np.r_[np.full(8, 0.05), 0.6, 0.99]], axis=1)
    loss = -np.log(probability)
    margin = np.log(probability / (1 - probability))
    norms = (1 - probability) * np.sqrt(2)
    for found in (
        scores.forgetting_events(probability > 0.99),
        scores.summed_loss(loss),
        scores.area_under_margin(margin),
        scores.el2n(norms, 2),
        scores.confidence(loss),
        scores.variability(loss),
    ):
        assert found[1] >= found[0]
    assert scores.summed_loss(loss)[1] > scores.summed_loss(loss)[0]


def test_an_epoch_without_a_record_leaves_no_number():
    margin = series([np.nan, np.nan], [3.0, -4.0])
    assert np.isnan(scores.area_under_margin(margin)).all()
    assert np.isnan(scores.el2n(margin, 1)).all()
    assert not np.isnan(scores.el2n(margin, 2)).any()


def test_sums_do_not_stop_at_float16():
    loss = np.full((50, 1), 3000, dtype=np.float16)
    assert scores.summed_loss(loss).tolist() == [150_000]
    assert scores.area_under_margin(-loss).tolist() == [3000]


# ---------------------------------------------------------------- prediction depth


@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize("block", [2**24, 50])
def test_votes_against_brute_force(k, block, monkeypatch):
    monkeypatch.setattr(scores, "DISTANCES", block)  # 50: one row of distances at a time
    draw = torch.Generator().manual_seed(k)
    label = torch.randint(4, (40,), generator=draw)
    features = torch.randn(40, 6, generator=draw) + 100 + label[:, None]
    found = scores.neighbour_votes(features, label, k, 4)
    assert found.tolist() == slow_votes(features, label, k, 4)
    assert len(set(found.tolist())) > 1


def test_an_example_does_not_vote_for_itself():
    features = torch.tensor([[0.0], [0.1], [10.0], [10.1]])
    label = torch.tensor([0, 1, 0, 1])
    assert scores.neighbour_votes(features, label, 1, 2).tolist() == [1, 0, 1, 0]


def test_votes_of_all_others_where_there_are_fewer_than_k():
    features = torch.arange(3.0)[:, None]
    label = torch.tensor([0, 1, 1])
    assert scores.neighbour_votes(features, label, 30, 2).tolist() == [1, 0, 0]


def test_depth_by_hand():
    """Rows: the input and two stages. The last example never agrees at the end."""
    votes = [torch.tensor(row) for row in ([1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0])]
    prediction = torch.ones(4, dtype=torch.int64)
    assert scores.depth_of_agreement(votes, prediction).tolist() == [0, 2, 2, 3]


def test_depth_against_a_loop():
    draw = torch.Generator().manual_seed(0)
    votes = [torch.randint(2, (400,), generator=draw) for _ in range(5)]
    prediction = torch.randint(2, (400,), generator=draw)
    found = scores.depth_of_agreement(votes, prediction).tolist()
    assert found == slow_depth(votes, prediction)
    assert set(found) == set(range(6))


# ---------------------------------------------------------------- what one score adds to another


def test_ranks_share_ties():
    assert mean_ranks(np.array([3.0, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    assert scores.summed_ranks(np.array([1.0, 2]), np.array([5.0, 5])).tolist() == [2.5, 3.5]


def test_partial_correlation_against_residuals():
    """The correlation of what is left of both ranks after a line through those of the third."""
    draw = np.random.default_rng(0)
    given = draw.normal(size=200)
    x, y = given + draw.normal(size=200), given + draw.normal(size=200)
    ranks = [mean_ranks(values) for values in (x, y, given)]
    left = [r - np.polyval(np.polyfit(ranks[2], r, 1), ranks[2]) for r in ranks[:2]]
    expected = np.corrcoef(*left)[0, 1]
    assert scores.partial_correlation(x, y, given) == pytest.approx(expected)
    assert abs(expected) < 0.2 < np.corrcoef(x, y)[0, 1]


def test_partial_correlation_has_no_number_where_nothing_is_left():
    x, y = np.arange(5.0), np.array([1.0, 3, 2, 5, 4])
    assert math.isnan(scores.partial_correlation(x, y, x))
    assert math.isnan(scores.partial_correlation(x, np.ones(5), y))
    assert math.isnan(scores.partial_correlation(x[:0], x[:0], x[:0]))
