"""The greedy search: close the most promising gate of an example, until its prediction flips."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.devices import free_memory
from engine.reuse import SAVED_PER_TAP, ReferenceGradient, mean_output
from models.dropout import examples
from models.layer_groups import StagedModel
from models.neurons import Gates

# Scores this close to the highest, relative to it, are equal, and the lowest gate is taken: gates
# whose scores are equal on paper (a query's and its key's in attention) differ by rounding.
TIED = 1e-4
LARGEST_CHUNK = 256


@dataclass
class Candidate:
    """An example that is to flip, and the gates that were closed for it, in order."""

    row: int
    label: Tensor
    images: Tensor  # normalized and noisy, [copies, channels, height, width]
    index: Tensor | None = None  # [copies], where dropout gives every example a mask of its own
    closed: list[int] = field(default_factory=list)


def best_gate(score: Tensor, closed: Sequence[int]) -> int:
    """The open gate of the highest score; the lowest number among equals."""
    score = score.clone()
    score[closed] = -torch.inf
    highest = score.max()
    return int((score >= highest - TIED * highest.abs()).nonzero()[0])


def search(
    model: StagedModel,
    gates: Gates,
    reference: ReferenceGradient,
    candidates: Iterable[Candidate],
    chunk: int,
    max_neurons: int,
    refresh: int = 1,
) -> Iterator[tuple[Candidate, bool]]:
    """Close gates for `chunk` examples at once; each comes out when it flips or may close no more.

    One forward and one backward pass tell whether the examples flipped and score all of their
    gates. The reference batch's gradient depends on the closed gates alone; with `refresh` k it is
    that of the first 0, k, 2k, ... of them.
    """
    waiting, active = iter(candidates), []
    most = min(max_neurons, gates.count)
    while active := [*active, *islice(waiting, chunk - len(active))]:
        gates.close([candidate.closed for candidate in active])
        index = [candidate.index for candidate in active if candidate.index is not None]
        with examples(model, torch.cat(index) if index else None):
            logits = model(torch.cat([candidate.images for candidate in active]))
        taps = gates.take_taps()
        output = mean_output(logits, len(active[0].images))
        label = torch.stack([candidate.label for candidate in active])
        loss = F.cross_entropy(output, label, reduction="sum")
        gradients = torch.autograd.grad(loss, [tap.output for tap in taps])
        own = gates.gradients(taps, gradients, len(active))
        still = []
        for row, (candidate, flipped) in enumerate(zip(active, (output.argmax(1) != label).cpu())):
            closed = candidate.closed
            if flipped or len(closed) == most:
                yield candidate, bool(flipped)
                continue
            common = reference.of(frozenset(closed[: len(closed) // refresh * refresh]))
            closed.append(best_gate(common - own[row], closed))
            still.append(candidate)
        active = still


def chunk_size(model: StagedModel, gates: Gates, images: Tensor) -> int:
    """How many examples fit into a quarter of the free memory, with their copies."""
    gates.close([()])
    model(images)
    each = SAVED_PER_TAP * sum(tap.value.nbytes for tap in gates.take_taps())
    return max(1, min(LARGEST_CHUNK, int(free_memory(images.device) / 4 / each)))
