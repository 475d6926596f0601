"""Training: the schedule, plain SGD, and a record that agrees with the checkpoints."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradient_accounting
from data import batches, epoch_order, normalize
from engine.config.schema import TrainConfig
from engine.errors import UserError
from engine.runs import files
from engine.runs.run import Run, load_weights
from engine.runs.tables import HISTORY
from engine.training import loop
from engine.training.build import load_split, make_model
from engine.training.epoch import learning_rate
from engine.training.evaluation import evaluate


def test_triangle_per_step():
    train = TrainConfig(epochs=5, peak_epoch=2, peak_lr=0.4)
    rates = [learning_rate(step, 4, train) for step in range(20)]
    assert rates[:8] == pytest.approx([0.05 * k for k in range(1, 9)])
    assert rates[7] == 0.4
    assert rates[8:] == pytest.approx([0.4 * (1 - k / 12) for k in range(1, 13)])
    assert rates[-1] == 0


def test_triangle_against_interpolation():
    train = TrainConfig(epochs=50, peak_epoch=10)
    for step in (0, 1, 979, 980, 981, 3000, 4899):
        expected = np.interp((step + 1) / 98, [0, 10, 50], [0, 0.1, 0])
        assert learning_rate(step, 98, train) == pytest.approx(expected)


def test_warmup_cosine():
    train = TrainConfig(epochs=6, peak_epoch=2, peak_lr=1.0, schedule="warmup_cosine")
    rates = [learning_rate(step, 1, train) for step in range(6)]
    expected = [0.5, 1, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4))]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("peak_epoch", [0, 3])
def test_peak_at_either_end(peak_epoch):
    train = TrainConfig(epochs=3, peak_epoch=peak_epoch, peak_lr=1.0)
    rates = [learning_rate(step, 2, train) for step in range(6)]
    assert rates == sorted(rates, reverse=peak_epoch == 0)
    assert max(rates) <= 1
    assert all(rate >= 0 for rate in rates)


def test_an_epoch_is_plain_sgd(tiny):
    """Against a loop in which everything is written out by hand."""
    config = tiny("train.account_gradients=false", "train.batch_size=64")
    split = load_split(config)
    model = make_model(config, split)
    twin = copy.deepcopy(model)
    train = config.train

    optimizer = torch.optim.SGD(
        model.parameters(), lr=0, momentum=train.momentum, weight_decay=train.weight_decay
    )
    for epoch in (1, 2):
        loop.train_epoch(model, optimizer, split, config, epoch)

    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    twin.train()
    for epoch in (1, 2):
        order = epoch_order(split.n, config.seed, epoch)
        for step, rows in enumerate(order.split(64)):
            twin.zero_grad()
            logits = twin(normalize(split.images[rows]))
            F.cross_entropy(logits, split.label[rows]).backward()
            rate = np.interp((epoch - 1) * 3 + step + 1, [0, 3, 9], [0, train.peak_lr, 0])
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    gradient = p.grad + train.weight_decay * p
                    velocity[name] = train.momentum * velocity[name] + gradient
                    p -= rate * velocity[name]
    for (name, own), other in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6, msg=name)


def test_every_example_is_seen_once_an_epoch(tiny):
    split = load_split(tiny())
    seen = [batch.index for batch in batches(split, 32, epoch_order(split.n, 0, 1))]
    assert sorted(torch.cat(seen).tolist()) == sorted(split.index.tolist())


def test_seeds_of_noise_and_of_training_are_apart(tiny):
    first, second, other_noise = (
        load_split(tiny(*o)) for o in ([], ["seed=1"], ["data.noise_seed=1"])
    )
    assert torch.equal(first.label, second.label)
    assert not torch.equal(first.label, other_noise.label)
    models = [make_model(tiny(*o), first).conv1.conv.weight for o in ([], ["seed=1"])]
    assert not torch.equal(*models)


def test_training_leaves_the_global_random_state_alone(tiny):
    before = torch.random.get_rng_state()
    gradient_accounting.EXPERIMENT.main(Run.of(tiny("train.epochs=1")))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_checkpoint_for_every_epoch_from_the_initialization_on(finished):
    names = sorted(path.name for path in (finished.directory / "checkpoints").iterdir())
    assert names == ["epoch_000.pt", "epoch_001.pt", "epoch_002.pt", "epoch_003.pt"]
    split = load_split(finished.config)
    for name, value in make_model(finished.config, split).state_dict().items():
        assert torch.equal(finished.read_checkpoint(0)[name], value)


def test_history_and_examples_agree_with_the_checkpoints(finished):
    split = load_split(finished.config)
    history = HISTORY.read(finished.directory)
    assert [row["epoch"] for row in history] == [0, 1, 2, 3]
    assert [row["lr"] for row in history] == pytest.approx([0, 0.1, 0.05, 0])
    examples = files.read_arrays(finished.examples_path, "epoch", "correct", "loss")
    assert examples["epoch"].tolist() == [1, 2, 3]
    assert examples["loss"].dtype == np.float16
    model = make_model(finished.config, split)
    for row in history[1:]:
        epoch = int(row["epoch"])
        state = finished.read_checkpoint(epoch)
        load_weights(model, state, finished.checkpoint_path(epoch))
        outcome = evaluate(model, split.images, split.label)
        correct = examples["correct"][epoch - 1]
        assert np.array_equal(correct, outcome.correct.numpy())
        np.testing.assert_allclose(examples["loss"][epoch - 1], outcome.loss, rtol=2e-3, atol=1e-4)
        memorized = split.memorized.numpy()
        assert row["acc_clean"] == pytest.approx(correct[~memorized].mean())
        assert row["acc_noisy"] == pytest.approx(correct[memorized].mean())
        assert row["acc_total"] == pytest.approx(correct.mean())
        test = evaluate(model, split.test_images, split.test_label)
        assert row["acc_test"] == pytest.approx(test.correct.double().mean().item())
        assert row["loss_test"] == pytest.approx(test.loss.double().mean().item(), rel=1e-6)


def test_only_the_asked_for_epochs_stay(tiny):
    run = Run.of(tiny("checkpoints.keep=[1]", "train.epochs=5"))
    gradient_accounting.EXPERIMENT.main(run)
    names = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert names == ["epoch_001.pt", "epoch_005.pt"]
    assert not list((run.directory / "resume").iterdir())


def test_what_is_kept_does_not_change_the_run(tiny, finished):
    assert Run.of(tiny("checkpoints.keep=[1]")).directory == finished.directory


def test_a_finished_run_is_not_touched(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.directory.rglob("*")}
    gradient_accounting.EXPERIMENT.main(finished)
    assert {p: p.stat().st_mtime_ns for p in finished.directory.rglob("*")} == before


def snapshot(run: Run) -> dict:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run.directory.rglob("*")
        if path.is_file()
    }


RESULTS = ["history.csv", "gradient_accounting.csv", "examples.npz", "split.npz"]


@pytest.mark.parametrize("name", RESULTS)
def test_a_deleted_result_is_made_again_from_the_record_and_nothing_else(finished, name):
    before = snapshot(finished)
    (finished.directory / name).unlink()
    gradient_accounting.EXPERIMENT.main(finished)
    after = snapshot(finished)
    changed = {path for path in before if before[path] != after[path]}
    assert {path.name for path in changed} <= {name, "config.yaml"}
    path = finished.directory / name
    if path.suffix == ".csv":
        assert after[path][0] == before[path][0]
    else:
        again, first = np.load(path), np.load(io.BytesIO(before[path][0]))
        assert all(np.array_equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("name", [*RESULTS[:3], "checkpoints/epoch_003.pt"])
def test_a_finished_run_without_its_record_is_not_trained_again_in_silence(finished, name):
    for path in (finished.directory / name, finished.record_path):
        path.unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing from a finished run"):
        gradient_accounting.EXPERIMENT.main(finished)
