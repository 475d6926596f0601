"""The examples that dropping memorization neurons forgets, counted by hand."""

import numpy as np
import pytest
import torch

from engine.training.build import load_split
from engine.training.evaluation import Outcome
from example_tied_dropout import (
    compute_typicality,
    forgotten_rows,
)


def test_forgotten_rows_by_hand(tiny):
    split = load_split(tiny())
    n = split.n
    right, loss = torch.ones(n, dtype=torch.bool), torch.arange(n).float()
    wrong = right.clone()
    wrong[[3, 5, 9]] = False
    split.memorized[:] = False
    split.memorized[5] = True
    outcomes = (Outcome(loss, correct, split.label) for correct in (right, wrong))
    assert forgotten_rows(split, *outcomes).tolist() == [9, 3]


def test_the_interval_of_a_difference_of_means():
    random = np.random.default_rng(0)
    forgotten, kept = random.normal(0.6, 0.2, 80), random.normal(0.8, 0.1, 900)
    found = compute_typicality(forgotten, kept)
    error = (forgotten.var() / 80 + kept.var() / 900) ** 0.5
    assert found["difference"] == pytest.approx(forgotten.mean() - kept.mean())
    assert found["low"] == pytest.approx(found["difference"] - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(found["difference"] + 1.96 * error, abs=0.15 * error)
    assert compute_typicality(forgotten, kept) == found
