"""A folded copy computes the same, and the model that it was made from stays what it was."""

import pytest
import torch
from torch import nn

from engine.flipping.fold import folded
from tests.slow_neurons import make


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "vit_small", "single_conv"])
def test_the_same_without_batch_norms(name):
    model = make(name).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(3, 1, 20, 20, dtype=torch.float64) * 2 - 1
    copy = folded(model)
    torch.testing.assert_close(copy(images), model(images), rtol=1e-9, atol=1e-11)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
