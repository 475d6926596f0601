"""Units of networks that are not ours: where dropout stands, with the masks that it has there."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import example_tied_dropout
from beyond import erasure
from beyond.channel_control import CHANNEL_RANKS
from beyond.localizers import LOCALIZERS, UnitGates, compute_activations, compute_losses
from beyond.planted_memorization import EXPERIMENT, TRUTHS
from data import Examples
from engine.config.load import load_configs
from engine.runs.run import Run
from models.any_network import as_chain, example_images
from models.dropout import ExampleTiedDropout, insert_dropout
from models.dropout_places import find_places
from tests.models import networks
from tests.models.by_hand import mixed

N = 8
SITES = ("wide", "stem", "depthwise")  # not in forward order; channels of the first lie last


@pytest.fixture
def gates() -> UnitGates:
    chain = as_chain(networks.Mixed(), example_images(1, 8), 3)
    places = find_places(chain, SITES, example_images(1, 8))
    layers = {
        name: ExampleTiedDropout(place.channels, N, 0.4, 0.4, layer=number, dim=place.dim)
        for number, (name, place) in enumerate(places.items())
    }
    insert_dropout(chain, layers)
    chain = chain.eval().requires_grad_(False)
    gates = UnitGates(chain, places)
    gates.model, gates.layers = chain, layers
    return gates


def batch() -> Examples:
    index = torch.tensor([5, 0, 7])
    return Examples(example_images(1, 8), torch.tensor([0, 2, 1]), index)


def run_by_hand(gates: UnitGates, row: int, closed: int | None = None):
    """One example's loss and mean absolute activations, site by site."""
    network, seen, one = networks.Mixed().eval(), {}, batch().take(slice(row, row + 1))
    network.load_state_dict(gates.model.state_dict())

    def drop(site: str, x: torch.Tensor) -> torch.Tensor:
        if site not in gates.layers:
            return x
        layer, x = gates.layers[site], x.clone()
        first = {"wide": 0, "stem": 9, "depthwise": 13}[site]
        means = []
        for channel in range({"wide": 9, "stem": 4, "depthwise": 8}[site]):
            values = x[..., channel] if site == "wide" else x[:, channel]
            memory = channel - layer.generalization
            off = memory >= 0 and not layer.masks[one.index[0], memory]
            if off or first + channel == closed:
                values.zero_()
            means.append(values.abs().mean().item())
        seen[site] = means
        return x

    network.stem.register_forward_hook(lambda module, inputs, output: drop("stem", output))
    logits = mixed(network, one.images, drop)
    loss = F.cross_entropy(logits, one.label).item()
    return loss, [value for site in SITES for value in seen[site]]


def test_closing_a_unit_zeroes_its_channel(gates):
    assert [(site.name, site.first) for site in gates.sites] == list(zip(SITES, (0, 9, 13)))
    with gates:
        for unit in range(gates.count):
            gate = torch.ones(1, gates.count)
            gate[0, unit] = 0
            found = compute_losses(gates.model, gates, batch(), gate)
            expected = [run_by_hand(gates, row, unit)[0] for row in range(3)]
            assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_activations_are_in_the_order_of_the_units(gates):
    with gates:
        found = compute_activations(gates.model, gates, batch())
    expected = [run_by_hand(gates, row)[1] for row in range(3)]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_units_that_are_off_have_no_activation(gates):
    """The masks of a site are those of the dropout behind the module of this name."""
    with gates:
        off = ~gates.on(batch().index)
        assert off.any()
        assert (compute_activations(gates.model, gates, batch())[off] == 0).all()
    assert not gates.planted(batch().index)[off].any()


FILE = """
from torch import nn

def make(channels, classes):
    def block(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(block(channels, 12), block(12, 16), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, classes))
"""
OVERRIDES = (
    "model.width=1.0", "train.epochs=10", "train.peak_epoch=2", "train.account_gradients=false",
    "dropout.kind=example_tied", "planted.examples=3", "planted.reference=6", "planted.others=6",
    "planted.channels=1", "planted.chosen=1", "retraining.epochs=1", "retraining.peak_epoch=1",
    "erasure.examples=3", "erasure.reference=6", "erasure.fine_tuning_epochs=1",
)  # fmt: skip


@pytest.mark.parametrize(
    "sites",
    [
        pytest.param("blocks", marks=pytest.mark.slow(reason="as named sites: ten seconds")),
        "['1.1', '0']",
    ],
)
def test_planted_memorization_and_erasure_of_a_network_from_a_file(tiny_file, sites):
    Path(tiny_file.with_name("own.py")).write_text(FILE)
    model = f"model.name={tiny_file.with_name('own.py')}:make"
    (config,) = load_configs(tiny_file, (*OVERRIDES, model, f"dropout.sites={sites}"))
    run = Run.of(config)
    example_tied_dropout.train(run, torch.device("cpu"))
    EXPERIMENT.main(run)
    names = ["layer_outputs.0", "layer_outputs.1"] if sites == "blocks" else ["1.1", "0"]
    layers = dict.fromkeys(row["layer"] for row in TRUTHS.read(run.directory))
    assert [*layers] == ["all", *names]
    rows = CHANNEL_RANKS.read(run.directory)
    assert {row["layer"] for row in rows} == {*names}
    assert len(rows) == 2 * 3 * len(LOCALIZERS)
    erasure.EXPERIMENT.main(run)
    assert (run.directory / "erasure.csv").exists()
