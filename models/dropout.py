"""Dropout that ties neurons to examples (Section 6.2), and the two baselines of Table 3.

This file needs nothing but torch: take it into your own code.

`ExampleTiedDropout` keeps the first channels always on; they learn what all examples share. Every
other channel is on for an example with a fixed probability p_mem, decided once per example: these
channels memorize, and are dropped after training.

>>> model = torch.nn.Sequential(torch.nn.Linear(3, 10), ExampleTiedDropout(10, n_examples=500))
>>> images, index = torch.randn(2, 3), torch.tensor([7, 499])
>>> with examples(model, index):         # training: each example under its own mask
...     hidden = model(images)
>>> with dropout_mode(model, "drop"):    # testing: without memorization channels
...     hidden = model(images)
>>> hidden[:, 4:].count_nonzero().item()
0

Your own forward can also call the layer with the indices: `self.dropout(x, index)`. Indices are a
tensor, a NumPy array or a list of whole numbers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

MODES = ("memorize", "drop", "expected")
Indices = Tensor | Sequence[int]  # or a NumPy array


def _scrambled(x: Tensor) -> Tensor:
    """Map the numbers below 2^32 one to one and seemingly at random: T. Mueller's integer hash.

    No product overflows int64, so every device and version of torch gives the same numbers.
    """
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _keys(count: int, *names: int) -> Tensor:
    """Return a 32-bit number for each of 0 ... count - 1, decided by the names alone."""
    key = torch.zeros((), dtype=torch.int64)
    for name in names:
        key = _scrambled(_scrambled(key) ^ (name & 0xFFFFFFFF))
    return _scrambled(_scrambled(key) ^ torch.arange(count))


def tied_masks(n_examples: int, channels: int, p: float, seed: int, layer: int = 0) -> Tensor:
    """Return bool [n_examples, channels]: True with probability p, by (seed, layer, example)."""
    example, channel = _keys(n_examples, seed, layer, 0), _keys(channels, seed, layer, 1)
    masks = torch.empty(n_examples, channels, dtype=torch.bool)
    for rows in torch.arange(n_examples).split(8192):  # eight bytes per number: in parts
        masks[rows] = _scrambled(example[rows, None] ^ channel) < round(p * 2**32)
    return masks


def kept_channels(p: float, channels: int) -> int:
    """Return floor(p * channels), with 0.29 * 100 = 29 in spite of binary fractions."""
    if not 0 < p <= 1:
        raise ValueError(f"the share of channels must be above 0, at most 1, not {p}")
    kept = math.floor(p * channels + 1e-9)
    if kept == 0:
        raise ValueError(f"a share of {p:g} of {channels} channels is none at all")
    return kept


class DropoutLayer(nn.Module):
    """Base of the three kinds; `dim` is the dimension of channels (1 for images, -1 for tokens).

    They have no weights, and a state_dict does not contain their masks, which are recomputed.
    """

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def gated(self, activations: Tensor, gate: Tensor) -> Tensor:
        """Multiply the activations by a gate [1 or n, channels]."""
        if activations.shape[self.dim] != gate.shape[1]:
            raise ValueError(
                f"the layer has {gate.shape[1]} channels, its input {activations.shape[self.dim]} "
                f"in dimension {self.dim}"
            )
        shape = [1] * activations.ndim
        shape[0], shape[self.dim] = gate.shape
        return activations * gate.to(activations.dtype).view(shape)

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Apply the layer as a forward hook of another module."""
        return self(output)


class ExampleTiedDropout(DropoutLayer):
    """Keep the first floor(p_gen * channels) channels for all examples, each other for some.

    Masks take one byte per example and memorization channel, in buffers that cannot be averaged
    (torch's AveragedModel: use_buffers=False). Indices are below `n_examples`; `layer` gives each
    layer of a model its own masks. Modes, which `dropout_mode` sets:

    memorize  each example has its own mask; in eval mode without index, like 'expected'
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
        if n_examples < 1:
            raise ValueError(f"n_examples must be 1 or more, not {n_examples}")
        self.p_gen, self.p_mem = p_gen, p_mem
        self.generalization = kept_channels(p_gen, channels)
        masks = tied_masks(n_examples, channels - self.generalization, p_mem, seed, layer)
        self.register_buffer("masks", masks, persistent=False)
        self.mode, self.rescale = "memorize", False
        self.index: Tensor | None = None  # indices of the examples in the next forward pass
        self.forgotten: Tensor | None = None  # bool [memorization channels], off for all examples

    def extra_repr(self) -> str:
        n_examples, tied = self.masks.shape
        return (
            f"channels={self.generalization + tied}, n_examples={n_examples}, "
            f"p_gen={self.p_gen}, p_mem={self.p_mem}"
        )

    def forward(self, activations: Tensor, index: Indices | None = None) -> Tensor:
        if self.masks.shape[1] == 0:
            return activations
        index = self.index if index is None else index
        index = None if index is None else torch.as_tensor(index)
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
        """Return the gate [1 or n, memorization channels]."""
        if self.mode == "memorize" and index is not None:
            return self._masks_of(index)
        if self.mode == "memorize" and self.training:
            raise ValueError("example-tied dropout needs the indices of the examples it trains on")
        on = 0.0 if self.mode == "drop" else self.p_mem
        return torch.full((1, self.masks.shape[1]), on, device=self.masks.device)

    def _masks_of(self, index: Tensor) -> Tensor:
        """Return the masks of these examples; unlike masks[index], refuse negative indices."""
        index = index.to(self.masks.device)
        if torch.compiler.is_compiling():
            return self.masks.index_select(0, index)
        try:
            return self.masks.index_select(0, index)
        except IndexError:
            n = len(self.masks)
            raise IndexError(
                f"index out of range: there are masks for the indices 0 to {n - 1} (n_examples={n})"
            ) from None


def _require_one_each(index: Tensor, count: int) -> None:
    """Raise ValueError unless there is one whole number for each example."""
    if index.shape != (count,) or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{count} examples need {count} indices, int64 [{count}]; "
            f"these are {str(index.dtype).removeprefix('torch.')} {list(index.shape)}"
        )


def random_gate(like: Tensor, p: float) -> Tensor:
    """Draw a tensor of the same shape: 1/p with probability p, else 0.

    On a CPU four numbers share 64 random bits, which is several times faster than one Bernoulli
    draw for each. The probability is then the nearest multiple of 2^-16 other than 0 and 1, and the
    expectation is exactly 1.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return nn.functional.dropout(torch.ones_like(like), 1 - p)
    share = min(max(1, round(p * 2**16)), 2**16 - 1)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64)
    bits = words.random_(-(2**63), None).view(torch.int16)[: like.numel()]
    gate = torch.empty_like(like)  # dense, in the memory order of `like`
    kept = bits.as_strided(gate.shape, gate.stride()) < share - 2**15
    return gate.copy_(kept).mul_(2**16 / share)


