"""Plant memory in one channel: the control in which the answer is a single place.

One channel is fine-tuned, with all other weights frozen, until a few chosen examples are predicted
as a new label. What a channel computes (its filter and its batch norm's scale and shift) and what
the next layer reads from it (one column of weights) are the channel's parameters. A localizer that
finds where a prediction is stored must rank that channel first for these examples.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.localizers import Examples
from models.dropout import examples

# The convolution whose output channel leaves a site of ResNet-9, and the weights that read it.
CHANNELS = {
    "conv1": ("conv1", "conv2.conv"),
    "conv2": ("conv2", "conv3.conv"),
    "residual1": ("conv4", "conv5.conv"),
    "conv5": ("conv5", "conv6.conv"),
    "residual2": ("conv7", "conv8.conv"),
    "conv8": ("conv8", "linear"),
}
LEARNING_RATE = 0.01
MOST_STEPS = 400
LEARNED = 0.1  # highest loss of a chosen example that counts as learned
HELD = 0.98  # accuracy on a batch of other examples that counts as held in place


def channel_masks(model: nn.Module, site: str, channel: int) -> dict[str, Tensor]:
    """Return for every parameter that belongs to the channel, which of its numbers do (bool)."""
    writes, reads = CHANNELS[site]
    rows = [f"{writes}.conv.weight", f"{writes}.bn.weight", f"{writes}.bn.bias"]
    found = {}
    for name in (*rows, f"{reads}.weight"):
        mask = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
        mask[channel if name in rows else (slice(None), channel)] = True
        found[name] = mask
    return found


@dataclass(frozen=True)
class Planting:
    """A network with one channel fine-tuned, and how far that went."""

    model: nn.Module
    steps: int
    learned: bool  # whether the chosen examples are learned, and the others held


def plant_channel(
    model: nn.Module,
    site: str,
    channel: int,
    chosen: Examples,
    keep: Iterator[Examples],
    most_steps: int = MOST_STEPS,
) -> Planting:
    """Fine-tune a copy of the model's channel until it gives the chosen examples their labels.

    Each step adds the loss on a batch of `keep`, whose examples must be predicted as labelled in
    the end. Batch norms stay in eval mode, so that no running statistic moves.
    """
    planted = copy.deepcopy(model).eval().requires_grad_(False)
    masks = channel_masks(planted, site, channel)
    weights = {name: planted.get_parameter(name).requires_grad_() for name in masks}
    optimizer = torch.optim.Adam(weights.values(), lr=LEARNING_RATE)
    for step in range(most_steps + 1):
        batch = next(keep)
        with examples(planted, chosen.index):
            loss = F.cross_entropy(planted(chosen.images), chosen.label, reduction="none")
        with examples(planted, batch.index):
            logits = planted(batch.images)
        held = (logits.argmax(1) == batch.label).double().mean() >= HELD
        learned = bool(loss.max() < LEARNED and held)
        if learned or step == most_steps:
            break
        kept = F.cross_entropy(logits, batch.label)
        gradients = torch.autograd.grad(loss.mean() + kept, list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients):
            weight.grad = gradient * masks[name]  # without one, Adam leaves a number as it is
        optimizer.step()
    return Planting(planted.requires_grad_(False), step, learned)
