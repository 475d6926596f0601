"""Estimates from weighted samples of what an exact search computes from all examples.

A sample takes more of the examples that matter more, and weights make up for it. It is
deterministic: the same closed gates have the same sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flipping.cached_passes import (
    CACHE_BYTES,
    Correctness,
    Logits,
    ReferenceGradient,
    mean_output,
    remembering,
    rows_at_once,
    rows_of,
)
from engine.flipping.gates import Gates
from engine.training.evaluation import compute_margin
from models.dropout import examples
from models.layer_groups import StagedModel

EVEN = 0.1  # the share of a sample that is drawn evenly
REDRAW = 4  # closed gates between two samples of the reference batch
BLUR = 0.2  # scale of the errors of predicted margins, in medians of the absolute margins


def draw_weighted(merit: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Select rows in proportion to their merit; return them and weights that sum up to about 1.

    The selection takes even steps through the cumulative sum of the merits, so that a sample of
    sorted rows is spread over all of their range.
    """
    share = (1 - EVEN) * merit / merit.sum().clamp(min=1e-300) + EVEN / len(merit)
    share = share / share.sum()
    steps = (torch.arange(size, dtype=share.dtype, device=share.device) + 0.5) / size
    drawn = torch.searchsorted(share.cumsum(0), steps).clamp(max=len(share) - 1)
    rows, times = drawn.unique(return_counts=True)
    return rows, times / (size * share[rows] * len(share))


class SampledGradient:
    """Estimate the reference batch's gradient from a sample of it, drawn by the examples' errors.

    An example's error is the L1 distance of its softmax output from its label. The errors are those
    of the first 0, REDRAW, 2 * REDRAW, ... closed gates.
    """

    def __init__(
        self,
        model: StagedModel,
        gates: Gates,
        images: Tensor,
        label: Tensor,
        memory: float,
        index: Tensor | None,
        sample: int,
    ) -> None:
        """Images are normalized and noisy, [n, copies, channels, height, width]."""
        self.model, self.gates, self.images, self.label = model, gates, images, label
        self.index, self.sample, self.copies = index, sample, images.shape[1]
        repeated = index if index is None else index.repeat_interleave(self.copies)
        self.logits = Logits(model, gates, images.flatten(0, 1), memory, repeated, lambda x: x)
        self.each = max(1, rows_at_once(model, gates, images[0]) // self.copies)
        self._drawn = remembering(self._draw, 64)
        self._known = remembering(self._compute, max(64, CACHE_BYTES // (4 * gates.count)))

    def of(self, closed: list[int]) -> Tensor:
        return self._known((frozenset(closed[: len(closed) // REDRAW * REDRAW]), frozenset(closed)))

    def _draw(self, closed: frozenset[int]) -> tuple[Tensor, Tensor]:
        output = mean_output(self.logits.of(closed), self.copies)
        error = (output.softmax(1) - F.one_hot(self.label, output.shape[1])).abs().sum(1)
        return draw_weighted(error, self.sample)

    def _compute(self, sets: tuple[frozenset[int], frozenset[int]]) -> Tensor:
        drawn_at, closed = sets
        rows, weight = self._drawn(drawn_at)
        self.gates.close([closed])
        return sum(map(self._of_rows, rows.split(self.each), weight.split(self.each)))

    def _of_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        index = None if self.index is None else self.index[rows].repeat_interleave(self.copies)
        with examples(self.model, index):
            logits = self.model(self.images[rows].flatten(0, 1))
        taps, output = self.gates.take_taps(), mean_output(logits, self.copies)
        loss = weight @ F.cross_entropy(output, self.label[rows], reduction="none")
        gradients = torch.autograd.grad(loss, [tap.output for tap in taps])
        return self.gates.gradients(taps, gradients, 1)[0]


class SampledCorrectness(Correctness):
    """Estimate the accuracy from a sample of the images, drawn by how uncertain each one is.

    An image's margin is the logit of its label minus the highest of the others. What closed gates
    make of it is predicted to first order. Images whose predicted margin is near 0 may be right or
    wrong, and are drawn most often.
    """

    def __init__(
        self,
        model: StagedModel,
        gates: Gates,
        images: Tensor,
        label: Tensor,
        memory: float,
        index: Tensor | None,
        sample: int,
    ) -> None:
        memory -= 2 * len(images) * gates.count  # for the derivatives
        super().__init__(model, gates, images, label, memory, index)
        self.sample = sample
        self.margin = torch.empty(len(images), dtype=torch.double, device=images.device)
        self.by_gate = self.margin.new_empty(len(images), gates.count, dtype=torch.half)
        for rows in self.logits.all_rows.split(self.logits.batch_size):
            self.margin[rows], self.by_gate[rows] = self._margins(gates, rows)

    def _margins(self, gates: Gates, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the margins of some images and their derivatives by the gates, [rows, gates]."""
        logits = self.logits
        gates.close([()] * len(rows))
        with examples(logits.model, rows_of(logits.index, rows)):
            output = logits.model(logits.prepare(logits.images[rows]))
        taps = gates.take_taps()
        margin = compute_margin(output, self.label[rows])
        gradients = torch.autograd.grad(margin.sum(), [tap.output for tap in taps])
        derivatives = gates.gradients(taps, gradients, len(rows))
        return margin.detach().double(), derivatives.clamp(-6e4, 6e4).half()  # stay finite

    def _choose(self, closed: frozenset[int]) -> tuple[Tensor, Tensor]:
        if not closed:
            return super()._choose(closed)
        margin = self.margin - self.by_gate[:, sorted(closed)].double().sum(1)
        blur = (BLUR * self.margin.abs().median()).clamp(min=1e-12)
        wrong = torch.sigmoid(-margin / blur)
        order = margin.argsort()
        rows, weight = draw_weighted((wrong * (1 - wrong)).sqrt()[order], self.sample)
        return order[rows], weight


def reference_gradient(
    model: StagedModel,
    gates: Gates,
    images: Tensor,
    label: Tensor,
    memory: float,
    index: Tensor | None,
    sample: int | None,
) -> ReferenceGradient | SampledGradient:
    """Compute the gradient from `sample` rows where the batch has more, or from all of it."""
    given = model, gates, images, label, memory, index
    whole = sample is None or sample >= len(label)
    return ReferenceGradient(*given) if whole else SampledGradient(*given, sample)


def correctness(
    model: StagedModel,
    gates: Gates,
    images: Tensor,
    label: Tensor,
    memory: float,
    index: Tensor | None,
    sample: int | None,
) -> Correctness:
    """Compute the accuracy from `sample` images where there are more, or from all of them."""
    given = model, gates, images, label, memory, index
    whole = sample is None or sample >= len(label)
    return Correctness(*given) if whole else SampledCorrectness(*given, sample)
