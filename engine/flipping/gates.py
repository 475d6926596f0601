"""Neurons: what can be switched off in a model one by one, and what each does to a loss.

A neuron is an output channel of a convolution, an output feature of an inner linear layer (of a
transformer's blocks, of an MLP), or a single weight of the final linear layer. Each has a gate m
that multiplies it: 1 is open, 0 is closed. Gates are numbered through the whole model, in forward
order.

How a gate acts is `ablate`. 'activation' multiplies what leaves the layer, after its batch norm;
that a ReLU follows makes no difference, neither at m = 0 nor for the derivative at m = 1. 'weight'
multiplies the layer's weights, so that its bias or its batch norm still emits a constant.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engine.errors import RunFailed
from models.layer_groups import LayerGroup, StagedModel, layer_groups
from models.wiring import Wiring


@dataclass(frozen=True)
class Site:
    """A layer with gates: the numbers first ... first + count - 1."""

    name: str  # of the layer that the neurons belong to
    group: int  # the layer group's index
    module: nn.Module  # whose output is gated: the layer itself, or its batch norm
    shape: tuple[int, ...]  # (channels,), or (classes, features) of single weights
    first: int
    constant: Tensor | None  # a bias that gates leave alone

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def numbers(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def of_weights(self) -> bool:
        return len(self.shape) == 2

    @property
    def of_images(self) -> bool:
        """Channels lie in dimension 1, else in the last."""
        return not isinstance(self.module, nn.Linear)

    def describe(self, number: int) -> str:
        """A gate's name: layer:channel, or layer:class:feature of a single weight."""
        place = number - self.first
        parts = divmod(place, self.shape[1]) if self.of_weights else (place,)
        return ":".join([self.name, *map(str, parts)])


@dataclass(frozen=True)
class _Layer:
    """A layer that may have neurons, and the batch norm that its output goes through."""

    name: str
    module: nn.Module
    norm: nn.Module | None
    final: bool = False  # its neurons are single weights


def neuron_sites(model: StagedModel, ablate: str = "activation") -> list[Site]:
    """Return every layer of the model with neurons, in forward order."""
    groups = layer_groups(model)
    layers = _declared(model) if model.wiring is None else _wired(model, model.wiring)
    sites, first = [], 0
    for layer in layers:
        module, gated, constant = layer.module, layer.module, None
        if ablate == "weight" and not layer.final:
            constant = module.bias
        elif layer.norm is not None:
            gated = layer.norm
        group = _group_of(model, groups, gated)
        shape = tuple(module.weight.shape) if layer.final else (len(module.weight),)
        sites.append(Site(layer.name, group, gated, shape, first, constant))
        first += sites[-1].count
    if not sites:
        raise RunFailed("the network has no convolution and no linear layer, so no neurons")
    return sites


def _declared(model: StagedModel) -> list[_Layer]:
    """Return the layers of a model that declares its modules in forward order, as ours do."""
    groups = layer_groups(model)
    leaves = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
    final = [name for name, module in leaves if isinstance(module, nn.Linear)][-1]
    layers = []
    for (name, module), (_, following) in zip(leaves, [*leaves[1:], ("", None)]):
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        in_block = 0 < _group_of(model, groups, module) < groups[-1].index
        if isinstance(module, nn.Linear) and not in_block and name != final:
            continue
        norm = following if isinstance(following, nn.BatchNorm2d) else None
        layers.append(_Layer(name, module, norm, name == final))
    return layers


def _wired(model: StagedModel, wiring: Wiring) -> list[_Layer]:
    """Return the layers that were seen to run, each with the batch norm that takes its output.

    The last one's output are the logits: its neurons are single weights if it is a linear layer,
    and it has none otherwise. A linear layer on tokens in the first group embeds the image's
    patches, and has none either.
    """
    groups, layers = layer_groups(model), []
    for wired in wiring.layers:
        module = model.get_submodule(wired.name)
        if wired is wiring.layers[-1]:
            if type(module) is nn.Linear:
                layers.append(_Layer(wired.name, module, None, final=True))
        elif not (wired.tokens and _group_of(model, groups, module) == 0):
            norm = model.get_submodule(wired.norm) if wired.norm else None
            if isinstance(norm, nn.Identity):  # folded into the layer
                norm = None
            layers.append(_Layer(wired.name, module, norm))
    return layers


def _group_of(model: StagedModel, groups: Sequence[LayerGroup], module: nn.Module) -> int:
    """Return the index of the layer group that a module with tensors belongs to."""
    name = next(name for name, found in model.named_modules() if found is module)
    tensor = f"{name}.{next(iter(module.state_dict()))}"
    return next(group.index for group in groups if group.owns(tensor))


@dataclass(frozen=True)
class Tap:
    """Record of a gated layer in a forward pass: enough to differentiate by its gates."""

    site: Site
    value: Tensor  # what the gates multiply; of single weights, what they are multiplied with
    output: Tensor  # the backward pass needs to reach no further down than the lowest output


