"""Dropout that ties neurons to examples (Section 6.2), and the two baselines of Table 3.

This file needs nothing but torch: take it into your own code.

`ExampleTiedDropout` keeps the first channels always on; they learn what all examples share. Every
other channel is on for an example with probability p_mem, always the same ones: there the network
can write down what it cannot learn, and afterwards they are dropped.

>>> model = torch.nn.Sequential(torch.nn.Linear(3, 10), ExampleTiedDropout(10, n_examples=500))
>>> images, index = torch.randn(2, 3), torch.tensor([7, 499])
>>> with examples(model, index):         # each under its own mask: train like this
...     hidden = model(images)
>>> with dropout_mode(model, "drop"):    # without what was memorized: test like this
...     hidden = model(images)
>>> hidden[:, 4:].count_nonzero().item()
0

In a forward of your own you can also call the layer with the indices: `self.dropout(x, index)`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

MODES = ("memorize", "drop", "expected")


def _scrambled(x: Tensor) -> Tensor:
    """A bijection of the numbers below 2^32 that looks random: T. Mueller's integer hash.

    No product leaves int64, so that every device and version of torch gives the same numbers.
    """
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _keys(count: int, *names: int) -> Tensor:
    """One 32-bit number for each of 0 ... count - 1, decided by the names and by nothing else."""
    key = torch.zeros((), dtype=torch.int64)
    for name in names:
        key = _scrambled(_scrambled(key) ^ (name & 0xFFFFFFFF))
    return _scrambled(_scrambled(key) ^ torch.arange(count))


def tied_masks(n_examples: int, channels: int, p: float, seed: int, layer: int = 0) -> Tensor:
    """bool [n_examples, channels]: True with probability p, fixed by (seed, layer, example)."""
    example, channel = _keys(n_examples, seed, layer, 0), _keys(channels, seed, layer, 1)
    masks = torch.empty(n_examples, channels, dtype=torch.bool)
    for rows in torch.arange(n_examples).split(8192):  # eight bytes a number: not all at once
        masks[rows] = _scrambled(example[rows, None] ^ channel) < round(p * 2**32)
    return masks


def kept_channels(p: float, channels: int) -> int:
    """floor(p * channels), where 0.29 * 100 is 29 in spite of binary fractions."""
    if not 0 < p <= 1:
        raise ValueError(f"the share of channels must be above 0, at most 1, not {p}")
    kept = math.floor(p * channels + 1e-9)
    if kept == 0:
        raise ValueError(f"a share of {p:g} of {channels} channels is none at all")
    return kept


class DropoutLayer(nn.Module):
    """What the three kinds share: `dim` says where channels are (1 for images, -1 for tokens).

    None has weights, and their masks are no part of a state_dict: they can be made again.
    """

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def gated(self, activations: Tensor, gate: Tensor) -> Tensor:
        """The activations times a gate [1 or n, channels]."""
        shape = [1] * activations.ndim
        shape[0], shape[self.dim] = gate.shape
        return activations * gate.to(activations.dtype).view(shape)

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return self(output)


class ExampleTiedDropout(DropoutLayer):
    """The first floor(p_gen * channels) channels for all, the others for some examples each.

    Masks take one byte for every example and memorization channel, in buffers of which no average
    can be taken (torch's AveragedModel: use_buffers=False). Indices are below `n_examples`; `layer`
    keeps the masks of a model's layers apart. Modes, which `dropout_mode` sets:

    memorize  each example has its own mask; unseen ones, in eval mode without index, 'expected'
    drop      memorization channels are zero
    expected  memorization channels are multiplied by p_mem, the share of examples that use them
    """

    def __init__(
        self,
        channels: int,
        n_examples: int,
        p_gen: float = 0.4,
        p_mem: float = 0.2,
        seed: int = 0,
        layer: int = 0,
        dim: int = 1,
    ):
        super().__init__(dim)
        if not 0 <= p_mem <= 1:
            raise ValueError(f"p_mem must be from 0 to 1, not {p_mem}")
        self.p_gen, self.p_mem = p_gen, p_mem
        self.generalization = kept_channels(p_gen, channels)
        masks = tied_masks(n_examples, channels - self.generalization, p_mem, seed, layer)
        self.register_buffer("masks", masks, persistent=False)
        self.mode, self.rescale = "memorize", False
        self.index: Tensor | None = None  # of the examples in the next forward pass
        self.forgotten: Tensor | None = None  # bool [memorization channels], off for everybody

    def forward(self, activations: Tensor, index: Tensor | None = None) -> Tensor:
        if self.masks.shape[1] == 0:
            return activations
        index = self.index if index is None else index
        if index is not None and self.mode == "memorize":
            _require_one_each(index, len(activations))
        memorization = self._memorization_gate(index)
        if self.forgotten is not None:
            memorization = memorization * ~self.forgotten
        generalization = memorization.new_ones(len(memorization), self.generalization)
        if self.mode == "drop" and self.rescale:
            generalization = generalization * ((self.p_gen + self.p_mem) / self.p_gen)
        return self.gated(activations, torch.cat([generalization, memorization], dim=1))

    def _memorization_gate(self, index: Tensor | None) -> Tensor:
        """[1 or n, memorization channels]"""
        if self.mode == "memorize" and index is not None:
            # Unlike masks[index], this takes no negative index for one from the end.
            return self.masks.index_select(0, index.to(self.masks.device))
        if self.mode == "memorize" and self.training:
            raise ValueError("example-tied dropout needs the indices of the examples it trains on")
        on = 0.0 if self.mode == "drop" else self.p_mem
        return torch.full((1, self.masks.shape[1]), on, device=self.masks.device)


def _require_one_each(index: Tensor, count: int) -> None:
    """Raise unless these are whole numbers, one for each example."""
    if index.shape != (count,) or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{count} examples need {count} indices, int64 [{count}]; "
            f"these are {str(index.dtype).removeprefix('torch.')} {list(index.shape)}"
        )


class StandardDropout(DropoutLayer):
    """Every single activation is on with probability p, drawn anew at every training step."""

    def __init__(self, p: float):
        super().__init__()
        if not 0 < p <= 1:
            raise ValueError(f"the probability to stay must be above 0, at most 1, not {p}")
        self.p = p

    def forward(self, activations: Tensor, index: Tensor | None = None) -> Tensor:
        return nn.functional.dropout(activations, 1 - self.p, self.training)


class SparseDropout(DropoutLayer):
    """floor(p * channels) channels, chosen once at random, exist; the others never do."""

    def __init__(self, channels: int, p: float, seed: int = 0, layer: int = 0, dim: int = 1):
        super().__init__(dim)
        chosen = _keys(channels, seed, layer, 2).argsort()[: kept_channels(p, channels)]
        kept = torch.zeros(1, channels, dtype=torch.bool)
        kept[:, chosen] = True
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, activations: Tensor, index: Tensor | None = None) -> Tensor:
        return self.gated(activations, self.kept)


# ---------------------------------------------------------------- a whole model


class _Inserted(nn.ModuleList):
    """Holds the layers that hooks call; where a Sequential calls it, nothing happens."""

    def forward(self, activations: Tensor) -> Tensor:
        return activations


def tied_layers(model: nn.Module) -> list[ExampleTiedDropout]:
    return [module for module in model.modules() if isinstance(module, ExampleTiedDropout)]


def insert_dropout(model: nn.Module, layers: Mapping[str, DropoutLayer]) -> None:
    """Put a layer behind each named module; no weight of the model is renamed.

    The layers become the model's module `inserted_dropout`, the last one of a Sequential.
    """
    modules = [model.get_submodule(name) for name in layers]  # all of them, before anything changes
    for name, layer in layers.items():
        if not isinstance(layer, DropoutLayer):
            raise TypeError(f"{name}: {type(layer).__name__} is none of this file's layers")
    if not hasattr(model, "inserted_dropout"):
        model.inserted_dropout = _Inserted()
    model.inserted_dropout.extend(layers.values())
    for module, layer in zip(modules, layers.values()):
        module.register_forward_hook(layer.hook)


@contextmanager
def _changed(layers: list[ExampleTiedDropout], **values: object) -> Iterator[None]:
    """Attributes of layers that are put back afterwards, each layer's own."""
    before = [{name: getattr(layer, name) for name in values} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(values)
        yield
    finally:
        for layer, old in zip(layers, before):
            vars(layer).update(old)


def examples(model: nn.Module, index: Tensor | None) -> AbstractContextManager[None]:
    """Which examples go through the model inside; None: ones that have no mask of their own."""
    return _changed(tied_layers(model), index=index)


def dropout_mode(
    model: nn.Module, mode: str, rescale: bool = False
) -> AbstractContextManager[None]:
    """All example-tied layers in a mode: memorize, drop or expected.

    With `rescale`, 'drop' multiplies what is left by (p_gen + p_mem) / p_gen.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; there are {', '.join(MODES)}")
    return _changed(tied_layers(model), mode=mode, rescale=rescale)


@contextmanager
def forget(model: nn.Module, index: Tensor) -> Iterator[None]:
    """Drop, for everybody, the memorization channels that are tied to any of these examples."""
    layers = tied_layers(model)
    with _changed(layers, forgotten=None):
        for layer in layers:
            layer.forgotten = torch.atleast_2d(layer.masks[index]).any(dim=0)
        yield
