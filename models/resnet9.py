"""ResNet-9, the paper's smallest network: eight convolutions and a linear layer, nine groups."""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from models.layer_groups import Stage, StagedModel

LOGIT_SCALE = 0.2  # keeps the first logits, and so the first gradients, small


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; a channel of its output is a neuron."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1
    ):
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
                bn=nn.BatchNorm2d(outputs),
                relu=nn.ReLU(),
            )
        )


class ResidualSum(nn.Module):
    """The sum that ends a residual block; a module, so that a hook can change its output."""

    def forward(self, state: tuple[Tensor, Tensor]) -> Tensor:
        branch, shortcut = state
        return shortcut + branch


class ResNet9(StagedModel):
    """Nine layer groups, each with the name of its module: conv1 ... conv8, linear.

    `width` multiplies the channels of every convolution (rounded, at least 1). Forward hooks on
    conv1 ... conv8 see each convolution's output after its ReLU; hooks on conv1, conv2, residual1,
    conv5, residual2, conv8 see the output of each block.
    """

    min_image_size: ClassVar[int] = 11  # halved twice (rounded up, then down), it must leave 3x3

    def __init__(self, channels: int = 3, classes: int = 10, width: float = 1.0):
        super().__init__()
        if not width > 0:
            raise ValueError(f"resnet9: width must be above 0, not {width}")
        c64, c128, c256 = (max(1, round(c * width)) for c in (64, 128, 256))
        self.conv1 = ConvBlock(channels, c64)
        self.conv2 = ConvBlock(c64, c128, kernel=5, stride=2, padding=2)
        self.conv3 = ConvBlock(c128, c128)
        self.conv4 = ConvBlock(c128, c128)
        self.residual1 = ResidualSum()
        self.conv5 = ConvBlock(c128, c256)
        self.pool = nn.MaxPool2d(2)
        self.conv6 = ConvBlock(c256, c256)
        self.conv7 = ConvBlock(c256, c256)
        self.residual2 = ResidualSum()
        self.conv8 = ConvBlock(c256, c128, padding=0)
        self.linear = nn.Linear(c128, classes, bias=False)

    def stages(self) -> list[Stage]:
        forwards = {
            "conv1": self.conv1,
            "conv2": self.conv2,
            "conv3": lambda x: (self.conv3(x), x),
            "conv4": lambda state: self.residual1((self.conv4(state[0]), state[1])),
            "conv5": lambda x: self.pool(self.conv5(x)),
            "conv6": lambda x: (self.conv6(x), x),
            "conv7": lambda state: self.residual2((self.conv7(state[0]), state[1])),
            # Not AdaptiveMaxPool2d, whose gradient is not deterministic on CUDA; not amax, whose
            # gradient was NaN in a compiled network in bf16: it compares the maximum with
            # activations that are computed again there, and rounded otherwise.
            "conv8": lambda x: self.conv8(x).flatten(2).max(2).values,
            "linear": lambda x: LOGIT_SCALE * self.linear(x),
        }
        return [(name, (name,), forward) for name, forward in forwards.items()]

    def dropout_sites(self, kind: str = "blocks") -> dict[str, int]:
        """'blocks': the six outputs that the authors' code drops; 'layers': all convolutions'."""
        channels = {f"conv{k}": getattr(self, f"conv{k}").conv.out_channels for k in range(1, 9)}
        if kind == "layers":
            return channels
        channels |= {"residual1": channels["conv4"], "residual2": channels["conv7"]}
        blocks = ("conv1", "conv2", "residual1", "conv5", "residual2", "conv8")
        return {name: channels[name] for name in blocks}
