"""Layer groups partition every model, and its stages are its forward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from models.layer_groups import StagedModel, layer_groups, run_stages

NAMES = {
    "resnet9": [*(f"conv{i}" for i in range(1, 9)), "linear"],
    "resnet50": ["stem", "layer1", "layer2", "layer3", "layer4", "fc"],
    "vit_small": ["embedding", *(f"block{i}" for i in range(6)), "head"],
}
SMALL = {
    "resnet9": {"width": 0.25},
    "resnet50": {},
    "vit_small": {"dim": 32, "heads": 2, "dim_head": 16, "mlp_dim": 48},
}
COUNTS = {  # parameters of each group, with 10 classes, by (model, image size, channels)
    ("resnet9", 32, 3): [1856, 205056, 147712, 147712, 295424, 590336, 590336, 295168, 1280],
    ("resnet9", 28, 1): [704, 205056, 147712, 147712, 295424, 590336, 590336, 295168, 1280],
    ("resnet50", 32, 3): [9536, 215808, 1219584, 7098368, 14964736, 20490],
    ("resnet50", 28, 1): [3264, 215808, 1219584, 7098368, 14964736, 20490],
    ("vit_small", 32, 3): [163448, *[1576449] * 6, 6154],
    ("vit_small", 28, 1): [112168, *[1576449] * 6, 6154],
}
TOTALS = {
    ("resnet9", 32, 3): 2_274_880,
    ("resnet9", 28, 1): 2_273_728,
    ("resnet50", 32, 3): 23_528_522,
    ("resnet50", 28, 1): 23_522_250,
    ("vit_small", 32, 3): 9_628_296,
    ("vit_small", 28, 1): 9_577_016,
}


def small_model(name: str) -> StagedModel:
    return build_model(name, channels=3, classes=10, image_size=20, seed=0, **SMALL[name])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 20, 20)


@pytest.mark.parametrize(("name", "image_size", "channels"), COUNTS)
def test_parameter_counts(name, image_size, channels):
    model = build_model(name, channels=channels, classes=10, image_size=image_size, seed=0)
    counts = [
        sum(p.numel() for p in group.parameters(model).values()) for group in layer_groups(model)
    ]
    assert counts == COUNTS[name, image_size, channels]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    assert sum(counts) == TOTALS[name, image_size, channels]


@pytest.mark.parametrize("name", NAMES)
def test_groups_partition_parameters_and_buffers_in_forward_order(name):
    model = small_model(name)
    groups = layer_groups(model)
    assert [group.name for group in groups] == NAMES[name]
    assert [group.index for group in groups] == list(range(len(groups)))
    owned = [key for group in groups for key in model.state_dict() if group.owns(key)]
    assert sorted(owned) == sorted(model.state_dict())
    parameters = {k: v for group in groups for k, v in group.parameters(model).items()}
    assert parameters == dict(model.named_parameters())


def test_block1_does_not_own_block10():
    options = SMALL["vit_small"] | {"depth": 11}
    model = build_model("vit_small", channels=3, classes=10, image_size=8, seed=0, **options)
    assert [group.name for group in layer_groups(model)][11] == "block10"


@pytest.mark.parametrize("prefixes", [("a",), ("a", "ab", "a.weight")])
def test_groups_that_are_no_partition_are_refused(prefixes):
    class Wrong(StagedModel):
        def __init__(self):
            super().__init__()
            self.a, self.ab = nn.Linear(2, 2), nn.Linear(2, 2)

        def stages(self):
            return [("first", prefixes, self.a), ("second", ("a",), self.ab)]

    with pytest.raises(AssertionError, match="must belong to one layer group"):
        layer_groups(Wrong())


@pytest.mark.parametrize("name", NAMES)
def test_stages_continue_from_any_group_bit_for_bit(name, images):
    model = small_model(name).eval()
    groups = layer_groups(model)
    with torch.no_grad():
        logits = model(images.clone())
        states = [images]
        for group in groups:
            states.append(group.forward(states[-1]))
        assert torch.equal(states[-1], logits)
        # In reverse, so that a stage that wrote into its input would spoil what follows.
        for start in reversed(range(len(groups))):
            assert torch.equal(run_stages(groups, states[start], start), logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_stages_of_its_own(name, images):
    model = small_model(name).eval()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for p in layer_groups(clone)[-1].parameters(clone).values():
            p.zero_()
        assert not run_stages(layer_groups(clone), images).any()
        assert run_stages(layer_groups(model), images).any()


@pytest.mark.parametrize("name", NAMES)
def test_training_the_upper_groups_alone_gives_their_gradients(name, images):
    """With the lower half of the groups frozen, that is, run without gradients."""
    labels = torch.tensor([0, 1, 2, 3])
    model = small_model(name).train()
    staged = copy.deepcopy(model)
    groups = layer_groups(staged)
    top = groups[len(groups) // 2].index
    before_dropout = torch.get_rng_state()
    F.cross_entropy(model(images), labels).backward()
    torch.set_rng_state(before_dropout)
    with torch.no_grad():
        state = run_stages(groups, images, stop=top)
    F.cross_entropy(run_stages(groups, state, start=top), labels).backward()

    expected = dict(model.named_parameters())
    for group in groups:
        for key, parameter in group.parameters(staged).items():
            if group.index < top:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, expected[key].grad), key
    for (key, one), (_, other) in zip(model.named_buffers(), staged.named_buffers()):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_stays_close_and_trains(name, images):
    model = small_model(name).eval()
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    rounded.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
