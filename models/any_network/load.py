"""Load a network by name: torchvision:NAME, or FILE.py:CALLABLE.

A file's code runs here, and only because the user's configuration names it.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from models.any_network.errors import NetworkError, last_line, nearest

TORCHVISION = "torchvision:"
ImageSize = int | tuple[int, int]


def is_name_of_network(name: str) -> bool:
    """Tell whether a name is of the form torchvision:NAME or FILE.py:CALLABLE."""
    return name.startswith(TORCHVISION) or network_file(name) is not None


def network_file(name: str) -> Path | None:
    """Return the file that a name of the form FILE.py:CALLABLE names; None of any other name."""
    path, colon, _ = name.rpartition(":")
    return Path(path).expanduser() if colon and path.endswith(".py") else None


def load_network(
    name: str,
    channels: int,
    classes: int,
    image_size: ImageSize,
    options: Mapping[str, object],
) -> nn.Module:
    """Return an untrained network for these images, in training mode."""
    if name.startswith(TORCHVISION):
        return _from_torchvision(name, channels, classes, image_size, options)
    made = _callable_in(name)
    arguments = {"channels": channels, "classes": classes, "image_size": image_size}
    network = _call(name, made, _taken(made, arguments) | dict(options))
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise NetworkError(f"{name}: returns an object of type {kind}, not a torch.nn.Module")
    return network.train()


# ---------------------------------------------------------------- a file


def require_file(path: Path) -> None:
    """Raise unless there is such a file."""
    if not path.is_file():
        beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise NetworkError(f"{path}: no such file{nearest(path.name, [p.name for p in beside])}")


def _callable_in(name: str) -> Callable[..., nn.Module]:
    path, attribute = network_file(name), name.rpartition(":")[2]
    require_file(path)
    module = _execute(path)
    made = getattr(module, attribute, None)
    if not callable(made):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        hint = nearest(attribute, known) or f"; it has {', '.join(known) or 'none'}"
        raise NetworkError(f"{path}: has no callable {attribute!r}{hint}")
    return made


def _execute(path: Path) -> ModuleType:
    """Run a file as a module of its own; its classes find it under a name that no other has.

    Always from the source: Python's cache can miss an edit within a second.
    """
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    specification = importlib.util.spec_from_file_location(f"network_{digest}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses and copies look it up there
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except Exception as error:
        raise NetworkError(f"{path}: cannot be run: {last_line(error)}") from None
    return module


def _taken(made: Callable, arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that a callable names, or all if it takes any."""
    try:
        parameters = inspect.signature(made).parameters
    except ValueError:  # a callable that is not written in Python
        return dict(arguments)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {key: value for key, value in arguments.items() if key in parameters}


def _call(name: str, made: Callable, arguments: Mapping[str, object]) -> object:
    try:
        return made(**arguments)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise NetworkError(f"{name}: called with {shown}: {last_line(error)}") from None


# ---------------------------------------------------------------- torchvision


def _from_torchvision(
    name: str,
    channels: int,
    classes: int,
    image_size: ImageSize,
    options: Mapping[str, object],
) -> nn.Module:
    """Return one of torchvision's classifiers with `classes` outputs, for `channels` channels.

    Its first convolution is made for the images' channels: see `_adapt_channels`.
    """
    import torchvision  # takes more than a second

    known = torchvision.models.list_models(module=torchvision.models)
    short = name.removeprefix(TORCHVISION)
    if short not in known:
        hint = nearest(short, known) or f"; there are {', '.join(known[:8])}, ..."
        raise NetworkError(f"{name}: torchvision has no such classifier{hint}")
    sized = {}
    if short.startswith("vit_"):
        sized["image_size"] = image_size
    elif short.startswith("maxvit"):
        sized["input_size"] = (image_size, image_size) if type(image_size) is int else image_size
    made = torchvision.models.get_model_builder(short)
    arguments = {"weights": None, "num_classes": classes} | sized | dict(options)
    network = _call(name, made, arguments)
    if channels != 3:
        _adapt_channels(network, channels)
    return network


def _adapt_channels(network: nn.Module, channels: int) -> None:
    """Replace the first convolution by one for other channels.

    Its weights are drawn from a normal distribution with the standard deviation of those that they
    replace: torchvision's own initialization for ResNet, VGG, DenseNet and MobileNet, which goes by
    the number of outputs.
    """
    path, old = next(
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    )
    kept = ("out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    arguments = {key: getattr(old, key) for key in kept} | {"bias": old.bias is not None}
    new = nn.Conv2d(channels, **arguments)
    with torch.no_grad():
        new.weight.normal_(0.0, old.weight.std().item())
        if old.bias is not None:
            new.bias.copy_(old.bias)
    network.set_submodule(path, new)
