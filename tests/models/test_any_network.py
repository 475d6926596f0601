"""A derived chain is its network, bit for bit; what cannot be cut gets one line."""

import copy
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from engine.flipping.gates import neuron_sites
from models.any_network import NetworkError, as_chain, example_images
from models.dropout_places import own_places
from models.folding import folded
from models.layer_groups import StagedModel, layer_groups, run_stages
from tests.models import networks
from tests.models.networks import CUTTABLE

CLASSES = 3
BOTH = "; name other layers (model.layers), or subclass StagedModel (docs/your_network.md)"


def images(size=8, count=3) -> torch.Tensor:
    return example_images(1, size, count)


def make(kind, layers=None, size=8) -> StagedModel:
    return as_chain(kind(), images(size), CLASSES, layers)


def step(model, batch, training, staged):
    """Logits, gradients and buffers after one step, with the same random numbers."""
    model = copy.deepcopy(model).train(training)
    torch.default_generator.manual_seed(7)
    logits = run_stages(layer_groups(model), batch.clone()) if staged else model(batch.clone())
    F.cross_entropy(logits, torch.arange(len(batch)) % CLASSES).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    buffers = [v for k, v in model.state_dict().items() if k not in dict(model.named_parameters())]
    return [logits, *gradients, *buffers]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CUTTABLE)
def test_a_chain_is_its_network(name, training):
    network = CUTTABLE[name]()
    chain = as_chain(copy.deepcopy(network), images(), CLASSES)
    assert chain.training == network.training
    assert [*chain.state_dict()] == [*network.state_dict()]
    for key, value in network.state_dict().items():
        assert torch.equal(value, chain.state_dict()[key]), key
    for count in (2, 5):
        batch = images(count=count)
        expected = step(network, batch, training, staged=False)
        for staged in (True, False):
            for one, other in zip(expected, step(chain, batch, training, staged), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("name", CUTTABLE)
def test_groups_partition_the_network_in_forward_order(name):
    chain = make(CUTTABLE[name])
    groups = layer_groups(chain)
    owned = [key for group in groups for key in chain.state_dict() if group.owns(key)]
    assert sorted(owned) == sorted(chain.state_dict())
    assert all(group.parameters(chain) for group in groups)
    assert len(groups) == {"mlp": 3, "in_place_first": 3, "lists": 3, "pre_activation": 3}.get(
        name, {"mixed": 6, "stages": 5}.get(name, 4)
    )


@pytest.mark.parametrize("name", CUTTABLE)
def test_stages_continue_from_any_state_and_leave_it_as_it_was(name):
    chain = make(CUTTABLE[name]).eval()
    groups, states = layer_groups(chain), [images()]
    with torch.no_grad():
        for group in groups:
            states.append(group.forward(states[-1]))
        for start in reversed(range(len(groups))):
            assert torch.equal(run_stages(groups, states[start], start), states[-1])


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_copy_runs_its_own_weights(name):
    chain = make(CUTTABLE[name]).eval()
    clone = copy.deepcopy(chain)
    with torch.no_grad():
        before = chain(images())
        for parameter in layer_groups(clone)[-1].parameters(clone).values():
            parameter.zero_()
        assert not run_stages(layer_groups(clone), images()).any()
        assert torch.equal(chain(images()), before)


def test_the_modules_of_a_chain_can_be_replaced_and_hooked():
    chain = make(networks.Plain).eval()
    seen = []
    chain.second[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    chain(images())
    assert len(seen) == 1
    chain.set_submodule("first.1", nn.Identity())
    assert not torch.equal(chain(images()), make(networks.Plain).eval()(images()))


def test_hooks_of_the_network_itself_run_once():
    network = networks.Plain().eval()
    network.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    network.register_forward_hook(lambda module, inputs, output: output + 1)
    chain = as_chain(copy.deepcopy(network), images(), CLASSES)
    for logits in (chain(images()), run_stages(layer_groups(chain), images())):
        assert torch.equal(logits, network(images()))


def test_glue_joins_the_layer_before_it():
    chain = make(networks.Plain, ["first", "third"])
    groups = layer_groups(chain)
    assert [group.prefixes for group in groups] == [("first", "second"), ("third", "linear")]
    assert groups[0].forward(images()).shape == (3, 6, 4, 4)  # pooled already


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_begin_no_layer(norm):
    chain = as_chain(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5), norm(5), nn.Linear(5, 3)), images(), CLASSES
    )
    assert [group.prefixes for group in layer_groups(chain)] == [("1", "2"), ("3",)]


