"""Local random streams, one per purpose; no global generator is used."""

import numpy as np
import torch
from torch import Tensor


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """Return a generator decided by its purpose and by non-negative numbers (seed, epoch).

    The purpose separates equal seeds. Without it NumPy gives `[seed]` and `[seed, 0]` the same
    stream, so that the noisy examples of seed 0 would be the first batches of epoch 0.
    """
    return np.random.default_rng([*purpose.encode(), *numbers])


def draw_rows(n: int, count: int | None, purpose: str, *numbers: int) -> Tensor:
    """Draw `count` of n rows without replacement, in ascending order; None draws all rows."""
    order = random_stream(purpose, *numbers).permutation(n)
    return torch.from_numpy(order[:count]).sort().values
