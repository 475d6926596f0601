"""Models are made from a name and a seed, and leave the world as it was."""

import pytest
import torch
from torch import nn

from engine.flipping.gates import neuron_sites
from models import MODELS, build_model, model_options
from models.folding import folded
from models.layer_groups import StagedModel

SHAPE = {"channels": 1, "classes": 10, "image_size": 16}
SMALL = {"resnet9": {"width": 0.1}, "resnet50": {}, "vit_small": {"dim": 16, "depth": 1}}


@pytest.mark.parametrize("name", MODELS)
def test_weights_depend_on_the_seed_alone(name):
    one = build_model(name, **SHAPE, seed=1, **SMALL[name]).state_dict()
    torch.rand(7)
    same = build_model(name, **SHAPE, seed=1, **SMALL[name]).state_dict()
    other = build_model(name, **SHAPE, seed=2, **SMALL[name]).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", MODELS)
def test_the_global_generator_is_left_alone(name):
    before = torch.get_rng_state()
    build_model(name, **SHAPE, seed=1, **SMALL[name])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError):
        build_model("resnet9", **SHAPE | {"classes": "ten"}, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generators_of_gpus_are_left_alone(monkeypatch):
    """torch.manual_seed would reseed them, and fork_rng(devices=[]) would not put them back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded"))
    build_model("resnet9", **SHAPE, seed=1)


def test_options_of_each_model():
    assert model_options("resnet9") == {"width"}
    assert model_options("resnet50") == set()
    assert model_options("vit_small") == {
        "patch", "dim", "depth", "heads", "dim_head", "mlp_dim", "dropout",
    }  # fmt: skip


def test_unknown_names_and_options_are_errors():
    with pytest.raises(ValueError, match="'resnet18' is not known; there are resnet9, resnet50"):
        build_model("resnet18", **SHAPE, seed=0)
    with pytest.raises(ValueError, match="vit_small does not take width; it takes depth, dim"):
        build_model("vit_small", **SHAPE, seed=0, width=2.0)
    with pytest.raises(ValueError, match="resnet50 does not take width; it takes no options"):
        build_model("resnet50", **SHAPE, seed=0, width=2.0)


def test_images_that_are_too_small_for_resnet9():
    least = {"channels": 1, "classes": 10, "image_size": 11, "width": 0.1}
    assert build_model("resnet9", **least, seed=0)(torch.randn(2, 1, 11, 11)).shape == (2, 10)
    with pytest.raises(
        ValueError, match="resnet9 needs images of at least 11x11 pixels, not 10x10"
    ):
        build_model("resnet9", **least | {"image_size": 10}, seed=0)


def test_the_wiring_of_an_added_network_is_observed(monkeypatch):
    """The batch norm declared behind conv1 takes another tensor than its output."""

    class PreActivation(StagedModel):
        def __init__(self, channels, classes):
            super().__init__()
            self.conv1, self.norm = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
            self.linear = nn.Linear(4, classes)

        def stages(self):
            return [("conv1", ("conv1",), self.conv1), ("rest", ("norm", "linear"), self.rest)]

        def rest(self, x):
            return self.linear((x + self.norm(x).relu()).mean((2, 3)))

    monkeypatch.setitem(MODELS, "added", PreActivation)
    model = build_model("added", channels=1, classes=3, image_size=8, seed=0)
    images = torch.randn(9, 1, 8, 8)
    model(images)
    assert torch.allclose(folded(model.eval())(images), model(images), atol=1e-6)
    assert [site.module for site in neuron_sites(model)] == [model.conv1, model.linear]
    assert build_model("resnet9", **SHAPE, seed=0).wiring is None