def test_a_cut_inside_of_a_child():
    chain = make(networks.Plain, ["first.0", "second.0", "second.1", "linear"])
    assert [group.prefixes for group in layer_groups(chain)] == [
        ("first",), ("second.0",), ("second.1", "third"), ("linear",),
    ]  # fmt: skip


def test_modules_with_names_of_the_chain_are_found_by_name():
    chain = make(networks.Stages).eval()
    logits = chain(images())
    assert [*own_places(chain)][1] == "layer_outputs.stages/0"
    assert [site.name for site in neuron_sites(chain)][1] == "stages.0.0"
    assert torch.allclose(folded(chain)(images()), logits, atol=1e-5)
    compiled = torch.compile(chain, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images()), logits)
    zero = {name: torch.zeros_like(value) for name, value in chain.named_parameters()}
    assert not functional_call(chain, zero, images()).any()


def test_a_module_may_run_twice_within_a_layer():
    network = networks.UsedTwice()
    chain = as_chain(copy.deepcopy(network), images(), CLASSES, ["first", "second", "linear"])
    assert torch.equal(chain.eval()(images()), network.eval()(images()))


def test_a_subclass_of_stagedmodel_stays_what_it_is():
    class Staged(StagedModel):
        def __init__(self):
            super().__init__()
            self.network = networks.ByValue()

        def stages(self):
            return [("all", ("network",), self.network)]

    model = make(Staged)
    assert isinstance(model, Staged)
    assert [layer.name for layer in model.wiring.layers][-1] == "network.linear"
    with pytest.raises(NetworkError, match="has stages of its own; leave layers out"):
        make(Staged, ["network"])


@pytest.mark.parametrize("inplace", [True, False])
def test_a_subclass_of_stagedmodel_may_not_change_its_states(inplace):
    class Staged(StagedModel):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(1, 4, 3), nn.LeakyReLU(inplace=inplace)
            self.linear = nn.Linear(4, 3)

        def stages(self):
            return [
                ("conv", ("conv",), self.conv),
                ("linear", ("linear",), lambda x: self.linear(self.act(x).mean((2, 3)))),
            ]

    if not inplace:
        make(Staged)
        return
    with pytest.raises(NetworkError, match=r"^layer linear: changes its input in place; let"):
        make(Staged)
    as_chain(Staged(), images(), CLASSES, proof=False)


