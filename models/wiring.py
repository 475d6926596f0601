"""Observe which layers run in a network, in which order, and which batch norm stands behind which.

The order in which modules are declared says little about a network that is not ours: in a
pre-activation network the batch norm declared behind a convolution takes another tensor. So a small
batch goes through in eval mode, every call of a torch function is watched, and a batch norm belongs
to a layer only if it is the one consumer of the layer's output.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LAYERS = (nn.Conv2d, nn.Linear)
_CHANNELS = {  # dim, of images
    F.conv2d: 1,
    F.batch_norm: 1,
    F.linear: -1,
    F.layer_norm: -1,
    F.rms_norm: -1,
}
_REARRANGING = {
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "__get__"),
    *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("matmul", "bmm", "einsum", "scaled_dot_product_attention"),
}  # functions after which channels may lie in another dimension
CLOSE = 1e-3  # of one image's output beside other images, relative: kernels may round differently


@dataclass(frozen=True)
class WiredLayer:
    """A convolution or a linear layer, as it ran."""

    name: str
    norm: str | None  # the batch norm that alone takes its output
    tokens: bool  # it ran on more than one vector an example: [batch, tokens, features]


@dataclass(frozen=True)
class Output:
    """A module's output: its number of channels and the dimension in which they lie."""

    channels: int
    dim: int


@dataclass(frozen=True)
class Wiring:
    """Layers in the order in which they run, and the outputs of modules by name.

    Outputs are in the order in which the modules end; the network's own, the logits, is left out.
    """

    layers: tuple[WiredLayer, ...]
    outputs: Mapping[str, Output]

    @property
    def norms(self) -> dict[str, str]:
        """Each layer's batch norm, where it has one."""
        return {layer.name: layer.norm for layer in self.layers if layer.norm is not None}


@dataclass
class _Watch(TorchFunctionMode):
    """Count the torch functions that take each tensor and give a tensor back."""

    inside: list[nn.Module] = field(default_factory=list)  # the modules that run, innermost last
    uses: Counter[int] = field(default_factory=Counter)  # by id
    dims: dict[int, int] = field(default_factory=dict)  # id of a 4-d tensor -> dim of its channels
    kept: list[Tensor] = field(default_factory=list)  # alive, so that no id is used twice
    functional_norm: bool = False

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is F.batch_norm and not isinstance(
            self.inside[-1] if self.inside else None, nn.modules.batchnorm._BatchNorm
        ):
            self.functional_norm = True
        if made := [*_tensors(result)]:
            taken = [*_tensors((args, kwargs))]
            self.kept += [*taken, *made]
            self.uses.update(map(id, taken))
            # A norm of [C, H, W] says nothing about the channels.
            whole = function in (F.layer_norm, F.rms_norm) and len(args[1]) > 1
            self._follow_channels(None if whole else function, taken, made)
        return result

    def _follow_channels(
        self, function: Callable | None, taken: list[Tensor], made: list[Tensor]
    ) -> None:
        """Note the dimension of the channels: known from the function, else from what it takes."""
        if function in _CHANNELS:
            self.dims.setdefault(id(taken[0]), _CHANNELS[function])
            self.dims[id(made[0])] = _CHANNELS[function]
        elif getattr(function, "__name__", "") not in _REARRANGING:
            known = (self.dims[id(t)] for t in taken if t.dim() == 4 and id(t) in self.dims)
            if (dim := next(known, None)) is not None:
                self.dims.update((id(tensor), dim) for tensor in made if tensor.dim() == 4)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@dataclass
class _Calls:
    """Record the calls of a model's modules by hooks: what went in and what came out."""

    watch: _Watch
    runs: list[tuple[str, nn.Module, Tensor | None, Tensor | None]] = field(default_factory=list)

    def before(self, module: nn.Module, inputs: tuple) -> None:
        self.watch.inside.append(module)

    def after(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            self.watch.inside.pop()
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            result = output if isinstance(output, Tensor) else None
            self.watch.kept.extend(_tensors((inputs, output)))
            self.runs.append((name, module, first, result))

        return hook


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> Wiring:
    """Run the images through a model in eval mode and return what was seen.

    There are two or more images, on the model's device. The model's mode is put back. Raise
    ValueError where dimension 0 of a module's output does not hold the images in their order.
    """
    calls = _watched(model, images)
    if calls.watch.functional_norm:
        raise ValueError(
            "a batch norm that is a function (F.batch_norm): no experiment would see it; use "
            "nn.BatchNorm2d"
        )
    changed = _watched(model, torch.cat([images[:-1], 1 - 2 * images[-1:]]))
    _require_batch_first(calls, changed, len(images))
    return Wiring(_layers(calls), _outputs(calls))


def _watched(model: nn.Module, images: Tensor) -> _Calls:
    images = images.clone()  # a model may write into its input
    watch = _Watch()
    calls = _Calls(watch)
    modes = {module: module.training for module in model.modules()}
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(calls.before))
        handles.append(module.register_forward_hook(calls.after(name)))
    try:
        model.eval()
        with watch:
            watch.dims[id(images)] = 1
            model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return calls


def _require_batch_first(calls: _Calls, changed: _Calls, count: int) -> None:
    """Raise if another last image changes the first half of the rows of a module's output.

    Where the rows cannot be shared out among the images evenly, it may change no row.
    """
    if [name for name, *_ in calls.runs] != [name for name, *_ in changed.runs]:
        raise ValueError("which modules run depends on the images")
    for (name, *_, output), (*_, other) in zip(calls.runs, changed.runs):
        if output is None or output.dim() < 2 or not output.is_floating_point():
            continue
        rows = len(output) if len(output) % count else len(output) // 2
        alike = other is not None and other.shape == output.shape
        if not alike or (output - other)[:rows].norm() > CLOSE * output[:rows].norm():
            raise ValueError(
                f"{name or 'logits'}: its output for one image changes with another image of the "
                "batch; put the batch first (batch_first=True)"
            )


def _layers(calls: _Calls) -> tuple[WiredLayer, ...]:
    """Return the layers in forward order, each with its batch norm."""
    times = Counter(name for name, *_ in calls.runs)
    norm_of: dict[int, str] = {}  # id of the tensor that a batch norm takes -> the norm's name
    for name, module, first, _ in calls.runs:
        if _is_fixed_norm(module) and times[name] == 1 and first is not None:
            norm_of[id(first)] = name
    found: dict[str, WiredLayer] = {}
    for name, module, _, output in calls.runs:
        if not isinstance(module, LAYERS) or output is None or name in found:
            continue
        alone = times[name] == 1 and calls.watch.uses[id(output)] == 1
        norm = norm_of.get(id(output)) if alone else None
        tokens = isinstance(module, nn.Linear) and output.dim() > 2
        found[name] = WiredLayer(name, None if tokens else norm, tokens)
    return tuple(found.values())


def _is_fixed_norm(module: nn.Module) -> bool:
    """Tell whether a batch norm does the same to every example in eval mode."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    return isinstance(module, norms) and module.running_mean is not None


def _outputs(calls: _Calls) -> dict[str, Output]:
    """Return the outputs of modules that ran once, where the dimension of channels is known.

    The network itself is the last of the runs.
    """
    times = Counter(name for name, *_ in calls.runs)
    logits = calls.runs[-1][-1]
    found = {}
    for name, _, _, output in calls.runs:
        if times[name] > 1 or output is None or output is logits or output.dim() < 2:
            continue
        dim = calls.watch.dims.get(id(output)) if output.dim() == 4 else -1
        if dim is not None:
            found[name] = Output(output.shape[dim], dim)
    return found
