"""Four classifiers as people write them, at widths for two CPU cores; see any_network.yaml."""

import torch.nn.functional as F
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.ops.misc import Conv2dNormActivation


class ResNet18(nn.Module):
    """torchvision's ResNet-18, stem and all, at a part of its width (1 is torchvision's own)."""

    def __init__(self, channels, classes, width=0.25):
        super().__init__()
        c64, c128, c256, c512 = (round(c * width) for c in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(channels, c64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(c64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self.blocks(c64, c64, 1)
        self.layer2 = self.blocks(c64, c128, 2)
        self.layer3 = self.blocks(c128, c256, 2)
        self.layer4 = self.blocks(c256, c512, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c512, classes)

    @staticmethod
    def blocks(inputs, outputs, stride):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        return nn.Sequential(
            BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs)
        )

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def vgg11(channels, classes, width=8):
    """VGG-11 with batch norm (64 is its own width); the sizes of pooled images are rounded up."""
    layers, inputs = [], channels
    for convolutions, outputs in ((1, 1), (1, 2), (2, 4), (2, 8), (2, 8)):
        for _ in range(convolutions):
            conv = nn.Conv2d(inputs, outputs * width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs * width), nn.ReLU(inplace=True)]
            inputs = outputs * width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU in front of each convolution (He et al. 2016)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class PreActivationResNet(nn.Module):
    """Six pre-activation blocks behind a convolution of stride 2."""

    def __init__(self, channels, classes, width=16):
        super().__init__()
        widths = (width, width, 2 * width, 2 * width, 4 * width, 4 * width)
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        for inputs, outputs in zip((width, *widths), widths):
            self.blocks.append(PreActivationBlock(inputs, outputs, 1 + (outputs > inputs)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class MobileNet(nn.Module):
    """Six inverted residuals of torchvision's MobileNetV2 behind a convolution of stride 2."""

    def __init__(self, channels, classes, width=16, expansion=2):
        super().__init__()
        widths = (width, width, 2 * width, 2 * width, 4 * width, 4 * width)
        self.stem = Conv2dNormActivation(channels, width, stride=2, activation_layer=nn.ReLU6)
        self.blocks = nn.ModuleList()
        for inputs, outputs in zip((width, *widths), widths):
            stride = 1 + (outputs > inputs)
            self.blocks.append(InvertedResidual(inputs, outputs, stride, expansion))
        self.head = Conv2dNormActivation(4 * width, 16 * width, 1, activation_layer=nn.ReLU6)
        self.fc = nn.Linear(16 * width, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.head(x).mean((2, 3)))