def test_what_cannot_be_traced_may_be_left_whole():
    """Control flow inside of a layer is no glue."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = networks.ByValue(), nn.Linear(3, 3)

        def forward(self, x):
            return self.scale(self.inner(x))

    assert len(layer_groups(make(Outer))) == 2
    with pytest.raises(NetworkError, match=r"if x\.mean"):
        make(Outer, ["inner.first", "inner.second", "scale"])


@pytest.mark.parametrize("size", [(5, 5), (8, 14), (21, 4), (33, 33)])
@pytest.mark.parametrize("name", sorted({*CUTTABLE} - {"mlp", "sized"}))
def test_images_of_any_size_that_the_network_takes(name, size):
    """Also of other sizes than those that it was cut with."""
    network = CUTTABLE[name]()
    for own in (size, (12, 9)):
        chain = as_chain(copy.deepcopy(network), images(own), CLASSES)
        for training in (True, False):
            expected = step(network, images(size), training, staged=False)
            for one, other in zip(expected, step(chain, images(size), training, staged=True)):
                assert torch.equal(one, other)


def test_rectangular_images():
    chain = make(networks.Plain, size=(8, 14))
    assert chain(images((8, 14))).shape == (3, 3)
    with pytest.raises(NetworkError, match="fails on images of 1 x 8 x 14: RuntimeError"):
        make(networks.SquareOnly, size=(8, 14))


def test_dropout_stands_behind_each_layer():
    chain = make(networks.Plain).eval()
    names = ("first", "second", "third")
    assert chain.dropout_sites() == {f"layer_outputs.{n}": c for n, c in zip(names, (4, 6, 6))}
    seen = []
    chain.layer_outputs.second.register_forward_hook(lambda module, x, y: seen.append(y.shape))
    chain(images())
    assert seen == [(3, 6, 4, 4)]


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [
        (networks.ByValue, None, "if x.mean() > 0:: cannot be traced (TraceError: "),
        (networks.ByValue, None, BOTH),
        (
            networks.UsedAgain, None,
            "first.1.weight: is used in the layer first and again in third, and can belong to one "
            f"only{BOTH}",
        ),
        (networks.FunctionalNorm, None, "a batch norm that is a function (F.batch_norm)"),
        (
            networks.Tied, None,
            "fourth.0.weight and third.0.weight are the same parameter, in the layers fourth and "
            f"third; it can belong to one only{BOTH}",
        ),
        (networks.Pair, None, "its output is a tuple, not a tensor [batch, classes]"),
        (
            networks.Plain, ["second", "first"],
            "layers: first runs before second; in forward order they are [first, second]",
        ),
        (networks.Plain, ["first", "first.0"], "first.0: lies inside of layer first; name one"),
        (networks.Plain, ["first", "thrid"], "no such module; did you mean third?"),
        (networks.Plain, ["x"], "layer x: the network has no such module; there are first, second"),
        (networks.Plain, ["first", "first"], "layer first: stands twice in the list"),
        (networks.Plain, [], "layers: the list is empty"),
        (networks.Plain, ["first", "second.2"], "layer second.2: holds no parameters"),
        (networks.Lists, ["layers"], "a ModuleList computes nothing itself; name the modules "),
        (networks.Unused, None, "spare: the network's forward pass does not use this parameter"),
        (
            networks.TwoNames, None,
            "head.weight and linear.weight are one parameter under two names; keep one of them",
        ),
        (networks.UnusedInside, None, "third.1.spare: the output in training mode does not"),
        (networks.Frozen, None, "first.0.weight: does not require a gradient"),
        (networks.Wired, None, "wiring: rename it; StagedModel has an attribute of this name"),
        (networks.Wide, None, "its output for 2 images is 2 x 5, not 2 x 3: one logit a class"),
        (networks.TupleInside, None, f"front of it and is no tensor but a list{BOTH}"),
        (networks.NotANumber, None, "in eval mode its logits of random normal images are NaN"),
        (networks.TooDeep, None, "fails on images of 1 x 8 x 8: RuntimeError"),
        (networks.Beside, None, "an image's logits depend on the other images of its batch"),
        (networks.Counting, None, "cut into stages it computes something else"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_gets_one_line(kind, layers, message):
    with pytest.raises(NetworkError, match=re.escape(message)) as error:
        make(kind, layers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_outside_of_torch_are_refused(draw):
    with pytest.raises(NetworkError, match=r"^draws random numbers outside"):
        make(partial(networks.OutsideRandom, draw))


def test_a_module_with_weights_in_two_layers_is_refused():
    class Around(networks.Plain):
        def forward(self, x):
            x = self.third(self.second(self.first(x)))
            return self.linear(self.third(x).mean((2, 3)))

    class Between(networks.Plain):
        def __init__(self):
            super().__init__()
            self.fourth = networks.block(6, 6)

        def forward(self, x):
            x = self.third(self.second(self.first(x)))
            return self.linear(self.third(self.fourth(x)).mean((2, 3)))

    make(Around)
    with pytest.raises(NetworkError, match="third: is used in the layer third and again in fourth"):
        make(Between)


def test_a_failed_attempt_leaves_the_network_as_it_was():
    network = networks.Tied()
    before = copy.deepcopy(network.state_dict())
    generator = torch.get_rng_state()
    with pytest.raises(NetworkError):
        as_chain(network, images(), CLASSES)
    assert network.training
    assert torch.equal(torch.get_rng_state(), generator)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
