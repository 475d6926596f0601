"""Plant memory in one channel: the control in which the answer is a single place.

One channel is fine-tuned, with all other weights frozen, until a few chosen examples are predicted
as a new label. What a channel computes (its filter and its batch norm's scale and shift) and what
the next layer reads from it (one column of weights) are the channel's parameters. A localizer that
finds where a prediction is stored must rank that channel first for these examples.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Examples
from models.dropout import examples
from models.wiring import WiredLayer, Wiring

LEARNING_RATE = 0.01
MOST_STEPS = 400
LEARNED = 0.1  # highest loss of a chosen example that counts as learned
HELD = 0.98  # accuracy on a batch of other examples that counts as held in place


@dataclass(frozen=True)
class Channels:
    """The layers that write and read the channels which leave a place of dropout."""

    writes: WiredLayer
    reads: WiredLayer


def find_channels(model: nn.Module, wiring: Wiring, site: str) -> Channels | None:
    """Return the last layer that ended up to the site and the first one that ends behind it.

    None where their numbers of channels are not those that leave the site: then no single channel
    of a layer is a channel of the site.
    """
    ends = {name: place for place, name in enumerate(wiring.outputs)}
    last = wiring.layers[-1]
    before = [layer for layer in wiring.layers if ends.get(layer.name, np.inf) <= ends[site]]
    after = [layer for layer in wiring.layers if ends.get(layer.name, 0) > ends[site]] + [last]
    if not before:
        return None
    channels, found = wiring.outputs[site].channels, Channels(before[-1], after[0])
    reader = model.get_submodule(found.reads.name)
    sizes = (wiring.outputs[found.writes.name].channels, reader.weight.shape[1])
    return found if sizes == (channels, channels) and getattr(reader, "groups", 1) == 1 else None


def channel_masks(model: nn.Module, channels: Channels, channel: int) -> dict[str, Tensor]:
    """Return for every parameter that belongs to the channel, which of its numbers do (bool)."""
    writers = filter(None, (channels.writes.name, channels.writes.norm))
    rows = [f"{name}.{tensor}" for name in writers for tensor in ("weight", "bias")]
    known, found = dict(model.named_parameters()), {}
    for name in (*rows, f"{channels.reads.name}.weight"):
        if name in known:
            mask = torch.zeros_like(known[name], dtype=torch.bool)
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
    channels: Channels,
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
    masks = channel_masks(planted, channels, channel)
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
