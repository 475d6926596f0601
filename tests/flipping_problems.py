"""Small networks that learned their examples by heart, for the tests of the search."""

import copy
from functools import lru_cache

import torch
import torch.nn.functional as F

from data import Examples, normalize
from engine.flipping.cached_passes import ReferenceGradient
from engine.flipping.gates import Gates
from engine.flipping.search import Candidate, search
from models.folding import folded
from neuron_flipping import (
    noisy_copies,
)
from tests.slow_neurons import NOT_OURS, make

# Steps, learning rate and weight decay, such that examples flip with one to eight neurons.
FIT = {
    "resnet9": (150, 0.001, 0),
    "single_conv": (400, 0.01, 0.01),
    "vit_small": (60, 0.01, 0),
    "pre_activation": (400, 0.01, 0.001),
    "mixed": (200, 0.01, 0),
    "resnet18": (100, 0.002, 0),
}

EVERYTHING = 1e12  # bytes of memory: enough to keep everything


@lru_cache
def fitted(name: str) -> tuple:
    """A small model that learned 40 images: every second one of a pattern, the others by heart."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (40, 1, 20, 20), generator=generator, dtype=torch.uint8)
    label = torch.randint(3 if name in NOT_OURS else 10, (40,), generator=generator)
    patterns = torch.randint(256, (10, 1, 5, 5), generator=generator, dtype=torch.uint8)
    images[::2] = images[::2] // 4 + patterns.tile(1, 1, 4, 4)[label[::2]] // 4 * 3
    model = make(name)
    steps, rate, decay = FIT[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    for _ in range(steps):
        loss = F.cross_entropy(model(normalize(images)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    label[:20] = model(normalize(images[:20])).argmax(1)
    return model.double().requires_grad_(False), images, label


class Problem:
    """A small model, and examples that it predicts as they are labeled."""

    def __init__(self, name: str, count: int = 6, copies: int = 3):
        model, self.images, self.label = fitted(name)
        self.model = copy.deepcopy(model)
        clean = normalize(self.images).double()
        self.copies = torch.stack(
            [noisy_copies(image, i, 7, copies, 0.05) for i, image in enumerate(clean)]
        )
        self.reference = Examples(self.copies[28:], self.label[28:])
        self.examples = Examples(self.images, self.label)
        self.rows = range(count)

    def candidates(self):
        return (Candidate(row, self.label[row], self.copies[row]) for row in self.rows)

    def search(self, ablate, chunk, most, memory=EVERYTHING, **options):
        model = folded(self.model)  # as real searches do
        with Gates(model, ablate) as gates:
            reference = ReferenceGradient(model, gates, self.reference, memory)
            found = search(model, gates, reference, self.candidates(), chunk, most, **options)
            return {c.row: (c.closed, flipped) for c, flipped in found}
