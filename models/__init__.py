"""The paper's networks by name, and any other, each made from a seed alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch

from models.any_network import (
    ImageSize,
    build_network,
    example_images,
    is_name_of_network,
    network_file,
)
from models.layer_groups import StagedModel
from models.resnet9 import ResNet9
from models.resnet50 import ResNet50
from models.vit_small import ViTSmall
from models.wiring import observe

__all__ = ["MODELS", "build_model", "is_name_of_network", "model_options", "network_file"]

MODELS: dict[str, type[StagedModel]] = {
    "resnet9": ResNet9,
    "resnet50": ResNet50,
    "vit_small": ViTSmall,
}


def model_options(name: str) -> set[str]:
    """Return the arguments of a model, except those that the images decide."""
    if is_name_of_network(name):
        return {"layers", "options"}
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not known; there are {', '.join(MODELS)}")
    return set(signature(MODELS[name]).parameters) - {"channels", "classes", "image_size"}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside, and put its state back afterwards.

    Layers can only draw their weights from it, so this is the one place that seeds it.
    """
    with torch.random.fork_rng(devices=[]):
        # Unlike torch.manual_seed, this leaves the generators of GPUs alone.
        torch.default_generator.manual_seed(seed)
        yield


def build_model(
    name: str,
    *,
    channels: int,
    classes: int,
    image_size: ImageSize,
    seed: int,
    proof: bool = True,
    **options: object,
) -> StagedModel:
    """Return a freshly initialized model on the CPU, whose weights depend on the seed alone.

    `image_size` is the side of square images, or (height, width). A network that is not ours is
    proven to be the chain of stages that is made of it, unless that was done before (`proof`).
    """
    allowed = model_options(name)
    if unknown := sorted(options.keys() - allowed):
        takes = ", ".join(sorted(allowed)) or "no options"
        raise ValueError(f"{name} does not take {', '.join(unknown)}; it takes {takes}")
    shape = {"channels": channels, "classes": classes}
    if is_name_of_network(name):
        with _seeded(seed):
            return build_network(name, **shape, image_size=image_size, proof=proof, **options)
    model = MODELS[name]
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < (least := model.min_image_size):
        raise ValueError(
            f"{name} needs images of at least {least}x{least} pixels, not {height}x{width}"
        )
    if "image_size" in signature(model).parameters:
        if height != width:
            raise ValueError(f"{name} needs square images, not {height}x{width}")
        options["image_size"] = height
    with _seeded(seed):
        made = model(**shape, **options)
        if model not in (ResNet9, ResNet50, ViTSmall):  # whose modules are declared in their order
            made.wiring = observe(made, example_images(channels, image_size, 2))
    return made
