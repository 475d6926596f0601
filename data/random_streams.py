"""Local random streams: every draw names what it is for, and nothing touches a global generator."""

import numpy as np


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """A generator that is decided by its purpose and by some non-negative numbers (seed, epoch).

    The purpose keeps equal seeds apart. Without it NumPy gives `[seed]` and `[seed, 0]` the same
    stream, so that the noisy examples of seed 0 would be the first batches of epoch 0.
    """
    return np.random.default_rng([*purpose.encode(), *numbers])
