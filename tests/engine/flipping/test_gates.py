"""Gates do what scaling or zeroing a copy's parameters does, in value and in derivative."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import RunFailed
from engine.flipping.gates import Gates, neuron_sites
from models.any_network import as_chain, example_images
from tests.models import networks
from tests.slow_neurons import NOT_OURS, SlowNeurons, make

NAMES = ["resnet9", "resnet50", "vit_small", "single_conv"]
WIRED = ["torchvision:resnet18", "pre_activation", "mixed"]
ABLATE = ["activation", "weight"]


def images(count: int, size: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 1, size, size, generator=generator, dtype=torch.float64) * 2 - 1


def some_of_each_layer(gates: Gates) -> list[int]:
    """The first neuron of every layer and the last of all."""
    return [*(site.first for site in gates.sites), gates.count - 1]


@pytest.mark.parametrize("ablate", ABLATE)
@pytest.mark.parametrize("name", [*NAMES, *WIRED, "mlp"])
def test_gradients_and_outputs_of_several_sets_at_once(name, ablate):
    model = make(name).double()
    model.requires_grad_(False)
    size = 8 if name == "mlp" else 20
    label = torch.tensor([1, 4, 2, 2, 7, 0]) % (3 if name in NOT_OURS else 10)
    fresh = copy.deepcopy(model)
    with Gates(model, ablate) as gates:
        chosen = some_of_each_layer(gates)
        sets = [[], chosen[1::3], chosen[-2:]]
        gates.close(sets)
        output = model(images(6, size))
        taps = gates.take_taps()
        loss = F.cross_entropy(output, label, reduction="sum")
        found = gates.gradients(taps, torch.autograd.grad(loss, [t.output for t in taps]), 3)
    for i, closed in enumerate(sets):
        slow = SlowNeurons(fresh, name, ablate)
        for gate in closed:
            slow.close(gate)
        rows = slice(2 * i, 2 * i + 2)
        expected = slow.model(images(6, size)[rows])
        torch.testing.assert_close(output[rows], expected, rtol=1e-9, atol=1e-11)
        gradient = slow.gradient(F.cross_entropy(expected, label[rows], reduction="sum"))
        assert all(gradient[site.numbers].any() for site in gates.sites) or closed
        still_open = torch.ones(len(gradient), dtype=bool)
        still_open[closed] = False
        torch.testing.assert_close(
            found[i][still_open], gradient[still_open], rtol=1e-7, atol=1e-11
        )


def test_a_network_without_neurons_is_refused():
    model = as_chain(nn.Sequential(networks.Matrix(64, 3)), example_images(1, 8), 3)
    with pytest.raises(RunFailed, match="no convolution and no linear layer"):
        neuron_sites(model)


@pytest.mark.parametrize("name", [*NAMES, *WIRED, "mlp"])
def test_every_neuron_has_one_gate(name):
    model = make(name)
    sites = neuron_sites(model)
    slow = SlowNeurons(model, name, "activation")
    counts = [len(tensors[0]) for tensors in slow.scaled] + [slow.final.numel()]
    assert [site.count for site in sites] == counts
    assert [site.first for site in sites] == [sum(counts[:i]) for i in range(len(counts))]
    groups = [site.group for site in sites]
    assert groups == sorted(groups)
    if name == "resnet9":
        assert groups == list(range(9))
    if name == "resnet50":
        assert [groups.count(g) for g in range(6)] == [1, 10, 13, 19, 10, 1]
    if name == "vit_small":
        assert groups == [1] * 4 + [2] * 4 + [3]
    if name == "torchvision:resnet18":
        assert [groups.count(g) for g in range(6)] == [1, 4, 5, 5, 5, 1]


def test_closing_a_channel_silences_what_leaves_the_layer():
    model = make("resnet9")
    seen = {}
    with Gates(model) as gates, torch.no_grad():
        site = gates.sites[2]
        model.conv3.register_forward_hook(lambda module, x, y: seen.update(y=y))
        gates.close([[site.first + 1], []])
        model(images(4).float())
    assert (seen["y"][:2, 1] == 0).all()
    assert (seen["y"][2:, 1] != 0).any()
    assert (seen["y"][:2, 0] != 0).any()


def test_names_of_neurons():
    sites = neuron_sites(make("resnet9"))
    assert sites[2].describe(sites[2].first + 4) == "conv3.conv:4"
    features = sites[-1].shape[1]
    assert sites[-1].describe(sites[-1].first + 3 * features + 1) == "linear:3:1"


@pytest.mark.parametrize("name", [*NAMES, *WIRED])
def test_afterwards_nothing_is_left(name):
    model = make(name)
    x = images(2).float()
    before = model(x)
    with Gates(model) as gates:
        gates.close([[0]])
        assert not torch.equal(model(x), before)
    with pytest.raises(IndexError), Gates(model) as gates:
        gates.close([[gates.count]])
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks for module in model.modules())
