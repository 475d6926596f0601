"""Localizers: score every unit of a network by its part in the prediction of one example.

A unit is a channel that leaves a dropout site (behind the sum of a residual block, where a block
has one). `UnitGates` multiplies each unit by a gate: 1 is open, 0 is closed. The network is in eval
mode, and every example passes under its own example-tied mask.

All localizers have one signature, (model, gates, batch, reference) -> scores [batch, units]. A high
score says that the unit holds the prediction of the example's trained label. Examples are scored
independently of one another; a batch of them only saves time. Units that are off for an example
have scores without meaning: `UnitGates.on` says which ones to leave out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Examples
from data.random_streams import random_stream
from models.dropout import ExampleTiedDropout, examples, tied_layers
from models.dropout_places import own_places
from models.layer_groups import StagedModel
from models.wiring import Output

GREEDY_STEPS = 10
NODES = 32  # of the quadrature of integrated gradients
ROWS = 100  # images in a forward pass

# ---------------------------------------------------------------- units


@dataclass(frozen=True)
class Site:
    """A module with units behind it: the numbers first ... first + count - 1."""

    name: str
    module: nn.Module
    dim: int  # of the units in the module's output
    first: int
    count: int
    dropout: ExampleTiedDropout | None

    @property
    def numbers(self) -> slice:
        return slice(self.first, self.first + self.count)


class UnitGates:
    """Gates behind a model's dropout, in force inside `with UnitGates(model) as gates`.

    `places` are where the model's dropout stands, in the order of its insertion; without, they are
    the model's own (models/dropout_places.py). Leaving removes every hook. A network without
    example-tied dropout has the same units, all of them on for every example.
    """

    def __init__(self, model: StagedModel, places: Mapping[str, Output] | None = None) -> None:
        self.places = own_places(model) if places is None else places
        layers = dict(zip(self.places, tied_layers(model)))
        self.sites, first = [], 0
        for name, place in self.places.items():
            module, dropout = model.get_submodule(name), layers.get(name)
            self.sites.append(Site(name, module, place.dim, first, place.channels, dropout))
            first += place.channels
        self.count = first
        self._gate: Tensor | None = None
        self._seen: dict[str, Tensor] | None = None

    def __enter__(self) -> "UnitGates":
        # Hooks run in the order of registration, so that these see what dropout let through.
        self._handles = [
            site.module.register_forward_hook(partial(self._act, site)) for site in self.sites
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _act(self, site: Site, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if self._gate is not None:
            shape = [1] * output.ndim
            shape[0], shape[site.dim] = len(self._gate), site.count
            output = output * self._gate[:, site.numbers].to(output.dtype).view(shape)
        if self._seen is not None:
            channels = output.movedim(site.dim, 1).flatten(2) if output.ndim > 2 else output
            found = channels.abs().mean(2) if channels.ndim > 2 else channels.abs()
            self._seen[site.name] = found
        return output

    @contextmanager
    def set(self, gate: Tensor | None) -> Iterator[None]:
        """Multiply the units by these gates, [1 or rows, units]; afterwards by the former ones."""
        former, self._gate = self._gate, gate
        try:
            yield
        finally:
            self._gate = former

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Collect each site's mean absolute activation, [rows, channels], by name."""
        former, self._seen = self._seen, {}
        try:
            yield self._seen
        finally:
            self._seen = former

    def on(self, index: Tensor) -> Tensor:
        """bool [n, units]: units that are on for these examples."""
        return torch.cat([self._masks(site, index, shared=True) for site in self.sites], dim=1)

    def planted(self, index: Tensor) -> Tensor:
        """bool [n, units]: memorization neurons that are tied to these examples."""
        return torch.cat([self._masks(site, index, shared=False) for site in self.sites], dim=1)

    def _masks(self, site: Site, index: Tensor, shared: bool) -> Tensor:
        if site.dropout is None:
            return torch.full((len(index), site.count), shared, device=index.device)
        own = site.dropout.masks[index]
        common = torch.full((len(index), site.dropout.generalization), shared, device=own.device)
        return torch.cat([common, own], dim=1)

    def layer_of_units(self) -> Tensor:
        """int64 [units]: the number of each unit's site."""
        return torch.cat([torch.full((s.count,), number) for number, s in enumerate(self.sites)])


# ---------------------------------------------------------------- passes


