"""The greedy search: close the most promising gate of an example, until its prediction flips."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flipping.cached_passes import ReferenceGradient, bytes_each, mean_output
from engine.flipping.estimates import SampledGradient
from engine.flipping.gates import Gates
from engine.training.devices import free_memory
from models.dropout import examples
from models.layer_groups import StagedModel

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


def best_gates(score: Tensor, closed: Sequence[Sequence[int]]) -> list[int]:
    """Return, for each row of scores, the open gate with the highest; the first among equals."""
    pairs = [(row, number) for row, numbers in enumerate(closed) for number in numbers]
    rows, numbers = torch.tensor(pairs, dtype=torch.long, device=score.device).view(-1, 2).T
    score = score.index_put((rows, numbers), score.new_tensor(-torch.inf))
    highest = score.max(dim=1, keepdim=True).values
    return (score >= highest - TIED * highest.abs()).int().argmax(1).tolist()


def search(
    model: StagedModel,
    gates: Gates,
    reference: ReferenceGradient | SampledGradient,
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
        for row, flipped in enumerate((output.argmax(1) != label).tolist()):
            if flipped or len(active[row].closed) == most:
                yield active[row], flipped
            else:
                still.append(row)
        own, active = own[still], [active[row] for row in still]
        if active:
            sets = [candidate.closed for candidate in active]
            common = [reference.of(s[: len(s) // refresh * refresh]) for s in sets]
            for candidate, gate in zip(active, best_gates(torch.stack(common) - own, sets)):
                candidate.closed.append(gate)


def chunk_size(model: StagedModel, gates: Gates, images: Tensor) -> int:
    """Return the number of examples, with copies, that fit into a quarter of the free memory."""
    each = bytes_each(model, gates, images)
    return max(1, min(LARGEST_CHUNK, int(free_memory(images.device) / 4 / each)))
