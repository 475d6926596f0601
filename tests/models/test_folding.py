"""A folded copy computes the same, and the model that it was made from stays what it was."""

import pytest
import torch
from torch import nn

from models.any_network import as_chain, example_images
from models.dropout import ExampleTiedDropout, examples, insert_dropout
from models.folding import folded
from tests.models.networks import Plain
from tests.slow_neurons import make


@pytest.mark.parametrize(
    "name",
    ["resnet9", "resnet50", "vit_small", "single_conv", "torchvision:resnet18", "mixed", "mlp"],
)
def test_the_same_without_batch_norms(name):
    model = make(name).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(3, 1, *(2 * [8 if name == "mlp" else 20]), dtype=torch.float64) * 2 - 1
    copy = folded(model)
    torch.testing.assert_close(copy(images), model(images), rtol=1e-9, atol=1e-11)
    assert not any(
        isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in copy.modules()
    )
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("place", ["conv", "bn"])
def test_dropout_between_convolution_and_norm_keeps_its_place(place):
    """Folding a module into another would lose the dropout that stands behind it."""
    model = make("resnet9").double()
    sites = {f"{block}.{place}": getattr(model, block) for block in ("conv1", "conv2")}
    layers = {
        site: ExampleTiedDropout(block.conv.out_channels, 3, 0.2, 0.5, layer=number)
        for number, (site, block) in enumerate(sites.items())
    }
    insert_dropout(model, layers)
    model.eval()
    images = torch.rand(3, 1, 20, 20, dtype=torch.float64) * 2 - 1
    copy, index = folded(model), torch.arange(3)
    with torch.no_grad():
        for network in (model, copy):
            with examples(network, index):
                found = network(images)
            if network is model:
                expected = found
        other = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(other, expected, rtol=1e-3)  # the masks matter


def test_only_norms_behind_their_layer_are_folded_in_a_pre_activation_network():
    model = make("pre_activation").double()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1
    copy = folded(model)
    torch.testing.assert_close(copy(images), model(images), rtol=1e-9, atol=1e-11)
    kinds = {name: type(copy.get_submodule(name)) for name in ("block.bn1", "block.bn2", "norm")}
    assert kinds == {
        "block.bn1": nn.BatchNorm2d, "block.bn2": nn.Identity, "norm": nn.BatchNorm2d
    }  # fmt: skip


def test_a_convolution_that_computes_with_other_weights_is_not_folded():
    """Its parameters are not what its output is made of."""

    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    network = Plain()
    network.second[0] = Standardized(4, 6, 3, padding=1, bias=False)
    model = as_chain(network, example_images(1, 8), 3).double().eval()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(folded(model)(images), model(images), rtol=1e-9, atol=1e-11)
