"""ResNet-50 is torchvision's, but for the channels and the classes."""

import pytest
import torch
import torchvision

from models import build_model


def test_equals_torchvision_with_the_same_weights_and_the_same_initialization():
    model = build_model("resnet50", channels=3, classes=7, image_size=32, seed=5).eval()
    torch.manual_seed(5)
    reference = torchvision.models.resnet50(weights=None, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), reference(images))
    reference.load_state_dict(model.state_dict())


@pytest.mark.parametrize("channels", [1, 4])
def test_takes_images_of_other_channels(channels):
    model = build_model("resnet50", channels=channels, classes=10, image_size=28, seed=0).eval()
    conv = model.conv1
    assert (conv.in_channels, conv.kernel_size, conv.stride) == (channels, (7, 7), (2, 2))
    assert conv.bias is None
    # torchvision's initialization: fan-out does not depend on the number of channels.
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1)
    with torch.no_grad():
        assert model(torch.randn(2, channels, 28, 28)).shape == (2, 10)
