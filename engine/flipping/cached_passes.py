"""Cache passes of a fixed batch under changing sets of closed gates.

In eval mode examples are independent, so what lies below the lowest closed gate does as it did with
all gates open: forward passes go on from stored states there. How much is stored depends on the
memory that is free; what comes out does not, because batches are cut the same way in any case.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Examples, normalize
from engine.flipping.gates import Gates, Tap
from models.dropout import examples
from models.layer_groups import StagedModel, State, layer_groups, run_stages

# What one pass may take at the most, by the kind of device: batches must not depend on the memory
# that is free. A CPU's caches hold few images.
ROWS = {"cpu": 80, "cuda": 2048}
PASS_BYTES = {"cpu": 1 << 31, "cuda": 1 << 32}
CACHE_BYTES = 1 << 28


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


def remembering(method: Callable, most: int) -> Callable:
    """Cache a method's latest results, without keeping its object alive.

    An object's tensors may fill a GPU: they must be freed at once, not by Python's garbage
    collector.
    """
    weak = WeakMethod(method)
    return lru_cache(maxsize=most)(lambda closed: weak()(closed))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def flatten_copies(reference: Examples) -> tuple[Tensor, Tensor | None]:
    """Return the noisy copies of all examples as one batch of images, and the index of each."""
    images, index = reference.images, reference.index
    return images.flatten(0, 1), None if index is None else index.repeat_interleave(images.shape[1])


def _nbytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in _tensors(state))


def rows_of(state: State | None, rows: Tensor) -> State | None:
    """Return some rows of a state; None of None."""
    if isinstance(state, tuple):
        return tuple(tensor[rows] for tensor in state)
    return None if state is None else state[rows]


def _join(states: Sequence[State]) -> State:
    """Concatenate the states of several batches."""
    if isinstance(states[0], tuple):
        return tuple(map(torch.cat, zip(*states)))
    return torch.cat(states)


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
        self, model: StagedModel, gates: Gates, reference: Examples, memory: float
    ) -> None:
        """The examples are normalized, noisy copies."""
        self.model, self.groups, self.gates = model, layer_groups(model), gates
        self.n, self.copies = len(reference), reference.images.shape[1]
        each = max(1, rows_at_once(model, gates, reference.images[0]) // self.copies)
        parts = [reference.take(slice(i, i + each)) for i in range(0, self.n, each)]
        self.batches = [(part.label, *flatten_copies(part)) for part in parts]
        self.graphs: list[_Graph] = []
        gates.close([()])
        for _, images, index in self.batches:
            with examples(model, index), GraphBytes(model) as kept:
                graph = self._open_graph(images)
            memory -= kept.total(graph.taps)
            if memory < 0:
                break
            self.graphs.append(graph)
        self._known = remembering(self._compute, max(64, CACHE_BYTES // (4 * gates.count)))

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
        label, images, index = self.batches[batch]
        graph = self.graphs[batch] if batch < len(self.graphs) else None
        start = self.gates.first_group(closed, default=len(self.groups)) if graph else 0
        below = _tensors(graph.states[start] if graph else images)
        leaves = tuple(_leaf(tensor) for tensor in below)
        with examples(self.model, index):
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
        self.images, self.index, self.prepare = images, index, prepare
        self.batch_size = rows_at_once(model, gates, prepare(images[:1]))
        self.all_rows = torch.arange(len(images), device=images.device)
        gates.close([()])
        with torch.no_grad():
            sizes = [_nbytes(state) for state in self._states(self.all_rows[: self.batch_size])]
            batches = self.all_rows.split(self.batch_size)
            self.lowest = self._lowest_stored([len(batches) * size for size in sizes], memory)
            kept = [self._states(rows)[self.lowest :] for rows in batches]
        # State by state: what is joined is let go of before the next is.
        self.states = [_join([states.pop(0) for states in kept]) for _ in sizes[self.lowest :]]

    def _states(self, rows: Tensor) -> list[State]:
        """Return the states in front of every group, and the logits."""
        state, states = self.prepare(self.images[rows]), []
        with examples(self.model, rows_of(self.index, rows)):
            for group in self.groups:
                states.append(state)
                state = group.forward(state)
        return [*states, state]

    @staticmethod
    def _lowest_stored(sizes: Sequence[int], memory: float) -> int:
        """Upper states are the smaller ones, and those that most sets of gates go on from."""
        lowest = len(sizes) - 1
        while lowest > 0 and sum(sizes[lowest - 1 :]) <= memory:
            lowest -= 1
        return lowest

    @torch.no_grad()
    def of(self, closed: Collection[int], rows: Tensor | None = None) -> Tensor:
        """Return the logits of some rows, or of all."""
        self.gates.close([closed])
        start = self.gates.first_group(closed, default=len(self.groups))
        logits = []
        for batch in (self.all_rows if rows is None else rows).split(self.batch_size):
            with examples(self.model, rows_of(self.index, batch)):
                if start >= self.lowest:
                    state = rows_of(self.states[start - self.lowest], batch)
                    logits.append(run_stages(self.groups, state, start))
                else:
                    logits.append(run_stages(self.groups, self.prepare(self.images[batch])))
        return torch.cat(logits)


class Correctness:
    """Accuracy on a fixed set of images for any set of closed gates."""

    def __init__(self, model: StagedModel, gates: Gates, given: Examples, memory: float) -> None:
        """Images are as they are stored; no noise is added to them."""
        self.logits = Logits(model, gates, given.images, memory, given.index)
        self.label = given.label
        self._known = remembering(self._compute, 64)

    def accuracy(self, closed: Collection[int], without: int | None = None) -> float:
        """Return the accuracy on all images, or on all but the one in this place."""
        rows, weight, correct = self._known(frozenset(closed))
        weight = weight * (rows != (-1 if without is None else without))
        return min(1.0, float(weight @ correct / weight.sum()))  # but for rounding, at most 1

    def _compute(self, closed: frozenset[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, their weights and, as 0 or 1, whether each is correct."""
        rows, weight = self._choose(closed)
        correct = self.logits.of(closed, rows).argmax(1) == self.label[rows]
        return rows, weight, correct.double()

    def _choose(self, closed: frozenset[int]) -> tuple[Tensor, Tensor]:
        rows = self.logits.all_rows
        return rows, torch.ones(len(rows), dtype=torch.double, device=rows.device)
