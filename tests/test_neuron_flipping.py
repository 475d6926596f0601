"""The search agrees with a slow, obvious one, finds what was planted, and always comes to an end."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradient_accounting
import neuron_flipping
from data import normalize
from data.random_streams import random_stream
from engine import files, reuse
from engine.cli import run_script
from engine.errors import UserError
from engine.runs import Run
from engine.setup import load_final_model, load_split
from models import build_model
from models.layer_groups import StagedModel, layer_groups
from models.neurons import Gates
from neuron_flipping import COLUMNS, Candidate, choose_examples, noisy_copies, search

CPU = torch.device("cpu")
VIT = (
    "model.name=vit_small", "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=2",
    "model.heads=2", "model.dim_head=8", "model.mlp_dim=16",
)  # fmt: skip


class SingleConv(StagedModel):
    """One convolution with a bias, no batch norm."""

    def __init__(self, channels: int = 1, classes: int = 3, width: int = 6):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3)
        self.linear = nn.Linear(width, classes)

    def stages(self):
        return [
            ("conv", ("conv",), lambda x: self.conv(x).relu().amax((2, 3))),
            ("linear", ("linear",), self.linear),
        ]


# ---------------------------------------------------------------- the slow way


class SlowGates(nn.Module):
    """A parameter for every gate, and a forward pass written out for each kind of model."""

    def __init__(self, model, ablate):
        super().__init__()
        self.model, self.ablate = copy.deepcopy(model), ablate
        self.names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        counts = [len(model.get_submodule(name).weight) for name in self.names]
        self.of_layer = nn.ParameterList(torch.ones(count) for count in counts)
        self.of_weight = nn.Parameter(torch.ones_like(model.linear.weight))

    def flat(self, values):
        return torch.cat([v.flatten() for v in values])

    def gate(self, i, conv, bn, relu, x):
        m = self.of_layer[i][:, None, None]
        if self.ablate == "weight":
            return relu(bn(F.conv2d(x, conv.weight * m[..., None], conv.bias, conv.stride,
                                    conv.padding)))  # fmt: skip
        return m * relu(bn(conv(x)))

    def forward(self, x):
        model = self.model
        head = nn.Linear(1, 1)
        del head.weight
        if isinstance(model, SingleConv):
            x = self.gate(0, model.conv, lambda z: z, torch.relu, x).amax((2, 3))
            return F.linear(x, model.linear.weight * self.of_weight, model.linear.bias)
        block = [getattr(model, f"conv{i}") for i in range(1, 9)]

        def run(i, x):
            return self.gate(i - 1, block[i - 1].conv, block[i - 1].bn, torch.relu, x)

        x = run(2, run(1, x))
        x = x + run(4, run(3, x))
        x = F.max_pool2d(run(5, x), 2)
        x = x + run(7, run(6, x))
        x = run(8, x).amax((2, 3))
        return 0.2 * F.linear(x, model.linear.weight * self.of_weight)


def slow_search(model, ablate, image_copies, label, reference, reference_label, most):
    """One example: a fresh copy of the model, and autograd through the whole thing."""
    slow = SlowGates(model, ablate).eval()
    gates = [*slow.of_layer, slow.of_weight]

    def averaged(images):  # [n, copies, ...]
        logits = torch.stack([slow(images[:, c]) for c in range(images.shape[1])])
        return logits.double().mean(0)

    closed = []
    while True:
        output = averaged(image_copies[None])
        flipped = int(output.argmax()) != int(label)
        if flipped or len(closed) == most:
            return closed, flipped
        loss = F.cross_entropy(output, label[None])
        loss = loss - F.cross_entropy(averaged(reference), reference_label)
        score = -slow.flat(torch.autograd.grad(loss, gates))
        score[closed] = -math.inf
        best = min(
            gate for gate in range(len(score))
            if score[gate] >= score.max() - 1e-4 * score.max().abs()
        )  # fmt: skip
        closed.append(best)
        with torch.no_grad():
            place = best
            for gate in gates:
                if place < gate.numel():
                    gate.view(-1)[place] = 0
                    break
                place -= gate.numel()


def slow_accuracy(model, ablate, closed, images, label, left_out):
    slow = SlowGates(model, ablate).eval()
    with torch.no_grad():
        flat = slow.flat([*slow.of_layer, slow.of_weight]).index_fill(
            0, torch.tensor(closed, dtype=int), 0
        )
        for gate, value in zip(
            [*slow.of_layer, slow.of_weight],
            flat.split([g.numel() for g in [*slow.of_layer, slow.of_weight]]),
        ):
            gate.copy_(value.view_as(gate))
        correct = [
            bool(slow(normalize(images[i : i + 1])).argmax() == label[i])
            for i in range(len(label))
            if i != left_out
        ]
    return sum(correct) / len(correct)