class StandardDropout(DropoutLayer):
    """Keep each activation with probability p, drawn at every training step.

    With `whole_channels`, keep or drop each channel of each example as a whole.
    """

    def __init__(self, p: float, whole_channels: bool = False, dim: int = 1):
        super().__init__(dim)
        if not 0 < p <= 1:
            raise ValueError(f"the probability to stay must be above 0, at most 1, not {p}")
        self.p, self.whole_channels = p, whole_channels

    def forward(self, activations: Tensor, index: Tensor | None = None) -> Tensor:
        if not self.training or self.p == 1:
            return activations
        if self.whole_channels:
            channels = activations.new_empty(len(activations), activations.shape[self.dim])
            return self.gated(activations, random_gate(channels, self.p))
        return activations * random_gate(activations, self.p)


class SparseDropout(DropoutLayer):
    """Keep floor(p * channels) channels, chosen once at random; the others are always zero."""

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
    """Container of the layers that hooks call; an identity where a Sequential calls it."""

    def forward(self, activations: Tensor) -> Tensor:
        return activations


def tied_layers(model: nn.Module) -> list[ExampleTiedDropout]:
    """Return the model's example-tied dropout layers."""
    return [module for module in model.modules() if isinstance(module, ExampleTiedDropout)]


def insert_dropout(model: nn.Module, layers: Mapping[str, DropoutLayer]) -> None:
    """Insert a layer behind each named module, without renaming any weight.

    The layers become the model's module `inserted_dropout`, the last one of a Sequential.
    """
    modules = [model.get_submodule(name) for name in layers]  # find all before changing any
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
    """Set attributes of the layers, and restore each layer's own values on exit."""
    before = [{name: getattr(layer, name) for name in values} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(values)
        yield
    finally:
        for layer, old in zip(layers, before):
            vars(layer).update(old)


def examples(model: nn.Module, index: Indices | None) -> AbstractContextManager[None]:
    """Set the indices of the examples that go through the model; None: examples without masks.

    To be used in a `with` statement, as all that follows.
    """
    return _changed(tied_layers(model), index=index)


def dropout_mode(
    model: nn.Module, mode: str, rescale: bool = False
) -> AbstractContextManager[None]:
    """Set all example-tied layers to a mode: memorize, drop or expected.

    With `rescale`, 'drop' multiplies the remaining channels by (p_gen + p_mem) / p_gen. Train and
    eval mode stay as they are.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; there are {', '.join(MODES)}")
    return _changed(tied_layers(model), mode=mode, rescale=rescale)


@contextmanager
def forget(model: nn.Module, index: Indices | int) -> Iterator[None]:
    """Drop the memorization channels that are tied to any of these examples, for all examples.

    Inside of another `forget` those of its examples stay dropped, too.
    """
    layers = tied_layers(model)
    if not layers:
        raise ValueError("the model has no example-tied dropout: nothing can be forgotten")
    chosen = torch.as_tensor(index).reshape(-1)
    if len(chosen) and (chosen.is_floating_point() or chosen.dtype == torch.bool):
        kind = str(chosen.dtype).removeprefix("torch.")
        raise ValueError(f"examples to forget are named by whole numbers; these are {kind}")
    chosen = chosen.long()
    before = [layer.forgotten for layer in layers]
    with _changed(layers, forgotten=None):
        for layer, outer in zip(layers, before):
            own = layer._masks_of(chosen).any(dim=0)
            layer.forgotten = own if outer is None else own | outer
        yield
