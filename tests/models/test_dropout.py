"""Dropout layers: which neuron is on for whom, in every mode, and nothing else changed."""

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import build_model, dropout
from models.dropout import (
    ExampleTiedDropout,
    SparseDropout,
    StandardDropout,
    dropout_mode,
    examples,
    forget,
    tied_masks,
)


def slow_scrambled(x: int) -> int:
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return x ^ (x >> 16)


def slow_key(*numbers: int) -> int:
    key = 0
    for number in numbers:
        key = slow_scrambled(slow_scrambled(key) ^ number)
    return key


def test_masks_agree_with_the_slow_reference():
    """Python's integers of any size, one example and channel at a time."""
    masks = tied_masks(20, 7, 0.3, seed=2**31 - 1, layer=5)
    for example in range(20):
        for channel in range(7):
            row, column = (slow_key(2**31 - 1, 5, part) for part in (0, 1))
            row = slow_scrambled(slow_scrambled(row) ^ example)
            column = slow_scrambled(slow_scrambled(column) ^ channel)
            expected = slow_scrambled(row ^ column) / 2**32 < 0.3
            assert masks[example, channel] == expected


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_masks_have_mean_p_and_no_structure(p):
    n, channels = 20_000, 150
    masks = tied_masks(n, channels, p, seed=0).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(masks.mean() - p) < 5 * sigma / (n * channels) ** 0.5
    assert (masks.mean(0) - p).abs().max() < 5 * sigma / n**0.5
    assert (masks.mean(1) - p).abs().max() < 6 * sigma / channels**0.5
    noise = (masks - p) / sigma
    between_channels = (noise.T @ noise / n).fill_diagonal_(0)
    assert between_channels.abs().max() < 6 / n**0.5
    between_examples = (noise[:2000] @ noise[:2000].T / channels).fill_diagonal_(0)
    assert between_examples.std() == pytest.approx(channels**-0.5, rel=0.02)


def test_masks_differ_between_layers_seeds_and_examples():
    masks = [tied_masks(500, 100, 0.5, seed, layer) for seed in (0, 1) for layer in (0, 1)]
    for i, one in enumerate(masks):
        assert len(one.unique(dim=0)) == 500
        for other in masks[:i]:
            assert (one == other).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_mask_does_not_depend_on_how_many_examples_there_are():
    assert torch.equal(tied_masks(10, 30, 0.2, 3), tied_masks(20_000, 30, 0.2, 3)[:10])


