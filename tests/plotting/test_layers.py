"""Figures of layers that were trained again."""

import numpy as np

from plotting.layers import _carried_forward


def test_a_seed_that_stopped_keeps_its_last_accuracy_while_others_go_on():
    nan = np.nan
    values = np.array([[0.1, 0.7, nan, nan, nan], [0.2, 0.3, 0.9, 1.0, nan]])
    expected = [[0.1, 0.7, 0.7, 0.7, nan], [0.2, 0.3, 0.9, 1.0, nan]]
    assert np.array_equal(_carried_forward(values), expected, equal_nan=True)
    assert np.array_equal(_carried_forward(values[:1]), values[:1], equal_nan=True)
