"""Prove that a chain computes what its network computes, before anything is trained on it."""

import random
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.any_network.errors import WAYS_OUT, NetworkError, last_line, place_of
from models.any_network.record import restoring
from models.layer_groups import StagedModel, layer_groups, run_stages
from models.wiring import CLOSE

SIZES = (2, 3)  # examples in a batch


def prove(network: nn.Module, chain: StagedModel, images: Tensor, classes: int) -> None:
    """Raise NetworkError unless chain and network are the same function with the same weights.

    Checked on random images in training mode and in eval mode, in batches of 2 and of 3: logits,
    gradients of every parameter and buffers afterwards, bit for bit. Also checked: the groups
    partition the state_dict, and in eval mode an example's logits depend on no other example.
    """
    _prove_partition(network, chain)
    for training in (True, False):
        for size in SIZES:
            batch = images[:size]
            expected = _run(network, batch, classes, training)
            found = _run(chain, batch, classes, training, staged=True)
            _require_same(expected, found, f"in {'training' if training else 'eval'} mode")
    _prove_independence(chain, images)


def _prove_partition(network: nn.Module, chain: StagedModel) -> None:
    if (names := [*chain.state_dict()]) != [*network.state_dict()]:
        changed = next(n for n in {*names} ^ {*network.state_dict()})
        raise NetworkError(f"{changed}: is a tensor of the network or of its chain only")
    try:
        layer_groups(chain)
    except AssertionError as error:
        raise NetworkError(f"stages: {error}") from None


def _run(
    model: nn.Module, images: Tensor, classes: int, training: bool, staged: bool = False
) -> dict[str, Tensor | None]:
    """Return logits, gradients and buffers after one step, by name; the model stays as it was."""
    parameters = dict(model.named_parameters())
    label = torch.arange(len(images)) % classes
    random_numbers = _state_outside_of_torch()
    with restoring(model, training):
        torch.default_generator.manual_seed(0)
        # A network may write into its input.
        logits = _forward(model, images.clone(), staged)
        if _state_outside_of_torch() != random_numbers:
            raise NetworkError(
                "draws random numbers outside of torch (random, numpy.random), which no seed of a "
                "run decides; draw them with torch"
            )
        _require_logits(logits, len(images), classes)
        try:
            loss = F.cross_entropy(logits.float(), label)
            gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        except RuntimeError as error:
            raise NetworkError(f"has no gradient: {last_line(error)}") from None
        result: dict[str, Tensor | None] = {"logits": logits.detach()}
        result |= {f"the gradient of {n}": g for n, g in zip(parameters, gradients)}
        result |= {f"the buffer {n}": buffer.clone() for n, buffer in model.named_buffers()}
    return result


def _state_outside_of_torch() -> tuple[object, ...]:
    """Return the states of Python's and of NumPy's global random numbers."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), keys.tobytes(), rest


def _forward(model: nn.Module, images: Tensor, staged: bool = False) -> Tensor:
    try:
        return run_stages(layer_groups(model), images) if staged else model(images)
    except Exception as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise NetworkError(
            f"{place_of(error)}fails on images of {size}: {last_line(error)}"
        ) from None


def require_classifier(network: nn.Module, images: Tensor, classes: int) -> None:
    """Raise unless the network maps images to one logit a class, in both modes."""
    for training in (True, False):
        with torch.no_grad(), restoring(network, training):
            _require_logits(_forward(network, images.clone()), len(images), classes)


def _require_logits(logits: object, count: int, classes: int) -> None:
    if not isinstance(logits, Tensor):
        raise NetworkError(
            f"its output is a {type(logits).__name__}, not a tensor [batch, classes]; return the "
            "logits alone (an auxiliary output can often be switched off in model.options)"
        )
    if logits.shape != (count, classes) or not logits.is_floating_point():
        shape = " x ".join(map(str, logits.shape))
        raise NetworkError(
            f"its output for {count} images is {shape}, not {count} x {classes}: one logit a class"
        )


def _require_same(
    expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None], mode: str
) -> None:
    for name, value in expected.items():
        other = found.get(name)
        if value is None or other is None:
            if value is None and name.startswith("the gradient"):
                parameter = name.removeprefix("the gradient of ")
                raise NetworkError(
                    f"{parameter}: the output {mode} does not depend on this parameter; delete it"
                )
            raise NetworkError(f"{name} is missing in the chain {mode}; {WAYS_OUT}")
        if not ((value == other) | (value.isnan() & other.isnan())).all():
            raise NetworkError(
                f"{name} {mode} is not the network's: cut into stages it computes something else "
                f"(does its forward pass keep values, or draw random numbers outside of torch?); "
                f"{WAYS_OUT}"
            )


@torch.no_grad()
def _prove_independence(chain: StagedModel, images: Tensor) -> None:
    with restoring(chain, training=False):
        beside = chain(images[:2].clone())[0]
        again = chain(images[:2].clone())[0]
        other = chain(torch.stack([images[0], -2 * images[1]]))[0]
    if beside.isnan().any():
        raise NetworkError("in eval mode its logits of random normal images are NaN")
    if not torch.equal(beside, again):
        raise NetworkError("in eval mode the same images give different logits each time")
    if (beside - other).norm() > CLOSE * beside.norm():
        raise NetworkError(
            "in eval mode an image's logits depend on the other images of its batch (a batch norm "
            "without running statistics?); no experiment can tell its examples apart"
        )