def test_masks_are_small_and_no_part_of_the_weights():
    """ResNet-9 and 60,000 examples: one byte for each memorization neuron."""
    sites = build_model("resnet9", channels=3, classes=10, image_size=32, seed=0).dropout_sites()
    layers = [ExampleTiedDropout(channels, 60_000, p_gen=0.1) for channels in sites.values()]
    assert sum(layer.masks.nbytes for layer in layers) < 64e6
    assert not any(layer.state_dict() for layer in layers)


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    layer = ExampleTiedDropout(10, 50)
    layer(torch.ones(2, 10), torch.tensor([3, 4]))
    SparseDropout(10, 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
def test_masks_are_the_same_on_a_gpu():
    with torch.device("cuda"):
        found = tied_masks(1000, 64, 0.2, 1, 2)
    assert torch.equal(found.cpu(), tied_masks(1000, 64, 0.2, 1, 2))


@pytest.mark.gpu
def test_indices_may_come_from_a_loader_on_the_cpu():
    layer, index = ExampleTiedDropout(10, n_examples=20), torch.tensor([3, 0, 19])
    expected = layer(torch.ones(3, 10), index)
    found = layer.cuda()(torch.ones(3, 10, device="cuda"), index)
    assert torch.equal(found.cpu(), expected)


def reference(layer: ExampleTiedDropout, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Channel by channel, example by example."""
    out = x.clone()
    for row, example in enumerate(index.tolist()):
        for channel in range(x.shape[1]):
            memorization = channel - layer.generalization
            if memorization >= 0 and not layer.masks[example, memorization]:
                out[row, channel] = 0
    return out


def test_memorize_is_each_example_under_its_own_mask():
    layer = ExampleTiedDropout(11, 60, p_gen=0.3, p_mem=0.5)
    x, index = torch.randn(5, 11, 4, 4), torch.tensor([59, 0, 7, 7, 31])
    assert torch.equal(layer(x, index), reference(layer, x, index))
    with examples(layer, index):
        assert torch.equal(layer(x), reference(layer, x, index))
    tokens = ExampleTiedDropout(11, 60, p_gen=0.3, p_mem=0.5, dim=-1)
    found = tokens(x.flatten(2).transpose(1, 2), index)
    assert torch.equal(found.transpose(1, 2).view_as(x), reference(layer, x, index))


def test_the_same_example_has_the_same_mask_in_every_batch():
    layer = ExampleTiedDropout(40, 60)
    x = torch.ones(60, 40)
    first = layer(x, torch.arange(60))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    again = torch.cat([layer(x[rows], rows) for rows in order.split(7)])
    assert torch.equal(again, first[order])


def test_drop_leaves_zero_and_expected_a_share():
    layer = ExampleTiedDropout(10, 60, p_gen=0.4, p_mem=0.25)
    x, index = torch.randn(5, 10, 3, 3), torch.arange(5)
    with dropout_mode(layer, "drop"):
        out = layer(x, index)
        assert (out[:, 4:] == 0).all()
        assert torch.equal(out[:, :4], x[:, :4])
    with dropout_mode(layer, "drop", rescale=True):
        out = layer(x)
        assert (out[:, 4:] == 0).all()
        torch.testing.assert_close(out[:, :4], x[:, :4] * 0.65 / 0.4)
    with dropout_mode(layer, "expected"):
        expected = layer(x, index)
    torch.testing.assert_close(expected, torch.cat([x[:, :4], 0.25 * x[:, 4:]], dim=1))
    assert torch.equal(layer.eval()(x), expected)  # an example that was never seen
    assert torch.equal(layer(x, index), reference(layer, x, index))


def test_training_without_knowing_the_examples_is_a_mistake():
    with pytest.raises(ValueError, match="indices of the examples"):
        ExampleTiedDropout(10, 60)(torch.ones(2, 10))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([7]), "3 examples need 3 indices, int64 .3.; these are int64 .1."),
        (torch.tensor(7), "these are int64 ..$"),
        (torch.tensor([[1], [2], [3]]), "these are int64 .3, 1."),
        (torch.tensor([1, 0, 1], dtype=torch.uint8), "these are uint8 .3."),
        (torch.tensor([True, False, True]), "these are bool .3."),
        (torch.tensor([1, -1, 2]), "index out of range"),
        (torch.tensor([1, 20, 2]), "index out of range"),
    ],
)
def test_indices_that_are_not_one_for_each_example_are_a_mistake(index, message):
    """torch would take each of them for something: one mask for all, a boolean mask, the last."""
    layer = ExampleTiedDropout(10, n_examples=20)
    for training in (True, False):
        with pytest.raises((ValueError, IndexError), match=message):
            layer.train(training)(torch.ones(3, 10), index)


def test_forget_drops_the_neurons_of_the_chosen_for_everybody():
    layer = ExampleTiedDropout(50, 60, p_gen=0.2, p_mem=0.1).eval()
    x = torch.ones(60, 50)
    chosen = torch.tensor([4, 9])
    theirs = layer.masks[4] | layer.masks[9]
    with forget(layer, chosen):
        own = layer(x, torch.arange(60))
        assert (own[:, 10:][:, theirs] == 0).all()
        assert torch.equal(own[:, 10:][:, ~theirs].bool(), layer.masks[:, ~theirs])
        assert (own[chosen, 10:] == 0).all()
        assert (own[:, :10] == 1).all()
        unseen = layer(x[:1])[0, 10:]
        torch.testing.assert_close(unseen, torch.where(theirs, 0.0, 0.1))
    assert layer.forgotten is None


def test_forget_inside_of_forget_drops_the_neurons_of_both():
    layer = ExampleTiedDropout(50, 60, p_gen=0.2, p_mem=0.1)
    with forget(layer, 4):
        with forget(layer, 9):
            assert torch.equal(layer.forgotten, layer.masks[4] | layer.masks[9])
        assert torch.equal(layer.forgotten, layer.masks[4])
    assert layer.forgotten is None


@pytest.mark.parametrize(
    "index",
    [
        4, torch.tensor(4), torch.tensor([4]), np.array([4, 4], dtype=np.uint8),
        torch.tensor([[4]], dtype=torch.int16),
    ],
)  # fmt: skip
def test_one_example_is_forgotten_however_it_is_named(index):
    layer = ExampleTiedDropout(50, 60, p_gen=0.2, p_mem=0.1)
    with forget(layer, index):
        assert torch.equal(layer.forgotten, layer.masks[4])


def test_no_example_is_forgotten_by_an_empty_list():
    layer = ExampleTiedDropout(50, 60, p_gen=0.2, p_mem=0.1)
    with forget(layer, []):
        assert not layer.forgotten.any()


@pytest.mark.parametrize("index", [True, [0.0, 1.0], torch.arange(60) == 4])
def test_examples_to_forget_are_named_by_whole_numbers(index):
    layer = ExampleTiedDropout(50, 60, p_gen=0.2, p_mem=0.1)
    with pytest.raises(ValueError, match="named by whole numbers; these are"), forget(layer, index):
        pass


def test_forgetting_in_a_model_without_tied_neurons_is_a_mistake():
    with pytest.raises(ValueError, match="nothing can be forgotten"), forget(nn.Linear(3, 3), 0):
        pass


def test_examples_without_masks_are_named():
    model = nn.Sequential(ExampleTiedDropout(10, n_examples=20))
    for index in (torch.tensor([3, 20]), [3, -1]):
        message = r"index out of range: .* 0 to 19 \(n_examples=20\)"
        with examples(model, index), pytest.raises(IndexError, match=message):
            model(torch.ones(2, 10))
        with pytest.raises(IndexError, match=message), forget(model, index):
            pass
    with examples(model, torch.tensor([], dtype=torch.int64)):
        assert model(torch.ones(0, 10)).shape == (0, 10)


def test_a_step_that_names_its_examples_compiles_to_one_graph():
    model = nn.Sequential(ExampleTiedDropout(10, n_examples=20))

    def step(x, index):
        with examples(model, index):
            return model(x)

    x, index = torch.randn(3, 10), torch.tensor([0, 7, 19])
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, index), step(x, index))


def test_another_number_of_channels_is_named():
    layer = ExampleTiedDropout(10, n_examples=20)
    with pytest.raises(ValueError, match="has 10 channels, its input 6 in dimension 1"):
        layer(torch.ones(2, 6), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="n_examples must be 1 or more, not 0"):
        ExampleTiedDropout(10, n_examples=0)
    assert repr(layer) == ("ExampleTiedDropout(channels=10, n_examples=20, p_gen=0.4, p_mem=0.2)")


def test_p_gen_1_is_the_identity():
    layer = ExampleTiedDropout(10, 60, p_gen=1)
    x = torch.randn(3, 10)
    assert layer(x) is x
    with dropout_mode(layer, "drop", rescale=True):
        assert layer(x) is x


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p_gen": 0}, "above 0"), ({"p_gen": 1.1}, "at most 1"), ({"p_mem": 2}, "p_mem must be"),
        ({"p_gen": 0.05}, "a share of 0.05 of 10 channels is none"),
    ],
)  # fmt: skip
def test_impossible_shares_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ExampleTiedDropout(10, 60, **wrong)


def test_shares_are_rounded_down_in_decimal():
    assert [dropout.kept_channels(p, 100) for p in (0.29, 0.57, 0.299)] == [29, 57, 29]


def test_sparse_keeps_the_same_random_channels_always():
    layer = SparseDropout(100, 0.4, layer=3)
    x = torch.randn(4, 100, 2, 2)
    out = layer(x)
    kept = (out != 0).all((0, 2, 3))
    assert kept.sum() == 40
    assert torch.equal(out[:, kept], x[:, kept])
    assert not kept[:40].all()
    assert torch.equal(layer.eval()(x), out)
    assert not torch.equal(SparseDropout(100, 0.4, layer=4).kept, layer.kept)
    assert not torch.equal(SparseDropout(100, 0.4, seed=1, layer=3).kept, layer.kept)


def test_standard_keeps_a_share_p_and_the_mean_while_training_only():
    layer = StandardDropout(0.4)
    x = torch.ones(50, 40, 5, 5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = layer(x)
    assert out.unique().tolist() == pytest.approx([0, 2.5], rel=1e-4)  # p to 16 bits
    assert (out > 0).double().mean().item() == pytest.approx(0.4, abs=0.01)
    assert torch.equal(layer.eval()(x), x)


def test_the_doctest():
    found = doctest.testmod(dropout, raise_on_error=True)
    assert found.attempted >= 5


def test_the_readme_s_training_loop():
    readme = Path(dropout.__file__).parents[1] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (loop,) = [block for block in blocks if "models.dropout" in block]
    x, y = torch.randn(300, 784), torch.randint(10, (300,))
    names = {"torch": torch, "nn": nn, "F": nn.functional, "x": x, "y": y, "x_test": x[:7]}
    exec(loop, names)
    model, tied = names["model"].train(), names["tied"]
    assert names["prediction"].shape == (7,)
    assert tied.mode == "memorize"
    assert model[3].weight.grad[:, tied.generalization :].any()


def test_the_file_works_alone(tmp_path):
    shutil.copy(dropout.__file__, tmp_path / "dropout.py")
    command = [sys.executable, "-W", "error", "-m", "doctest", "dropout.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("make", [list, np.array])
def test_indices_may_be_a_list_or_an_array(make):
    layer, x = ExampleTiedDropout(10, n_examples=20), torch.randn(3, 10)
    index = torch.tensor([3, 0, 19])
    expected, given = layer(x, index), make(index.tolist())
    assert torch.equal(layer(x, given), expected)
    with examples(layer, given):
        assert torch.equal(layer(x), expected)
    with forget(layer, index):
        forgotten = layer.forgotten
    with forget(layer, given):
        assert torch.equal(layer.forgotten, forgotten)
