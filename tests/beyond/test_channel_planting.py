"""A planted channel holds the new labels alone, and localizers that deserve the name find it."""

import copy
from itertools import cycle

import pytest
import torch

from beyond.channel_planting import channel_masks, find_channels, plant_channel
from beyond.localizers import LOCALIZERS, UnitGates, rank_units, run_gated
from data import Examples
from models.any_network import as_chain, example_images
from models.wiring import observe
from tests.beyond.small_network import make, make_batch
from tests.models import networks

WRITES_AND_READS = {  # by hand: the convolution whose channels leave each site of ResNet-9
    "conv1": ("conv1", "conv2.conv"),
    "conv2": ("conv2", "conv3.conv"),
    "residual1": ("conv4", "conv5.conv"),
    "conv5": ("conv5", "conv6.conv"),
    "residual2": ("conv7", "conv8.conv"),
    "conv8": ("conv8", "linear"),
}
DESERVING = ("flipping", "gate_gain", "zero_out", "activation_gradient", "integrated_gradients")


def channels(model, site: str):
    """Find the layers of a site by the graph; the images are random."""
    images = make_batch(2).images
    return find_channels(model, observe(model, images), site)


@pytest.fixture(scope="module")
def planted():
    """A network whose channel 2 of conv8 was fine-tuned for one example, and the examples."""
    model, batch = make(), make_batch()
    model.linear.weight *= 10  # confident, as a trained network is
    predicted = run_gated(model, UnitGates(model), batch).argmax(1)
    label = predicted.clone()
    new = (int(predicted[0]) + 1) % 4
    rows = torch.tensor([0])
    chosen = Examples(batch.images[rows], torch.full((1,), new), batch.index[rows])
    others = torch.arange(1, 7)
    keep = Examples(batch.images[others], label[others], batch.index[others])
    return (
        model,
        plant_channel(model, channels(model, "conv8"), 2, chosen, cycle([keep]), 3000),
        chosen,
        keep,
    )


def test_the_chosen_examples_learn_their_new_labels(planted):
    model, planting, chosen, _ = planted
    before = run_gated(model, UnitGates(model), chosen).argmax(1)
    after = run_gated(planting.model, UnitGates(planting.model), chosen).argmax(1)
    assert (before != chosen.label).all()
    assert planting.learned
    assert torch.equal(after, chosen.label)


def test_the_other_examples_keep_their_predictions(planted):
    _, planting, _, keep = planted
    after = run_gated(planting.model, UnitGates(planting.model), keep).argmax(1)
    assert (after == keep.label).all()


def test_a_channel_that_cannot_learn_in_time_says_so(planted):
    model, _, chosen, keep = planted
    planting = plant_channel(
        model, channels(model, "conv8"), 2, chosen, cycle([keep]), most_steps=1
    )
    assert not planting.learned
    assert planting.steps == 1


def test_no_number_outside_the_channel_moves(planted):
    model, planting, *_ = planted
    masks, moved = channel_masks(model, channels(model, "conv8"), 2), 0
    after = planting.model.state_dict()
    for name, value in model.state_dict().items():
        inside = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~inside], after[name][~inside]), name
        moved += int((value[inside] != after[name][inside]).sum())
    assert moved > 0
    assert sum(int(mask.sum()) for mask in masks.values()) < 100 * 9


@pytest.mark.parametrize("site", WRITES_AND_READS)
def test_layers_that_write_and_read_a_site_of_resnet9(site):
    found, (writes, reads) = channels(make(), site), WRITES_AND_READS[site]
    assert (found.writes.name, found.writes.norm) == (f"{writes}.conv", f"{writes}.bn")
    assert found.reads.name == reads


def test_layers_that_write_and_read_a_site_of_a_network_that_is_not_ours():
    images = example_images(1, 8)
    chain = as_chain(networks.PreActivation(), images, 3)
    first, block = (find_channels(chain, chain.wiring, site) for site in chain.dropout_sites())
    assert (first.writes.name, first.writes.norm, first.reads.name) == (
        "conv0",
        None,
        "block.conv1",
    )
    assert (block.writes.name, block.writes.norm, block.reads.name) == ("block.conv2", None, "fc")


def test_a_site_whose_channels_no_layer_writes_alone_has_none():
    class Concatenated(networks.Plain):
        def __init__(self):
            super().__init__()
            self.third = networks.block(10, 6)

        def forward(self, x):
            x = self.first(x)
            x = torch.cat([x, self.second(x)], dim=1)
            return self.linear(self.third(x).mean((2, 3)))

    chain = as_chain(Concatenated(), example_images(1, 8), 3)
    assert chain.wiring.outputs["layer_outputs.second"].channels == 10
    assert find_channels(chain, chain.wiring, "layer_outputs.second") is None
    assert find_channels(chain, chain.wiring, "layer_outputs.third").reads.name == "linear"


@pytest.mark.parametrize("site", WRITES_AND_READS)
def test_the_channel_s_numbers_are_all_that_its_activation_depends_on(site):
    """With them zeroed, the convolution's channel is 0 and no other channel moves."""
    model, batch = make(tied=False), make_batch(3)
    before = record(model, site, batch)
    channel = int(before["conv"].mean((0, 2, 3)).argmax())  # one that is not dead
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in channel_masks(changed, channels(changed, site), channel).items():
            changed.get_parameter(name)[mask] = 0
    after = record(changed, site, batch)
    rest = [other for other in range(before["conv"].shape[1]) if other != channel]
    assert (after["conv"][:, channel] == 0).all()
    assert not torch.equal(before["x"][:, channel], after["x"][:, channel])
    for name in before:
        assert torch.equal(before[name][:, rest], after[name][:, rest])


def record(model, site: str, batch) -> dict[str, torch.Tensor]:
    """Return the output of a site's convolution, and the input of the layer behind the site."""
    writes, reads = (model.get_submodule(name) for name in WRITES_AND_READS[site])
    found = {}
    hooks = [
        writes.register_forward_hook(lambda module, x, output: found.update(conv=output)),
        reads.register_forward_hook(lambda module, x, output: found.update(x=x[0])),
    ]
    model(batch.images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", DESERVING)
def test_deserving_localizers_rank_the_channel_first(planted, name):
    model, planting, chosen, keep = planted

    def ranks(network) -> list[int]:
        with UnitGates(network) as gates:
            scores, on = LOCALIZERS[name](network, gates, chosen, keep), gates.on(chosen.index)
            unit = gates.sites[-1].first + 2
        return [rank_units(s, o).tolist().index(unit) + 1 for s, o in zip(scores, on)]

    assert ranks(planting.model) == [1]
    assert ranks(model) != [1]
