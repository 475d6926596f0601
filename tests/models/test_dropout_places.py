"""Dropout behind named modules of networks that are not ours, against forward passes by hand."""

from types import SimpleNamespace

import pytest
import torch

from engine.errors import UserError
from engine.training.build import make_model
from models.any_network import as_chain, example_images
from models.dropout import (
    SparseDropout,
    dropout_mode,
    examples,
    kept_channels,
    random_gate,
    tied_masks,
)
from models.dropout_places import find_places, own_places
from models.layer_groups import layer_groups, run_stages
from models.wiring import Output
from tests.models import networks
from tests.models.by_hand import mixed, mlp, plain, pre_activation

N, P, P_MEM, SEED = 9, 0.4, 0.5, 3  # p_gen 0.4 of three channels is one
SHAPE = SimpleNamespace(shape=(1, 8, 8), classes=3, index=torch.arange(N))


BY_HAND = {  # of each network: its forward pass with dropout, and the channels of each site
    "Plain": (plain, {"first.0": 4, "third": 6}),
    "PreActivation": (
        pre_activation, {"layer_outputs.conv0": 4, "block.conv1": 6, "block.bn2": 6}
    ),
    "Mixed": (mixed, {"depthwise": 8, "norm": 6, "wide": 9}),
    "mlp": (mlp, {"3": 7, "5": 5}),
}  # fmt: skip
LAST = {("Mixed", "norm"), ("Mixed", "wide"), ("mlp", "3"), ("mlp", "5")}  # channels lie there


@pytest.fixture
def build(tiny):
    def make(name: str, kind: str, sites=None):
        sites = list(BY_HAND[name][1]) if sites is None else sites
        return make_model(
            tiny(
                f"model.name={networks.__file__}:{name}", "model.width=1.0",
                f"dropout.kind={kind}", f"dropout.p_gen={P}", f"dropout.p_mem={P_MEM}",
                f"dropout.seed={SEED}", f"dropout.sites={sites}",
            ),
            SHAPE,
        )  # fmt: skip

    return make


def without_dropout(name: str, model):
    """A plain network with the weights of the model."""
    network = getattr(networks, name)()
    network.load_state_dict(model.state_dict())
    return network.train(model.training).to(memory_format=torch.channels_last)  # as make_model does


def slow_gate(name: str, on):
    """Zero activations one example and one channel at a time: on(site, example, channel)."""

    def drop(site: str, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for example in range(len(x)):
            for channel in range(BY_HAND[name][1][site]):
                if not on(site, example, channel):
                    if (name, site) in LAST:
                        x[example, ..., channel] = 0
                    else:
                        x[example, channel] = 0
        return x

    return drop


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BY_HAND)
def test_each_example_has_its_own_masks_at_named_sites(build, name, training):
    model = build(name, "example_tied").train(training)
    forward, sites = BY_HAND[name]
    batch, index = example_images(1, 8, 4), [7, 0, 3, 8]
    masks = {
        site: tied_masks(N, channels - kept_channels(P, channels), P_MEM, SEED, number)
        for number, (site, channels) in enumerate(sites.items())
    }

    def on(site, example, channel) -> bool:
        shared = sites[site] - masks[site].shape[1]
        return channel < shared or bool(masks[site][index[example], channel - shared])

    network = without_dropout(name, model)
    expected = forward(network, batch, slow_gate(name, on))
    with examples(model, torch.tensor(index)):
        found = run_stages(layer_groups(model), batch)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, forward(network, batch, lambda site, x: x), atol=1e-3)


@pytest.mark.parametrize("name", BY_HAND)
def test_memorization_channels_are_dropped_at_named_sites(build, name):
    model = build(name, "example_tied").eval()
    forward, sites = BY_HAND[name]
    batch = example_images(1, 8, 4)
    shared = {site: kept_channels(P, channels) for site, channels in sites.items()}
    drop = slow_gate(name, lambda site, example, channel: channel < shared[site])
    with dropout_mode(model, "drop"):
        found = model(batch)
    assert torch.allclose(found, forward(without_dropout(name, model), batch, drop), atol=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_same_channels_are_off_for_everybody_with_sparse_dropout(build, name):
    model = build(name, "sparse")
    forward, sites = BY_HAND[name]
    batch = example_images(1, 8, 4)
    kept = {
        site: SparseDropout(channels, P, SEED, layer=number).kept[0]
        for number, (site, channels) in enumerate(sites.items())
    }
    drop = slow_gate(name, lambda site, example, channel: bool(kept[site][channel]))
    expected = forward(without_dropout(name, model), batch, drop)
    assert torch.allclose(model(batch), expected, atol=1e-6)
    assert all(int(on.sum()) == kept_channels(P, len(on)) for on in kept.values())


@pytest.mark.parametrize("name", BY_HAND)
def test_standard_dropout_at_named_sites(build, name):
    model = build(name, "standard")
    forward, batch = BY_HAND[name][0], example_images(1, 8, 4)
    network, seen = without_dropout(name, model), []

    def drop(site: str, x: torch.Tensor) -> torch.Tensor:
        seen.append(site)
        return x * random_gate(x, P)

    torch.default_generator.manual_seed(1)
    expected = forward(network, batch, drop)
    torch.default_generator.manual_seed(1)
    assert torch.allclose(model(batch), expected, atol=1e-6)
    assert seen == [*BY_HAND[name][1]]
    assert torch.equal(model.eval()(batch), model(batch))


def test_places_have_the_dimension_of_their_channels():
    chain = as_chain(networks.Mixed(), example_images(1, 8), 3)
    found = find_places(chain, ["wide", "depthwise"], example_images(1, 8))
    assert found == {"wide": Output(9, -1), "depthwise": Output(8, 1)}
    assert [*found] == ["wide", "depthwise"], "in the order in which they are named"
    assert [*own_places(chain)] == [*chain.dropout_sites()]


@pytest.mark.parametrize(
    ("name", "sites", "message"),
    [
        ("Plain", ["frist"], "sites: the network has no module frist; did you mean first?"),
        ("Plain", ["linear"], "linear does not run once and hand on channels (the logits are none"),
        ("UsedTwice", ["third"], "sites: third does not run once and hand on channels"),
        ("Lists", ["layers"], "sites: layers does not run once"),
        (
            "Shuffled", "blocks",
            "dropout: sites: layer_outputs.third hands on no tensor whose channel dimension is "
            "known; list modules in dropout.sites",
        ),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_gets_one_line(build, name, sites, message):
    with pytest.raises(UserError) as error:
        build(name, "example_tied", sites)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
