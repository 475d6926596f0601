"""Cache passes of a fixed batch under changing sets of closed gates.

In eval mode examples are independent, so what lies below the lowest closed gate does as it did with
all gates open: forward passes go on from stored states there. How much is stored depends on the
memory that is free; what comes out does not, because batches are cut the same way in any case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor

from data import normalize
from engine.flipping.gates import Gates, Tap
from models.dropout import examples
from models.layer_groups import StagedModel, State, layer_groups, run_stages

# What one pass may take at the most, by the kind of device: batches must not depend on the memory
# that is free. A CPU's caches hold few images.
ROWS = {"cpu": 80, "cuda": 2048}
PASS_BYTES = {"cpu": 1 << 31, "cuda": 1 << 32}
CACHE_BYTES = 1 << 28
# Of samples of the reference batch: closed gates between draws, and the share drawn evenly.
REDRAW, EVEN = 4, 0.1


def mean_output(logits: Tensor, copies: int) -> Tensor:
    """The output of the classifier F_d: mean logits over each example's noisy copies.

    In float64: float32 leaves 1 - p of a confident prediction, and so its gradient, few digits.
    """
    return logits.double().unflatten(0, (-1, copies)).mean(1)


def _tensors(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


class GraphBytes:
    """Count the bytes that autograd and the taps keep of the passes inside of `with`.

    Each storage counts once, however many tensors share it; the model's own do not count.
    """

    def __init__(self, model: StagedModel) -> None:
        self._known = {t.untyped_storage()._cdata for t in model.state_dict().values()}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:  # which tells storages without memory apart, too
            self._storages[storage._cdata] = storage.nbytes()
        return tensor

    def __enter__(self) -> "GraphBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def total(self, taps: Sequence[Tap]) -> int:
        """Return the bytes, with those of the taps' tensors, which must still be alive."""
        for tap in taps:
            self.add(tap.value)
            self.add(tap.output)
        return sum(self._storages.values())


def bytes_each(model: StagedModel, gates: Gates, images: Tensor) -> int:
    """Return the bytes that a pass of these images keeps for its backward pass."""
    gates.close([()])
    with GraphBytes(model) as kept:
        output = model(images)  # keeps the graph alive while it is counted
        kept.add(output)
    return kept.total(gates.take_taps())


