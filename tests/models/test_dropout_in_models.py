"""Dropout inside networks: its sites, whose gradients reach which channels, what is put back."""

import copy

import pytest
import torch
from torch import nn

from models import build_model
from models.dropout import (
    ExampleTiedDropout,
    StandardDropout,
    dropout_mode,
    examples,
    forget,
    insert_dropout,
    tied_layers,
)

MODELS = {
    "resnet9": {"width": 0.2},
    "resnet50": {},
    "vit_small": {"patch": 4, "dim": 20, "depth": 2, "heads": 2, "dim_head": 8, "dropout": 0.0},
}


def build(name: str) -> nn.Module:
    return build_model(name, channels=1, classes=10, image_size=20, seed=0, **MODELS[name])


def tied(name: str, p_gen: float = 0.4, kind: str = "blocks") -> nn.Module:
    """A model with example-tied dropout for 100 examples behind all of its sites."""
    model = build(name)
    layers = {
        site: ExampleTiedDropout(channels, 100, p_gen, layer=i, dim=model.channel_dim)
        for i, (site, channels) in enumerate(model.dropout_sites(kind).items())
    }
    insert_dropout(model, layers)
    return model


def test_a_mistake_in_inserting_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 10), nn.ReLU())
    tied = ExampleTiedDropout(10, n_examples=20)
    with pytest.raises(AttributeError):
        insert_dropout(model, {"0": tied, "7": tied})
    with pytest.raises(TypeError, match="0: Dropout is none of this file's layers"):
        insert_dropout(model, {"0": nn.Dropout()})
    assert len(model) == 2
    assert not tied_layers(model)
    assert model(torch.ones(1, 3)).shape == (1, 10)


def test_layers_can_be_inserted_into_a_sequential_and_one_after_another():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10))
    insert_dropout(model, {"0": StandardDropout(0.5)})
    insert_dropout(model, {"1": ExampleTiedDropout(10, 60, p_gen=0.2)})
    x = torch.randn(60, 6)
    assert model.eval()(x).shape == (60, 10)
    assert torch.equal(model(x), model(x)), "every layer follows eval()"
    assert len(tied_layers(model)) == 1
    model.train()
    with examples(model, torch.arange(60)):
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_inserting_renames_no_weight_and_every_site_is_dropped(name):
    model = tied(name).eval()
    assert model.state_dict().keys() == build(name).state_dict().keys()
    seen = {}
    for site in model.dropout_sites():
        hook = lambda module, inputs, out, site=site: seen.update({site: out})  # noqa: E731
        model.get_submodule(site).register_forward_hook(hook)
    assert len(tied_layers(model)) == {"resnet9": 6, "resnet50": 5, "vit_small": 2}[name]
    with dropout_mode(model, "drop"):
        model(torch.randn(2, 1, 20, 20))
    sites = model.dropout_sites()
    for (site, out), layer in zip(seen.items(), tied_layers(model), strict=True):
        channels_last = out.movedim(model.channel_dim, -1)
        assert channels_last.shape[-1] == sites[site]
        assert (channels_last[..., layer.generalization :] == 0).all()
        assert (channels_last[..., : layer.generalization] != 0).any()


def test_behind_every_convolution_too():
    model = tied("resnet9", kind="layers")
    assert list(model.dropout_sites("layers")) == [f"conv{k}" for k in range(1, 9)]
    assert len(tied_layers(model)) == 8


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_memorization_channel_come_only_from_its_examples(name):
    model = tied(name).eval()  # eval: batch norm would tie the examples of a batch together
    images, index = torch.randn(6, 1, 20, 20), torch.tensor([3, 99, 14, 15, 92, 65])
    activations = []
    site = next(iter(model.dropout_sites()))
    module = model.get_submodule(site)
    module._forward_hooks.clear()  # the layer is called by hand, to see in front of it

    def hook(module, inputs, out):
        out.retain_grad()
        activations.append(out)
        return tied_layers(model)[0](out)

    module.register_forward_hook(hook)
    with examples(model, index):
        model(images).square().sum().backward()
    layer = tied_layers(model)[0]
    gradient = activations[0].grad.movedim(model.channel_dim, 1).flatten(2).abs().sum(2)
    memorization = gradient[:, layer.generalization :]
    assert (memorization[~layer.masks[index]] == 0).all()
    assert (memorization[layer.masks[index]] > 0).any()


def test_everything_is_put_back_also_after_an_exception():
    model = tied("resnet9")
    before = [dict(vars(layer)) for layer in tied_layers(model)]
    index = torch.tensor([1])

    def fail():
        with dropout_mode(model, "drop", True), examples(model, index), forget(model, index):
            assert all(layer.mode == "drop" for layer in tied_layers(model))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    for layer, attributes in zip(tied_layers(model), before):
        for name, value in attributes.items():
            assert vars(layer)[name] is value
    with pytest.raises(ValueError, match="there are memorize, drop, expected"):
        dropout_mode(model, "dorp")


def test_a_copy_has_layers_of_its_own():
    model = tied("resnet9").eval()
    twin = copy.deepcopy(model)
    images = torch.randn(2, 1, 20, 20)
    expected = model(images)
    with dropout_mode(twin, "drop"):
        assert torch.equal(model(images), expected)
        assert not torch.equal(twin(images), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_leaves_train_and_eval_as_they_are(training):
    model = torch.nn.Sequential(torch.nn.Dropout(), ExampleTiedDropout(10, n_examples=20))
    model.train(training)
    with dropout_mode(model, "drop"):
        assert all(module.training == training for module in model.modules())
        model[0].train(not training)
    assert model[0].training != training, "what the caller sets inside stays"
    assert model[1].training == training
