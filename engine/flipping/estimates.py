"""Estimates from weighted samples of what an exact search computes from all examples.

A sample takes more of the examples that matter more, and weights make up for it. It is
deterministic: the same closed gates have the same sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Examples
from engine.flipping.cached_passes import (
    CACHE_BYTES,
    Correctness,
    Logits,
    ReferenceGradient,
    flatten_copies,
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
        self, model: StagedModel, gates: Gates, reference: Examples, memory: float, sample: int
    ) -> None:
        """The examples are normalized, noisy copies."""
        self.model, self.gates, self.reference, self.sample = model, gates, reference, sample
        self.copies = reference.images.shape[1]
        images, index = flatten_copies(reference)
        self.logits = Logits(model, gates, images, memory, index, prepare=lambda x: x)
        self.each = max(1, rows_at_once(model, gates, reference.images[0]) // self.copies)
        self._drawn = remembering(self._draw, 64)
        self._known = remembering(self._compute, max(64, CACHE_BYTES // (4 * gates.count)))

    def of(self, closed: list[int]) -> Tensor:
        return self._known((frozenset(closed[: len(closed) // REDRAW * REDRAW]), frozenset(closed)))

    def _draw(self, closed: frozenset[int]) -> tuple[Tensor, Tensor]:
        output = mean_output(self.logits.of(closed), self.copies)
        label = F.one_hot(self.reference.label, output.shape[1])
        error = (output.softmax(1) - label).abs().sum(1)
        return draw_weighted(error, self.sample)

    def _compute(self, sets: tuple[frozenset[int], frozenset[int]]) -> Tensor:
        drawn_at, closed = sets
        rows, weight = self._drawn(drawn_at)
        self.gates.close([closed])
        return sum(map(self._of_rows, rows.split(self.each), weight.split(self.each)))

    def _of_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        drawn = self.reference.take(rows)
        images, index = flatten_copies(drawn)
        with examples(self.model, index):
            logits = self.model(images)
        taps, output = self.gates.take_taps(), mean_output(logits, self.copies)
        loss = weight @ F.cross_entropy(output, drawn.label, reduction="none")
        gradients = torch.autograd.grad(loss, [tap.output for tap in taps])
        return self.gates.gradients(taps, gradients, 1)[0]


class SampledCorrectness(Correctness):
    """Estimate the accuracy from a sample of the images, drawn by how uncertain each one is.

    An image's margin is the logit of its label minus the highest of the others. What closed gates
    make of it is predicted to first order. Images whose predicted margin is near 0 may be right or
    wrong, and are drawn most often.
    """

    def __init__(
        self, model: StagedModel, gates: Gates, given: Examples, memory: float, sample: int
    ) -> None:
        memory -= 2 * len(given) * gates.count  # for the derivatives
        super().__init__(model, gates, given, memory)
        self.sample = sample
        self.margin = torch.empty(len(given), dtype=torch.double, device=given.label.device)
        self.by_gate = self.margin.new_empty(len(given), gates.count, dtype=torch.half)
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
    model: StagedModel, gates: Gates, reference: Examples, memory: float, sample: int | None
) -> ReferenceGradient | SampledGradient:
    """Compute the gradient from `sample` examples if there are more; None stands for all."""
    if sample is None or sample >= len(reference):
        return ReferenceGradient(model, gates, reference, memory)
    return SampledGradient(model, gates, reference, memory, sample)


def correctness(
    model: StagedModel, gates: Gates, given: Examples, memory: float, sample: int | None
) -> Correctness:
    """Compute the accuracy from `sample` examples if there are more; None stands for all."""
    if sample is None or sample >= len(given):
        return Correctness(model, gates, given, memory)
    return SampledCorrectness(model, gates, given, memory, sample)
