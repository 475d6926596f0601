"""The paper's networks by name, each made from a seed alone."""

from inspect import signature

import torch

from models.layer_groups import StagedModel
from models.resnet9 import ResNet9
from models.resnet50 import ResNet50
from models.vit_small import ViTSmall

MODELS: dict[str, type[StagedModel]] = {
    "resnet9": ResNet9,
    "resnet50": ResNet50,
    "vit_small": ViTSmall,
}


def model_options(name: str) -> set[str]:
    """Return the options of a model: its arguments without those that the images decide."""
    if name not in MODELS:
        raise ValueError(f"model {name!r} is not known; there are {', '.join(MODELS)}")
    return set(signature(MODELS[name]).parameters) - {"channels", "classes", "image_size"}


def build_model(
    name: str, *, channels: int, classes: int, image_size: int, seed: int, **options: object
) -> StagedModel:
    """A freshly initialized model on the CPU, for square images with sides of `image_size`.

    The weights depend on the seed alone. torch's layers can only draw them from the global
    generator, so this is the one place that seeds it; its state is put back afterwards.
    """
    allowed = model_options(name)
    if unknown := sorted(options.keys() - allowed):
        takes = ", ".join(sorted(allowed)) or "no options"
        raise ValueError(f"{name} does not take {', '.join(unknown)}; it takes {takes}")
    model = MODELS[name]
    if image_size < model.min_image_size:
        least = model.min_image_size
        raise ValueError(
            f"{name} needs images of at least {least}x{least} pixels, not {image_size}x{image_size}"
        )
    if "image_size" in signature(model).parameters:
        options["image_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        # Unlike torch.manual_seed, this leaves the generators of GPUs alone.
        torch.default_generator.manual_seed(seed)
        return model(channels=channels, classes=classes, **options)