def rows_at_once(model: StagedModel, gates: Gates, images: Tensor) -> int:
    """Return the number of images in one pass; it depends on the model and the kind of device."""
    kind = images.device.type
    return max(1, min(ROWS[kind], PASS_BYTES[kind] // bytes_each(model, gates, images[:1])))


def _remembering(method: Callable, most: int) -> Callable:
    """A method that knows its latest results, and does not keep alive whose method it is.

    What it computes with may fill a GPU, which is not to wait for Python's garbage collector.
    """
    weak = WeakMethod(method)
    return lru_cache(maxsize=most)(lambda closed: weak()(closed))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _split_index(
    index: Tensor | None, size: int, batches: int, copies: int = 1
) -> Sequence[Tensor | None]:
    """The indices of each batch's images, where every example stands `copies` times."""
    if index is None:
        return [None] * batches
    return index.repeat_interleave(copies).split(size * copies)


def _nbytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in _tensors(state))


@dataclass(frozen=True)
class _Graph:
    """A pass with all gates open, kept: the state in front of every group, and the logits."""

    states: list[State]
    taps: list[Tap]


class ReferenceGradient:
    """d/dm of the reference batch's mean loss, for any set of closed gates.

    A set that was asked for before has a known gradient. Below the lowest closed gate the backward
    pass goes through the graph of the open model.
    """

    def __init__(
        self,
        model: StagedModel,
        gates: Gates,
        images: Tensor,
        label: Tensor,
        memory: float,
        index: Tensor | None = None,
    ) -> None:
        """Images are normalized and noisy, [n, copies, channels, height, width].

        With their `index`, examples go through example-tied dropout under masks of their own.
        """
        self.model, self.groups, self.gates = model, layer_groups(model), gates
        self.n, self.copies = len(label), images.shape[1]
        each = max(1, rows_at_once(model, gates, images[0]) // self.copies)
        self.batches = list(zip(images.split(each), label.split(each)))
        self.index = _split_index(index, each, len(self.batches), self.copies)
        self.graphs: list[_Graph] = []
        gates.close([()])
        for (batch, _), rows in zip(self.batches, self.index):
            with examples(model, rows), GraphBytes(model) as kept:
                graph = self._open_graph(batch.flatten(0, 1))
            memory -= kept.total(graph.taps)
            if memory < 0:
                break
            self.graphs.append(graph)
        self._known = _remembering(self._compute, max(64, CACHE_BYTES // (4 * gates.count)))

    def of(self, closed: Sequence[int]) -> Tensor:
        return self._known(frozenset(closed))

    def _open_graph(self, images: Tensor) -> _Graph:
        states: list[State] = [images]
        for group in self.groups:
            states.append(group.forward(states[-1]))
        return _Graph(states, self.gates.take_taps())

    def _compute(self, closed: frozenset[int]) -> Tensor:
        self.gates.close([closed])
        return sum(self._of_batch(i, closed) for i in range(len(self.batches))) / self.n

    def _of_batch(self, batch: int, closed: frozenset[int]) -> Tensor:
        images, label = self.batches[batch]
        graph = self.graphs[batch] if batch < len(self.graphs) else None
        start = self.gates.first_group(closed, default=len(self.groups)) if graph else 0
        below = _tensors(graph.states[start] if graph else images.flatten(0, 1))
        leaves = tuple(_leaf(tensor) for tensor in below)
        with examples(self.model, self.index[batch]):
            logits = run_stages(self.groups, leaves if len(leaves) > 1 else leaves[0], start)
        taps = self.gates.take_taps()
        loss = F.cross_entropy(mean_output(logits, self.copies), label, reduction="sum")

        onwards = [(leaf, tensor) for leaf, tensor in zip(leaves, below) if leaf.requires_grad]
        wanted = [tap.output for tap in taps] + [leaf for leaf, _ in onwards]
        gradients = torch.autograd.grad(loss, wanted)
        found = self.gates.gradients(taps, gradients[: len(taps)], 1)
        if onwards:
            lower = [tap for tap in graph.taps if tap.site.group < start]
            gradients = torch.autograd.grad(
                [tensor for _, tensor in onwards],
                [tap.output for tap in lower],
                gradients[len(taps) :],
                retain_graph=True,
            )
            found += self.gates.gradients(lower, gradients, 1)
        return found[0]


class Logits:
    """Logits of a fixed set of images for any set of closed gates."""

    def __init__(
        self,
        model: StagedModel,
        gates: Gates,
        images: Tensor,
        memory: float,
        index: Tensor | None = None,
        prepare: Callable[[Tensor], Tensor] = normalize,
    ) -> None:
        """`prepare` makes the network's input of a batch of images."""
        self.model, self.groups, self.gates = model, layer_groups(model), gates
        self.prepare = prepare
        rows = rows_at_once(model, gates, prepare(images[:1]))
        self.batches = images.split(rows)
        self.index = _split_index(index, rows, len(self.batches))
        gates.close([()])
        with torch.no_grad():
            sizes = [_nbytes(state) for state in self._states(0, 0)]
            self.lowest = self._lowest_stored([len(self.batches) * size for size in sizes], memory)
            self.states = [self._states(i, self.lowest) for i in range(len(self.batches))]

    def _states(self, batch: int, lowest: int) -> list[State]:
        """The states in front of the groups lowest, lowest + 1, ..., and the logits."""
        state, states = self.prepare(self.batches[batch]), []
        with examples(self.model, self.index[batch]):
            for group in self.groups:
                states.append(state)
                state = group.forward(state)
        return [*states, state][lowest:]

    @staticmethod
    def _lowest_stored(sizes: Sequence[int], memory: float) -> int:
        """Upper states are the smaller ones, and those that most sets of gates go on from."""
        lowest = len(sizes) - 1
        while lowest > 0 and sum(sizes[lowest - 1 :]) <= memory:
            lowest -= 1
        return lowest

    @torch.no_grad()
    def of(self, closed: frozenset[int]) -> Tensor:
        self.gates.close([closed])
        start = self.gates.first_group(closed, default=len(self.groups))
        logits = []
        for images, rows, states in zip(self.batches, self.index, self.states):
            with examples(self.model, rows):
                if start >= self.lowest:
                    logits.append(run_stages(self.groups, states[start - self.lowest], start))
                else:
                    logits.append(run_stages(self.groups, self.prepare(images)))
        return torch.cat(logits)


class Correctness:
    """Correctness of many images for any set of closed gates; no noise is added."""

    def __init__(
        self,
        model: StagedModel,
        gates: Gates,
        images: Tensor,
        label: Tensor,
        memory: float,
        index: Tensor | None = None,
    ) -> None:
        self.logits, self.label = Logits(model, gates, images, memory, index), label
        self.of = _remembering(self._compute, 64)

    def _compute(self, closed: frozenset[int]) -> Tensor:
        return self.logits.of(closed).argmax(1) == self.label


class SampledGradient:
    """Estimate the reference batch's gradient from a sample of it, drawn by the examples' errors.

    An example's error is the L1 distance of its softmax output from its label. `rows` draws go to
    the examples in proportion to it, at even steps through the cumulative sum instead of at random,
    and weights undo the proportion. The errors are those of the first 0, REDRAW, 2 * REDRAW, ...
    closed gates.
    """

    def __init__(
        self,
        model: StagedModel,
        gates: Gates,
        images: Tensor,
        label: Tensor,
        memory: float,
        index: Tensor | None,
        rows: int,
    ) -> None:
        """Images are normalized and noisy, [n, copies, channels, height, width]."""
        self.model, self.gates, self.images, self.label = model, gates, images, label
        self.index, self.rows, self.copies = index, rows, images.shape[1]
        repeated = index if index is None else index.repeat_interleave(self.copies)
        self.logits = Logits(model, gates, images.flatten(0, 1), memory, repeated, lambda x: x)
        self.each = max(1, rows_at_once(model, gates, images[0]) // self.copies)
        self._sample = _remembering(self._draw, 64)
        self._known = _remembering(self._compute, max(64, CACHE_BYTES // (4 * gates.count)))

    def of(self, closed: Sequence[int]) -> Tensor:
        return self._known((frozenset(closed[: len(closed) // REDRAW * REDRAW]), frozenset(closed)))

    def _draw(self, closed: frozenset[int]) -> tuple[Tensor, Tensor]:
        """Return the sampled rows and their weights, which sum up to about 1."""
        output = mean_output(self.logits.of(closed), self.copies)
        error = (output.softmax(1) - F.one_hot(self.label, output.shape[1])).abs().sum(1)
        share = (1 - EVEN) * error / error.sum().clamp(min=1e-300) + EVEN / len(error)
        share = share / share.sum()
        steps = (torch.arange(self.rows, dtype=share.dtype, device=share.device) + 0.5) / self.rows
        drawn = torch.searchsorted(share.cumsum(0), steps).clamp(max=len(share) - 1)
        rows, times = drawn.unique(return_counts=True)
        return rows, times / (self.rows * share[rows] * len(share))

    def _compute(self, sets: tuple[frozenset[int], frozenset[int]]) -> Tensor:
        drawn_at, closed = sets
        rows, weight = self._sample(drawn_at)
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
