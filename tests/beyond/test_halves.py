"""Counterfactual memorization: halves, counts, and two cases that were planted."""

import numpy as np
import pytest

from beyond.halves import Counts, draw_half


def test_halves_are_halves_and_differ():
    halves = [draw_half(101, 0, number) for number in range(200)]
    assert {int(half.sum()) for half in halves} == {50}
    assert len({half.tobytes() for half in halves}) == 200
    assert (draw_half(101, 0, 3) == halves[3]).all()
    assert (draw_half(101, 1, 3) != halves[3]).any()
    share = np.mean(halves, axis=0)
    assert abs(share - 50 / 101).max() < 5 * 0.5 / np.sqrt(200)


def test_counts_against_loops():
    draw = np.random.default_rng(0)
    halves, correct = draw.random((30, 12)) < 0.5, draw.random((30, 12)) < 0.7
    counts = Counts.zeros(12)
    for half, right in zip(halves, correct):
        counts.add(half, right)
    for example in range(12):
        inside = [bool(c) for h, c in zip(halves[:, example], correct[:, example]) if h]
        outside = [bool(c) for h, c in zip(halves[:, example], correct[:, example]) if not h]
        assert counts.trained_in[example] == len(inside)
        assert counts.trained_out[example] == len(outside)
        expected = sum(inside) / len(inside) - sum(outside) / len(outside)
        assert counts.memorization()[example] == pytest.approx(expected)


def test_without_a_training_on_both_sides_there_is_no_number():
    counts = Counts.zeros(2)
    counts.add(np.array([True, False]), np.array([True, True]))
    assert np.isnan(counts.memorization()).all()
    assert np.isnan(counts.standard_error()).all()


def test_the_standard_error_is_the_spread_of_repetitions():
    draw = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(400):
        counts = Counts.zeros(1)
        for number in range(60):
            inside = number % 2 == 0
            right = draw.random() < (0.9 if inside else 0.4)
            counts.add(np.array([inside]), np.array([right]))
        found.append(counts.memorization()[0])
        errors.append(counts.standard_error()[0])
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)


def test_a_certain_outcome_of_few_trainings_keeps_an_error():
    counts = Counts.zeros(1)
    for number in range(8):
        counts.add(np.array([number < 4]), np.array([number < 4]))
    assert counts.memorization()[0] == 1
    assert 0.1 < counts.standard_error()[0] < 0.5


def nearest(images: np.ndarray, label: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Predict labels by the nearest training example, as a network that memorizes all does."""
    distance = np.abs(images[:, None] - images[half][None])
    return label[half][distance.argmin(axis=1)] == label


def test_planted_cases():
    """One example whose label only it can teach, and one that has a duplicate beside it."""
    images = np.r_[np.arange(0.0, 10), np.arange(100.0, 110), 104.2]
    label = np.r_[np.zeros(10, dtype=int), np.ones(10, dtype=int), 2]
    images, label = np.repeat(images, 3)[: 60 + 1], np.repeat(label, 3)[: 60 + 1]
    counts = Counts.zeros(len(label))
    for number in range(200):
        half = draw_half(len(label), 0, number)
        counts.add(half, nearest(images, label, half))
    memorization = counts.memorization()
    assert memorization[60] == 1
    assert abs(memorization[0]) < 0.05
    assert counts.standard_error()[60] < 0.05
