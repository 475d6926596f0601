"""The paper's networks as plain modules, each with a forward pass as people write it.

They hold the modules of the networks in models/, so that weights are drawn in the same order.
"""

import torch
from torch import Tensor, nn

from models.resnet9 import LOGIT_SCALE, ResNet9
from models.resnet50 import ResNet50
from models.vit_small import ViTSmall


class PlainNetwork(nn.Module):
    """The modules and parameters of a network, without its stages."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self._modules.update(network._modules)
        self._parameters.update(network._parameters)


class PlainResNet9(PlainNetwork):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        x = self.residual1((self.conv4(self.conv3(x)), x))
        x = self.pool(self.conv5(x))
        x = self.residual2((self.conv7(self.conv6(x)), x))
        return LOGIT_SCALE * self.linear(self.conv8(x).amax((2, 3)))


class PlainResNet50(PlainNetwork):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PlainViT(PlainNetwork):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.to_patch_embedding(x)
        first = self.cls_token.expand(len(x), -1, -1)
        x = self.dropout(torch.cat([first, tokens], dim=1) + self.pos_embedding)
        for block in self.transformer["layers"]:
            x = block(x)
        return self.mlp_head(x[:, 0])


def make_resnet9(channels: int, classes: int, image_size: int, **options: object) -> nn.Module:
    return PlainResNet9(ResNet9(channels, classes, **options))


def make_resnet50(channels: int, classes: int) -> nn.Module:
    return PlainResNet50(ResNet50(channels, classes))


def make_vit(channels: int, classes: int, image_size: int, **options: object) -> nn.Module:
    return PlainViT(ViTSmall(channels, classes, image_size, **options))
