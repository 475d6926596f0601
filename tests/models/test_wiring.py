"""Layers in the order in which they run, and the batch norm that takes the output of each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.wiring import Output, observe
from tests.models import networks


def images() -> torch.Tensor:
    return torch.randn(2, 1, 8, 8)


def layers(network: nn.Module) -> dict[str, str | None]:
    return {layer.name: layer.norm for layer in observe(network, images()).layers}


def test_a_batch_norm_belongs_to_the_layer_whose_output_it_takes():
    assert layers(networks.PreActivation()) == {
        "conv0": None,  # its output is also the shortcut
        "block.conv1": "block.bn2",  # not bn1, which is declared behind it
        "block.conv2": None,
        "fc": None,
    }
    assert layers(networks.Plain()) == {
        "first.0": "first.1", "second.0": "second.1", "third.0": "third.1", "linear": None,
    }  # fmt: skip
    assert layers(networks.mlp()) == {"1": "2", "4": None, "6": None}


@pytest.mark.parametrize("second_use", [torch.relu, torch.Tensor.detach, lambda x: x.add_(0.0)])
def test_a_batch_norm_that_shares_its_input_belongs_to_no_layer(second_use):
    class Shared(networks.Plain):
        def forward(self, x):
            y = self.first[0](x)
            z = second_use(y)
            return self.linear(self.third(self.second(self.first[1](y) + z)).mean((2, 3)))

    assert layers(Shared())["first.0"] is None


def test_an_identity_between_layer_and_norm_makes_no_difference():
    class Between(networks.Plain):
        def __init__(self):
            super().__init__()
            self.first.insert(1, nn.Identity())

    assert layers(Between())["first.0"] == "first.2"


def test_a_norm_that_runs_twice_belongs_to_no_layer():
    class Twice(networks.Plain):
        def forward(self, x):
            x = self.first[1](self.first[1](self.first[0](x)))
            return self.linear(self.third(self.second(x)).mean((2, 3)))

    assert layers(Twice())["first.0"] is None


def test_layers_come_in_the_order_in_which_they_run_and_only_those_that_do():
    class Order(networks.Plain):
        def __init__(self):
            super().__init__()
            self.linear, self.late = self.linear, nn.Conv2d(1, 1, 3, padding=1)
            self.never = nn.Linear(3, 3)

        def forward(self, x):
            return super().forward(self.late(x))

    assert [*layers(Order())] == ["late", "first.0", "second.0", "third.0", "linear"]


def test_tokens_are_told_from_vectors():
    wired = {layer.name: layer.tokens for layer in observe(networks.Mixed(), images()).layers}
    assert wired["wide"]
    assert wired["narrow"]
    assert not wired["fc"]
    assert not wired["pointwise"]


def test_the_dimension_of_the_channels():
    seen = observe(networks.Mixed(), images()).outputs
    assert seen["depthwise"] == Output(8, 1)
    assert seen["norm"] == Output(6, -1)
    assert seen["wide"] == Output(9, -1)
    assert "fc" not in seen, "the logits"
    assert [*seen].index("wide") < [*seen].index("narrow")

    class Blind(networks.Plain):
        def __init__(self):
            super().__init__()
            self.mark = nn.Identity()

        def forward(self, x):
            x = self.third(self.second(self.first(x)))
            return self.linear(self.mark(x.permute(0, 2, 3, 1)).mean((1, 2)))

    assert "mark" not in observe(Blind(), images()).outputs


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_whole_images_leaves_the_channels_where_they_are(norm):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 1), norm([4, 8, 8]), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    )
    seen = observe(network, images()).outputs
    assert seen["0"] == seen["1"] == seen["2"] == Output(4, 1)


@pytest.mark.parametrize(("count", "size"), [(2, 8), (3, 8), (2, 4)])  # 4: a single token
def test_tokens_in_front_of_the_batch_are_refused(count, size):
    batch = torch.randn(count, 1, size, size)
    assert observe(networks.Tokens(batch_first=True), batch).outputs["encode.norm1"].dim == -1
    message = r"^encode\.\w+: .* image of the batch; put the batch first \(batch_first=True\)"
    with pytest.raises(ValueError, match=message):
        observe(networks.Tokens(), batch)
    with pytest.raises(ValueError, match=r"^second\.1: its output for one image changes with"):
        observe(networks.Beside(), batch)


def test_modules_that_run_for_some_images_alone_are_refused():
    class Choosing(networks.Plain):
        def __init__(self):
            super().__init__()
            self.bright = nn.Identity()

        def forward(self, x):
            return super().forward(self.bright(x) if x[-1].mean() > 9 else x)

    batch = images()
    batch[-1] = -100
    with pytest.raises(ValueError, match=r"^which modules run depends on the images$"):
        observe(Choosing(), batch)


def test_a_model_that_writes_into_its_input_leaves_the_images_as_they_are():
    network = nn.Sequential(nn.ReLU(inplace=True), networks.Plain())
    batch = images()
    before = batch.clone()
    observe(network, batch)
    assert torch.equal(batch, before)


def test_nothing_is_left_behind():
    network = networks.WithDropout()
    network.third.eval()
    modes = [module.training for module in network.modules()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    observe(network, images())
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_batch_norm_that_is_a_function_is_refused_wherever_it_stands():
    class Inside(nn.Module):
        def forward(self, x):
            return F.batch_norm(x, torch.zeros(6), torch.ones(6))

    network = networks.Plain()
    network.second.append(Inside())
    with pytest.raises(ValueError, match="a batch norm that is a function"):
        observe(network, images())
