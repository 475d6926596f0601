"""Networks that are not ours: loaded by name, cut into a chain of stages, and proven equal.

`build_network` returns a StagedModel, on which every experiment runs as on the paper's networks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.any_network.chain import changing_stages, derive_chain
from models.any_network.errors import NetworkError
from models.any_network.load import (
    ImageSize,
    is_name_of_network,
    load_network,
    network_file,
    require_file,
)
from models.any_network.proof import SIZES, prove, require_classifier
from models.layer_groups import StagedModel, layer_groups
from models.wiring import observe

__all__ = [
    "ImageSize",
    "NetworkError",
    "as_chain",
    "build_network",
    "example_images",
    "is_name_of_network",
    "load_network",
    "network_file",
    "require_file",
]


def build_network(
    name: str,
    *,
    channels: int,
    classes: int,
    image_size: ImageSize,
    layers: Sequence[str] | None = None,
    options: Mapping[str, object] | None = None,
    proof: bool = True,
) -> StagedModel:
    """Return the network of this name as a verified chain, on the CPU, in training mode.

    The weights are drawn from torch's global generator; the check leaves its state as it is.
    """
    network = load_network(name, channels, classes, image_size, options or {})
    try:
        return as_chain(network, example_images(channels, image_size), classes, layers, proof)
    except NetworkError as error:
        raise NetworkError(f"{name}: {error}") from None


def as_chain(
    network: nn.Module,
    images: Tensor,
    classes: int,
    layers: Sequence[str] | None = None,
    proof: bool = True,
) -> StagedModel:
    """Return the network as a chain of stages; a StagedModel is one already.

    Three or more images are needed for the check. It takes a few passes with gradients: a network
    that was verified before its training need not be verified again before each measurement.
    """
    require_classifier(network, images[: SIZES[0]], classes)
    if isinstance(network, StagedModel):
        if layers is not None:
            raise NetworkError("layers: a StagedModel has stages of its own; leave layers out")
        chain = network
    else:
        chain = derive_chain(network, images[: SIZES[0]], layers)
    if proof:
        prove(network, chain, images, classes)
        _require_unchanged_states(chain, images[: SIZES[0]])
    try:
        chain.wiring = observe(chain, images[: SIZES[0]])
    except ValueError as error:
        raise NetworkError(str(error)) from None
    return chain


def _require_unchanged_states(chain: StagedModel, images: Tensor) -> None:
    """Raise if a stage writes into what it is given, from which other stages continue."""
    names = [group.name for group in layer_groups(chain)]
    for training in (True, False):
        for number in changing_stages(chain, images, training):
            raise NetworkError(
                f"layer {names[number]}: changes its input in place; let the stage work on a copy, "
                "or switch inplace off"
            )


def example_images(channels: int, image_size: ImageSize, count: int = SIZES[-1]) -> Tensor:
    """Return random images, the same each time, that leave the global generator alone."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, *size, generator=generator)
