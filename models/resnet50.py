"""ResNet-50 as in torchvision, for any number of channels and classes; six layer groups."""

from torch import Tensor, nn

from models.layer_groups import Stage, StagedModel


class ResNet50(StagedModel):
    """torchvision's ResNet-50, untrained, with its parameter names; its forward runs the stages."""

    def __init__(self, channels: int = 3, classes: int = 10):
        from torchvision.models.resnet import Bottleneck, ResNet  # takes more than a second

        super().__init__()
        network = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=classes)
        for name, module in network.named_children():
            self.add_module(name, module)
        if channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> list[Stage]:
        return [
            ("stem", ("conv1", "bn1"), self.stem),
            ("layer1", ("layer1",), self.layer1),
            ("layer2", ("layer2",), self.layer2),
            ("layer3", ("layer3",), self.layer3),
            ("layer4", ("layer4",), self.layer4),
            ("fc", ("fc",), self.head),
        ]

    def dropout_sites(self, kind: str = "blocks") -> dict[str, int]:
        """Behind the stem and each of the four groups."""
        groups = {f"layer{k}": 128 * 2**k for k in range(1, 5)}
        return {"maxpool": self.conv1.out_channels} | groups

    def stem(self, images: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(x).flatten(1))
