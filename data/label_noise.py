"""Random label noise: wrong labels that a model can only memorize."""

import torch

from data.dataset import DataError
from data.random_streams import random_stream


def add_label_noise(
    label: torch.Tensor, rate: float, classes: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels with noise, and the examples with a wrong label (bool).

    Exactly round(rate * n) examples (halves go to the even number, as Python rounds), chosen
    without replacement, each get a class drawn uniformly from the wrong ones. With the same seed,
    the noise of a lower rate is contained in that of a higher one.
    """
    if not 0 <= rate <= 1:
        raise DataError(f"noise_rate is {rate}; allowed: from 0 to 1")
    if classes < 2 and rate > 0:
        raise DataError(f"label noise needs two classes or more, and there is {classes}")
    n = len(label)
    stream = random_stream("label noise", seed)
    chosen = torch.from_numpy(stream.permutation(n))[: round(rate * n)]
    memorized = torch.zeros(n, dtype=torch.bool)
    noisy_label = label.clone()
    if len(chosen):
        # A step of 1 to classes - 1 around the ring of classes never ends where it began.
        step = torch.from_numpy(stream.integers(1, classes, size=n))[: len(chosen)]
        noisy_label[chosen] = (label[chosen] + step) % classes
        memorized[chosen] = True
    return noisy_label, memorized
