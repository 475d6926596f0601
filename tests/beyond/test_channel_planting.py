"""A planted channel holds the new labels alone, and localizers that deserve the name find it."""

import copy
from itertools import cycle

import pytest
import torch

from beyond.channel_planting import CHANNELS, channel_masks, plant_channel
from beyond.localizers import LOCALIZERS, Examples, UnitGates, rank_units, run_gated
from tests.beyond.small_network import make, make_batch

DESERVING = ("flipping", "gate_gain", "zero_out", "activation_gradient", "integrated_gradients")


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
    return model, plant_channel(model, "conv8", 2, chosen, cycle([keep]), 3000), chosen, keep


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
    planting = plant_channel(model, "conv8", 2, chosen, cycle([keep]), most_steps=1)
    assert not planting.learned
    assert planting.steps == 1


def test_no_number_outside_the_channel_moves(planted):
    model, planting, *_ = planted
    masks, moved = channel_masks(model, "conv8", 2), 0
    after = planting.model.state_dict()
    for name, value in model.state_dict().items():
        inside = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~inside], after[name][~inside]), name
        moved += int((value[inside] != after[name][inside]).sum())
    assert moved > 0
    assert sum(int(mask.sum()) for mask in masks.values()) < 100 * 9


@pytest.mark.parametrize("site", CHANNELS)
def test_the_channel_s_numbers_are_all_that_its_activation_depends_on(site):
    """With them zeroed, the convolution's channel is 0 and no other channel moves."""
    model, batch = make(tied=False), make_batch(3)
    before = record(model, site, batch)
    channel = int(before["conv"].mean((0, 2, 3)).argmax())  # one that is not dead
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in channel_masks(changed, site, channel).items():
            changed.get_parameter(name)[mask] = 0
    after = record(changed, site, batch)
    rest = [other for other in range(before["conv"].shape[1]) if other != channel]
    assert (after["conv"][:, channel] == 0).all()
    assert not torch.equal(before["x"][:, channel], after["x"][:, channel])
    for name in before:
        assert torch.equal(before[name][:, rest], after[name][:, rest])


def record(model, site: str, batch) -> dict[str, torch.Tensor]:
    """What a site's convolution puts out, and what the layer behind the site reads."""
    writes, reads = (model.get_submodule(name) for name in CHANNELS[site])
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