class Gates:
    """The gates of a model, in force inside of `with Gates(model, ablate) as gates`.

    A batch holds one or several sets of closed gates: its rows are shared out among the sets
    evenly and in order. Examples are independent of one another (the model is in eval mode), so
    one backward pass differentiates by the gates of every set, and by no weight.
    """

    def __init__(self, model: StagedModel, ablate: str = "activation") -> None:
        self.sites = neuron_sites(model, ablate)
        self.count = sum(site.count for site in self.sites)
        self.parameter = next(model.parameters())  # for its device and type
        # torchvision's ResNets change outputs in place, which a tap must not see.
        in_place = any(getattr(module, "inplace", False) for module in model.modules())
        self.in_place = in_place or model.wiring is not None
        self.close([()])

    def __enter__(self) -> "Gates":
        self._handles = [
            site.module.register_forward_hook(partial(self._act, site)) for site in self.sites
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def close(self, sets: Sequence[Collection[int]]) -> None:
        """Close these gates from now on, for each set of a batch; open all others."""
        open_ = torch.ones(len(sets), self.count)
        for row, numbers in enumerate(sets):
            open_[row, list(numbers)] = 0
        self._touched = {s.name for s in self.sites if not open_[:, s.numbers].all()}
        self._open = open_.to(self.parameter, non_blocking=True)
        self._taps: list[Tap] = []

    def take_taps(self) -> list[Tap]:
        """Return the taps of the forward passes since the last call of `close` or of this."""
        taps, self._taps = self._taps, []
        return taps

    def site_of(self, number: int) -> Site:
        return next(site for site in self.sites if number < site.first + site.count)

    def first_group(self, numbers: Collection[int], default: int) -> int:
        """The lowest layer group that one of these gates lies in."""
        return min((self.site_of(number).group for number in numbers), default=default)

    # ------------------------------------------------------------ forward

    def _act(self, site: Site, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook: the layer's output with gates, remembered if it will be needed."""
        value = inputs[0] if site.of_weights else output
        if site.name in self._touched:
            open_ = self._open[:, site.numbers]
            gate = self._weight_gate if site.of_weights else self._output_gate
            output = gate(site, module, value, open_)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output.requires_grad_()
        if site.constant is not None:
            value = value - _beside_channels(site, site.constant, value)
        self._taps.append(Tap(site, value.detach(), output))
        return output.clone() if self.in_place else output

    def _output_gate(self, site: Site, module: nn.Module, value: Tensor, open_: Tensor) -> Tensor:
        each = open_.to(value.dtype).repeat_interleave(len(value) // len(open_), 0)
        each = _beside_channels(site, each, value)
        if site.constant is None:
            return value * each
        constant = _beside_channels(site, site.constant, value)
        return (value - constant) * each + constant

    def _weight_gate(self, site: Site, module: nn.Linear, x: Tensor, open_: Tensor) -> Tensor:
        weight = module.weight * open_.unflatten(1, site.shape)
        each = x.unflatten(0, (len(open_), -1)).flatten(1, -2)  # tokens are rows like any other
        output = (each @ weight.mT).view(*x.shape[:-1], -1)
        return output if module.bias is None else output + module.bias

    # ------------------------------------------------------------ backward

    def gradients(self, taps: Sequence[Tap], gradients: Sequence[Tensor], sets: int) -> Tensor:
        """d loss / d m at m = 1, [sets, gates], from the gradients of the taps' outputs.

        Gates of layers without a tap get 0. What a closed gate gets means nothing.
        """
        found = self.parameter.new_zeros(sets, self.count)
        for tap, gradient in zip(taps, gradients):
            value = _per_set(tap.value, sets, tap.site.of_images)
            gradient = _per_set(gradient, sets, tap.site.of_images)
            if tap.site.of_weights:
                by_gate = gradient.mT @ value * tap.site.module.weight.detach()
            else:
                by_gate = (value * gradient).sum(1)
            found[:, tap.site.numbers] += by_gate.flatten(1)  # a layer may run more than once
        return found


def _per_set(values: Tensor, sets: int, images: bool) -> Tensor:
    """[rows, channels, h, w] or [rows, ..., channels] as [sets, everything else, channels]."""
    channels_last = values.movedim(1, -1) if images and values.dim() == 4 else values
    return channels_last.reshape(sets, -1, channels_last.shape[-1])


def _beside_channels(site: Site, values: Tensor, output: Tensor) -> Tensor:
    """[..., channels], in a shape that broadcasts against a layer's output."""
    if output.dim() == 4 and site.of_images:
        return values[..., None, None]
    if values.dim() == 1:
        return values
    return values.unflatten(0, (len(values), *[1] * (output.dim() - 2)))