def run_gated(
    model: nn.Module, gates: UnitGates, batch: Examples, gate: Tensor | None = None
) -> Tensor:
    """Return the logits [n, classes] under these gates, in float64."""
    with examples(model, batch.index), gates.set(gate):
        return model(batch.images).double()


def compute_losses(
    model: nn.Module, gates: UnitGates, batch: Examples, gate: Tensor | None = None
) -> Tensor:
    logits = run_gated(model, gates, batch, gate)
    return F.cross_entropy(logits, batch.label, reduction="none")


def compute_gate_gradients(
    model: nn.Module, gates: UnitGates, batch: Examples, gate: Tensor
) -> Tensor:
    """Return d loss / d gate of each example, [n, units], where its gates are `gate` [n, units]."""
    gate = gate.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = compute_losses(model, gates, batch, gate).sum()
    return torch.autograd.grad(loss, gate)[0].double()


def compute_reference_gradient(
    model: nn.Module, gates: UnitGates, reference: Examples, closed: frozenset[int] = frozenset()
) -> Tensor:
    """Return d mean loss / d gate of the reference batch, [units], with these gates closed."""
    gate = torch.ones(1, gates.count, device=reference.label.device)
    gate[0, list(closed)] = 0
    gate.requires_grad_()
    total = torch.zeros(gates.count, dtype=torch.float64, device=gate.device)
    for rows in torch.arange(len(reference)).split(ROWS):
        with torch.enable_grad():
            loss = compute_losses(model, gates, reference.take(rows), gate).sum()
        total += torch.autograd.grad(loss, gate)[0][0].double()
    return total / len(reference)


@torch.no_grad()
def compute_activations(model: nn.Module, gates: UnitGates, batch: Examples) -> Tensor:
    """Return each unit's mean absolute activation over positions, [n, units]."""
    found = []
    for rows in torch.arange(len(batch)).split(ROWS):
        with gates.recording() as seen:
            run_gated(model, gates, batch.take(rows))
        found.append(torch.cat([seen[site.name] for site in gates.sites], dim=1).double())
    return torch.cat(found)


def all_open(gates: UnitGates, batch: Examples) -> Tensor:
    return torch.ones(len(batch), gates.count, device=batch.label.device)


# ---------------------------------------------------------------- the localizers


def score_flipping(
    model: nn.Module,
    gates: UnitGates,
    batch: Examples,
    reference: Examples,
    steps: int = GREEDY_STEPS,
) -> Tensor:
    """Score units by the order in which the greedy search of Section 6.1 closes them.

    Each step closes the open unit with the highest gain (see `score_gate_gain`) given the units
    that are closed already. The search goes on for `steps` units whether the prediction flips or
    not, so that every example has a ranking; the remaining units follow by their gain after it.
    """
    on, known = gates.on(batch.index), {}
    closed: list[list[int]] = [[] for _ in range(len(batch))]

    def common(numbers: list[int]) -> Tensor:
        key = frozenset(numbers)
        if key not in known:
            known[key] = compute_reference_gradient(model, gates, reference, key)
        return known[key]

    steps = min(steps, int(on.sum(1).min()))
    for step in range(steps + 1):
        gate = all_open(gates, batch)
        for row, numbers in enumerate(closed):
            gate[row, numbers] = 0
        own = compute_gate_gradients(model, gates, batch, gate)
        gain = torch.stack([common(numbers) for numbers in closed]) - own
        if step < steps:
            allowed = gain.masked_fill(~on | (gate == 0), -torch.inf)
            for numbers, best in zip(closed, allowed.argmax(1).tolist()):
                numbers.append(best)
    for row, numbers in enumerate(closed):
        highest = gain[row].abs().max() + 1
        for place, number in enumerate(numbers):
            gain[row, number] = highest + steps - place
    return gain


def score_gate_gain(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples
) -> Tensor:
    """Score units by the first-order gain of closing them, with all others open.

    It is the rise of the example's loss less that of the reference batch's mean loss: the first
    step of the greedy search.
    """
    own = compute_gate_gradients(model, gates, batch, all_open(gates, batch))
    return compute_reference_gradient(model, gates, reference) - own


def score_activation_gradient(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples
) -> Tensor:
    """Score units by activation times gradient: the first-order rise of the loss on closing them.

    The sum over positions of activation times (d loss / d activation) is d loss / d gate.
    """
    return -compute_gate_gradients(model, gates, batch, all_open(gates, batch))


