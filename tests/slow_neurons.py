"""Neurons the slow, obvious way: a fresh copy of the model, its own parameters scaled or zeroed.

A gate m that multiplies some parameters has the derivative sum(parameter * gradient) at m = 1, and
a closed gate leaves them at 0. Nothing here knows of hooks, stages, or sets of gates.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import normalize
from models import build_model
from models.any_network import as_chain, example_images
from models.layer_groups import StagedModel
from tests.models.networks import Mixed, PreActivation, mlp

SIZES = {
    "resnet9": {"width": 0.1},
    "resnet50": {},
    "vit_small": {"patch": 4, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 12},
    "single_conv": {},
    "torchvision:resnet18": {},
}
RESNET18 = "configs/beyond/networks/small.py"  # torchvision's, at any width
NOT_OURS = {"pre_activation": PreActivation, "mixed": Mixed, "mlp": mlp}
FINAL = {
    "resnet9": "linear",
    "resnet50": "fc",
    "vit_small": "mlp_head.1",
    "single_conv": "linear",
    "torchvision:resnet18": "fc",
    "resnet18": "fc",
    "pre_activation": "fc",
    "mixed": "fc",
    "mlp": "6",
}
BY_HAND = {  # the layers and batch norms of networks that are not ours, read in their code
    "pre_activation": [("conv0", None), ("block.conv1", "block.bn2"), ("block.conv2", None)],
    "mixed": [
        ("stem", None), ("depthwise.0", "depthwise.1"), ("pointwise", None), ("wide", None),
        ("narrow", None),
    ],
    "mlp": [("1", "2"), ("4", None)],
}  # fmt: skip


class SingleConv(StagedModel):
    """One convolution with a bias and without batch norm, and a linear layer with a bias."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 24):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 5, stride=2)
        self.linear = nn.Linear(width, classes)

    def stages(self):
        return [
            ("conv", ("conv",), lambda x: self.conv(x).relu().mean((2, 3))),
            ("linear", ("linear",), self.linear),
        ]


def make(name: str, seed: int = 0) -> StagedModel:
    """A small model in eval mode, with batch norms that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == "single_conv":
            model = SingleConv()
        elif name == "resnet18":
            path = Path(__file__).parents[1] / RESNET18
            model = build_model(
                f"{path}:ResNet18", channels=1, classes=10, image_size=20, seed=seed,
                options={"width": 0.08},
            )  # fmt: skip
        elif name in NOT_OURS:
            size = 8 if name == "mlp" else 20
            model = as_chain(NOT_OURS[name](), example_images(1, size), 3)
        else:
            size = {"channels": 1, "classes": 10, "image_size": 20, "seed": seed}
            model = build_model(name, **size, **SIZES[name])
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.3, 0.2)
    return model.eval()


def layers(model: nn.Module, name: str) -> list[tuple[str, str | None]]:
    """Each layer of neurons with its batch norm, the final linear layer left out."""
    if name == "single_conv":
        return [("conv", None)]
    if name in BY_HAND:
        return BY_HAND[name]
    if name.endswith("resnet18"):
        return [("conv1", "bn1"), *_basic_blocks()]
    if name == "resnet9":
        return [(f"conv{i}.conv", f"conv{i}.bn") for i in range(1, 9)]
    if name == "vit_small":
        inner = ("0.to_qkv", "0.to_out.0", "1.net.1", "1.net.4")
        depth = len(model.transformer["layers"])
        return [(f"transformer.layers.{b}.{i}", None) for b in range(depth) for i in inner]
    found = [("conv1", "bn1")]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}."
            found += [(f"{prefix}conv{i}", f"{prefix}bn{i}") for i in (1, 2, 3)]
            if block == 0:
                found.append((f"{prefix}downsample.0", f"{prefix}downsample.1"))
    return found


def _basic_blocks() -> Iterator[tuple[str, str]]:
    """Two blocks of two convolutions in each of ResNet-18's groups; three shortcuts have one."""
    for group in range(1, 5):
        for block in range(2):
            prefix = f"layer{group}.{block}."
            yield from ((f"{prefix}conv{i}", f"{prefix}bn{i}") for i in (1, 2))
            if group > 1 and block == 0:
                yield f"{prefix}downsample.0", f"{prefix}downsample.1"


class SlowNeurons:
    """A copy of a model, whose gates are numbered like those of the fast way."""

    def __init__(self, model: nn.Module, name: str, ablate: str) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(True)
        self.scaled = []  # of each layer: the tensors of which a gate multiplies one row
        for layer, norm in layers(self.model, name):
            layer = self.model.get_submodule(layer)
            tensors = [layer.weight]
            if ablate == "activation":
                norm = self.model.get_submodule(norm) if norm else None
                tensors = [norm.weight, norm.bias] if norm else [layer.weight, layer.bias]
            self.scaled.append([tensor for tensor in tensors if tensor is not None])
        self.final = self.model.get_submodule(FINAL[name]).weight

    def close(self, number: int) -> None:
        with torch.no_grad():
            for tensors in self.scaled:
                if number < len(tensors[0]):
                    for tensor in tensors:
                        tensor[number] = 0
                    return
                number -= len(tensors[0])
            self.final.view(-1)[number] = 0

    def averaged(self, images: torch.Tensor) -> torch.Tensor:
        """The mean output over copies, [n, copies, ...] -> [n, classes]."""
        logits = [self.model(images[:, copy]) for copy in range(images.shape[1])]
        return torch.stack(logits).double().mean(0)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        tensors = [tensor for layer in self.scaled for tensor in layer]
        gradients = iter(torch.autograd.grad(loss, [*tensors, self.final]))
        found = []
        for layer in self.scaled:
            products = [(tensor * next(gradients)).flatten(1) if tensor.dim() > 1
                        else (tensor * next(gradients))[:, None] for tensor in layer]  # fmt: skip
            found.append(torch.cat(products, dim=1).sum(1))
        found.append((self.final * next(gradients)).flatten())
        return torch.cat(found).detach()

    def accuracy(self, images: torch.Tensor, label: torch.Tensor, left_out: int) -> float:
        """Return the accuracy on every image (uint8) but one, each on its own, without noise."""
        correct = [
            int(self.model(normalize(images[i : i + 1])).argmax()) == int(label[i])
            for i in range(len(label))
            if i != left_out
        ]
        return sum(correct) / len(correct)


def slow_search(model, name, ablate, copies, label, reference, reference_label, most):
    """One example's closed gates in order, whether it flipped, and the copy with gates closed."""
    slow, closed = SlowNeurons(model, name, ablate), []
    while True:
        output = slow.averaged(copies[None])
        flipped = int(output.argmax()) != int(label)
        if flipped or len(closed) == most:
            return closed, flipped, slow
        own = slow.gradient(F.cross_entropy(output, label[None]))
        mean = slow.gradient(F.cross_entropy(slow.averaged(reference), reference_label))
        score = (mean - own).tolist()
        for gate in closed:
            score[gate] = -math.inf
        highest = max(score)
        closed.append(next(g for g, s in enumerate(score) if s >= highest - 1e-4 * abs(highest)))
        slow.close(closed[-1])
