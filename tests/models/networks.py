"""Small networks that people write, each with one thing in it that could go wrong."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(inputs: int, outputs: int, **options: object) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Plain(nn.Module):
    """A network of which every other here changes one thing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(1, 4), block(4, 6)
        self.third = block(6, 6)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.second(self.first(x)), 2)
        return self.linear(self.third(x).mean((2, 3)))


class Matrix(nn.Module):
    """A layer whose weights are no convolution and no linear layer."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, inputs * outputs).view(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


class Shortcut(Plain):
    """A cut through a residual block: two tensors are the state."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return self.linear((x + self.third(x)).mean((2, 3)))


class Sized(Plain):
    """Sizes, read in one layer and used in a later one."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, _ = x.shape
        x = self.second(self.first(x))
        x = self.third(x).view(len(x), -1, height * height)
        return self.linear(x.mean(2).reshape(batch, -1) * x.size(0) ** 0)


class ShortcutInPlace(Plain):
    """Operations that write into tensors which an earlier layer made."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        shortcut = 0.5 * x
        shortcut += self.third(F.relu_(x - 0.2))
        return self.linear(F.relu(shortcut, inplace=True).mean((2, 3)))


class InPlaceFirst(nn.Module):
    """A layer whose first operation writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1
        return self.linear(self.second(self.first(x)).mean((2, 3)))


class WithDropout(Plain):
    """Random numbers in modules and in functions that ask for the mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.first(x))
        x = F.dropout2d(self.second(x), 0.5, self.training)
        x = self.third(x).mean((2, 3))
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.linear(x)


class Defaults(Plain):
    """A forward pass with more arguments, and a tensor made from numbers."""

    def forward(self, x: Tensor, scale: float = 2.0, features: bool = False) -> Tensor:
        x = self.third(self.second(self.first(x)))
        if features:
            return x
        return self.linear(x.mean((2, 3))) * torch.tensor([1.0, 0.5, scale])


class Lists(nn.Module):
    """Layers in a ModuleList and a ModuleDict, which have no forward pass of their own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([block(1, 4), block(4, 5)])
        self.heads = nn.ModuleDict({"classes": nn.Linear(5, 3)})
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x) + self.bias
        return self.heads["classes"](self.layers[1](x).mean((2, 3)))


class PreActivation(nn.Module):
    """Batch norms in front of convolutions: declared behind one, they take another tensor."""

    def __init__(self, activation: bool = True):
        super().__init__()
        self.conv0 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.block = PreActivationBlock(4)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.conv0(x))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class PreActivationBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)  # in front of conv1, declared behind it
        self.conv2 = nn.Conv2d(6, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(out)))


class Mixed(nn.Module):
    """Depthwise, grouped and 1x1 convolutions, and linear layers on images ([..., channels])."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.depthwise = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True)
        )
        self.pointwise = nn.Conv2d(8, 6, 1, groups=2)
        self.norm = nn.LayerNorm(6)
        self.wide, self.narrow = nn.Linear(6, 9), nn.Linear(9, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.stem(x)))
        y = self.norm(x.permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return self.fc((x + y).mean((2, 3)))


class Stages(nn.Module):
    """Modules and attributes with names that a chain of stages has for its own."""

    def __init__(self):
        super().__init__()
        self.wiring, self.dropout_sites, self._run = [2, 2], 0.1, None
        self._layers = block(1, 4)
        self.stages = nn.ModuleList([block(4, 6), block(6, 6)])
        self.channel_dim = block(6, 6)
        self._chain = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self._layers(x)
        for stage in self.stages:
            x = stage(x)
        return self._chain(self.channel_dim(x).mean((2, 3)))


class Shuffled(Plain):
    """Channels in another order behind a layer: nothing says in which dimension they lie."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)))
        return self.linear(x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def mlp() -> nn.Sequential:
    """Linear layers alone, with batch norms for vectors."""
    hidden = [nn.Linear(64, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(5, 3))


CUTTABLE = {
    "plain": Plain,
    "shortcut": Shortcut,
    "sized": Sized,
    "shortcut_in_place": ShortcutInPlace,
    "in_place_first": InPlaceFirst,
    "with_dropout": WithDropout,
    "defaults": Defaults,
    "lists": Lists,
    "pre_activation": PreActivation,
    "mixed": Mixed,
    "mlp": mlp,
    "stages": Stages,
}


# ---------------------------------------------------------------- what cannot be used


class ByValue(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.mean() > 0:
            x = -x
        return self.linear(self.third(self.second(x)).mean((2, 3)))


class UsedTwice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)))
        return self.linear(self.third(x).mean((2, 3)))


class UsedAgain(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)))
        return self.linear(x.mean((2, 3)) * self.first[1].weight.sum())


class FunctionalNorm(Plain):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.third[1]
        x = self.third(self.second(self.first(x)))
        x = F.batch_norm(x, norm.running_mean, norm.running_var)
        return self.linear(x.mean((2, 3)))


class Tied(Plain):
    def __init__(self):
        super().__init__()
        self.fourth = block(6, 6)
        self.fourth[0].weight = self.third[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.fourth(self.third(self.second(self.first(x))))
        return self.linear(x.mean((2, 3)))


class Pair(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))


class TwoNames(Plain):
    def __init__(self):
        super().__init__()
        self.head = self.linear


class UnusedInside(Plain):
    def __init__(self):
        super().__init__()
        self.third[1].spare = nn.Parameter(torch.ones(3))


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


class Wired(Plain):
    def __init__(self):
        super().__init__()
        self.wiring = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.wiring(x))


class Wide(Plain):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)


class TupleInside(Plain):
    def __init__(self):
        super().__init__()
        self.split = Halves()

    def forward(self, x: Tensor) -> Tensor:
        both = self.split(self.second(self.first(x)))
        return self.linear(self.third(both[0]).mean((2, 3)) + both[1].mean((2, 3)))


class Halves(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, -x]


class NotANumber(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.log(x))


class SquareOnly(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.transpose(2, 3))


class TooDeep(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.max_pool2d(x, 16))


class Beside(Plain):
    """A batch norm without running statistics: examples depend on one another."""

    def __init__(self):
        super().__init__()
        self.second[1] = nn.BatchNorm2d(6, track_running_stats=False)


class OutsideRandom(Plain):
    """Random numbers that no seed of torch decides, and that hardly ever change the output."""

    def __init__(self, draw: Callable[[], float]):
        super().__init__()
        self.calls = nn.Identity()
        self.calls.register_forward_hook(lambda module, x, y: y if draw() < 1 else -y)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.calls(x))


class Counting(Plain):
    """A value that is kept from one pass to the next."""

    def __init__(self):
        super().__init__()
        self.calls = nn.Identity()
        self.calls.register_forward_hook(self.count)
        self.number = 0

    def count(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        self.number += 1
        return output * self.number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.calls(x))


class Tokens(nn.Module):
    """A transformer, whose tokens may lie in front of the batch."""

    def __init__(self, batch_first: bool = False):
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, 4)
        self.encode = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=batch_first)
        self.linear = nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2)
        x = x.permute(0, 2, 1) if self.batch_first else x.permute(2, 0, 1)
        return self.linear(self.encode(x).mean(1 if self.batch_first else 0))