def score_integrated_gradients(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples, nodes: int = NODES
) -> Tensor:
    """Score units by integrated gradients (Sundararajan et al., 2017) from all gates 0 to all 1.

    An example's scores sum to its loss with everything closed less its loss with everything open.
    """
    place, weight = np.polynomial.legendre.leggauss(nodes)
    total = torch.zeros(len(batch), gates.count, dtype=torch.float64, device=batch.label.device)
    for at, part in zip((place + 1) / 2, weight / 2):
        gate = torch.full_like(all_open(gates, batch), float(at))
        total -= float(part) * compute_gate_gradients(model, gates, batch, gate)
    return total


@torch.no_grad()
def score_zero_out(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples
) -> Tensor:
    """Score units by the exact rise of the example's loss when they alone are closed."""
    on, found = gates.on(batch.index), []
    for row in range(len(batch)):
        example = batch.take(slice(row, row + 1))
        before = compute_losses(model, gates, example)
        rise = torch.zeros(gates.count, dtype=torch.float64, device=before.device)
        for numbers in on[row].nonzero().flatten().split(ROWS):
            gate = torch.ones(len(numbers), gates.count, device=before.device)
            gate[torch.arange(len(numbers)), numbers] = 0
            copies = example.take(torch.zeros(len(numbers), dtype=torch.long))
            rise[numbers] = compute_losses(model, gates, copies, gate) - before
        found.append(rise)
    return torch.stack(found)


def score_activation(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples
) -> Tensor:
    """Score units by their mean absolute activation for the example."""
    return compute_activations(model, gates, batch)


def score_unitmem(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples
) -> Tensor:
    """Score units by UnitMem's selectivity (Wang et al., 2024), with the mean as in its text.

    A unit's activation for the example, a, and the mean over the reference examples, m, give
    (a - m) / (a + m). UnitMem takes the example with the highest activation for a; here it is the
    example asked about. Reference examples pass under that example's mask, so that the mask itself
    makes no unit selective.
    """
    found = []
    for row, own in enumerate(compute_activations(model, gates, batch)):
        others = reference.take(other_images(reference, batch.images[row]))
        others = others.under_masks_of(batch.index[row])
        found.append(_selectivity(own, compute_activations(model, gates, others).mean(0)))
    return torch.stack(found)


def score_unitmem_own_masks(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples
) -> Tensor:
    """Score units as `score_unitmem` does, with each reference example under its own mask.

    A memorization neuron is off for most reference examples, which makes it selective whatever it
    holds: this score reads the mask as much as the memory.
    """
    others, found = compute_activations(model, gates, reference), []
    for row, own in enumerate(compute_activations(model, gates, batch)):
        mean = others[other_images(reference, batch.images[row])].mean(0)
        found.append(_selectivity(own, mean))
    return torch.stack(found)


def other_images(reference: Examples, image: Tensor) -> Tensor:
    """Return which reference examples have another image: bool [n].

    Indices do not tell: under another example's mask they say whose mask it is.
    """
    return (reference.images != image).flatten(1).any(1)


def _selectivity(own: Tensor, mean: Tensor) -> Tensor:
    total = own + mean
    return torch.where(total > 0, (own - mean) / total.clamp(min=1e-300), 0.0)


def score_random(
    model: nn.Module, gates: UnitGates, batch: Examples, reference: Examples
) -> Tensor:
    """Score units at random; the example's index decides the numbers."""
    streams = (random_stream("random localizer", index) for index in batch.index.tolist())
    scores = np.stack([stream.random(gates.count) for stream in streams])
    return torch.from_numpy(scores).to(batch.label.device)


Localizer = Callable[[nn.Module, UnitGates, Examples, Examples], Tensor]

LOCALIZERS: Mapping[str, Localizer] = {
    "flipping": score_flipping,
    "gate_gain": score_gate_gain,
    "zero_out": score_zero_out,
    "activation": score_activation,
    "activation_gradient": score_activation_gradient,
    "integrated_gradients": score_integrated_gradients,
    "unitmem": score_unitmem,
    "unitmem_own_masks": score_unitmem_own_masks,
    "random": score_random,
}


def rank_units(score: Tensor, on: Tensor) -> Tensor:
    """Return the numbers of the units that are on for one example, the highest score first."""
    units = on.nonzero().flatten()
    return units[score[units].argsort(descending=True, stable=True)]
