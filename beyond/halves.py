"""Counterfactual memorization (Feldman and Zhang, 2020): with an example, and without it.

An example is memorized as far as networks that trained on it predict its label more often than
networks that did not. Many networks, each trained on a random half of the training set, give both
accuracies of every example at once.
"""

from dataclasses import dataclass

import numpy as np

from data.random_streams import random_stream


def draw_half(n: int, seed: int, number: int) -> np.ndarray:
    """Draw half of n examples (rounded down) for a training, bool [n]."""
    order = random_stream("counterfactual half", seed, number).permutation(n)
    half = np.zeros(n, dtype=bool)
    half[order[: n // 2]] = True
    return half


@dataclass
class Counts:
    """Trainings with and without each example, and how many of them predict its label."""

    trained_in: np.ndarray  # int [n]
    trained_out: np.ndarray
    correct_in: np.ndarray
    correct_out: np.ndarray

    @classmethod
    def zeros(cls, n: int) -> "Counts":
        return cls(*(np.zeros(n, dtype=int) for _ in range(4)))

    def add(self, half: np.ndarray, correct: np.ndarray) -> None:
        """Count one training: the examples that it used (bool [n]), and those it predicts."""
        self.trained_in += half
        self.trained_out += ~half
        self.correct_in += half & correct
        self.correct_out += ~half & correct

    def memorization(self) -> np.ndarray:
        """Return accuracy with each example minus accuracy without; nan where one is unknown."""
        with np.errstate(invalid="ignore"):
            return self.correct_in / self.trained_in - self.correct_out / self.trained_out

    def standard_error(self) -> np.ndarray:
        """Return the standard error of the memorization; nan where that is nan.

        One success and one failure are added to both sides (Agresti and Caffo, 2000): an accuracy
        of 0 or 1 in a few trainings is no proof of certainty.
        """
        variance = np.zeros(len(self.trained_in))
        sides = ((self.correct_in, self.trained_in), (self.correct_out, self.trained_out))
        for correct, trained in sides:
            share = (correct + 1) / (trained + 2)
            variance += share * (1 - share) / (trained + 2)
        return np.where(np.isnan(self.memorization()), np.nan, np.sqrt(variance))
