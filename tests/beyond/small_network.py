"""A small network with example-tied dropout, and its forward pass written out."""

import torch
import torch.nn.functional as F

from beyond.localizers import UnitGates
from data import Examples
from models import build_model
from models.dropout import ExampleTiedDropout, insert_dropout

N = 14


def make(sites: str = "blocks", tied: bool = True):
    """A small network in float64 and eval mode whose batch norms do something."""
    model = build_model("resnet9", seed=0, channels=1, classes=4, image_size=12, width=0.08)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    model.linear.weight.data.normal_(0, 1, generator=generator)
    if tied:
        layers = {
            site: ExampleTiedDropout(channels, N, 0.4, 0.4, layer=number)
            for number, (site, channels) in enumerate(model.dropout_sites(sites).items())
        }
        insert_dropout(model, layers)
    return model.double().eval().requires_grad_(False)


def make_batch(count: int = N) -> Examples:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(N, 1, 12, 12, generator=generator, dtype=torch.float64) * 2 - 1
    label = torch.randint(4, (N,), generator=generator)
    return Examples(images, label, torch.arange(N)).take(slice(count))


def slow_logits(model, batch: Examples, row: int, closed: dict[str, list[int]], scale=1.0):
    """One example's logits, by a forward pass written out block by block."""
    masks = {
        site: layer.masks[batch.index[row]]
        for site, layer in zip(model.dropout_sites(), getattr(model, "inserted_dropout", []))
    }

    def drop(site: str, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        if site in masks:
            for place, kept in enumerate(masks[site].tolist()):
                if not kept:
                    x[:, x.shape[1] - len(masks[site]) + place] = 0
        for channel in closed.get(site, []):
            x[:, channel] = 0
        return x * scale

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        layer = getattr(model, name)
        return F.relu(layer.bn(layer.conv(x)))

    x = drop("conv1", block("conv1", batch.images[row : row + 1]))
    x = drop("conv2", block("conv2", x))
    x = drop("residual1", x + block("conv4", block("conv3", x)))
    x = F.max_pool2d(drop("conv5", block("conv5", x)), 2)
    x = drop("residual2", x + block("conv7", block("conv6", x)))
    x = drop("conv8", block("conv8", x))
    return 0.2 * x.amax((2, 3)) @ model.linear.weight.T


def named(gates: UnitGates, numbers) -> dict[str, list[int]]:
    """Units by site and channel."""
    found: dict[str, list[int]] = {}
    for number in numbers:
        site = next(s for s in gates.sites if number < s.first + s.count)
        found.setdefault(site.name, []).append(number - site.first)
    return found
