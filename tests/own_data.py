"""Arrays that make a valid file of one's own data, for tests to spoil."""

import numpy as np


def good_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8),
        "y_test": np.zeros(6, np.uint8),
        "noisy_label": np.arange(12, dtype=np.int32) % 2,
        "c_score": np.linspace(0, 1, 12, dtype=np.float32),
    }
