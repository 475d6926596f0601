"""The training loop: schedule, record, checkpoints, and going on after an interruption."""

import copy
import io
import math
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradient_accounting
from data import batches, epoch_order, normalize
from engine.config.schema import TrainConfig
from engine.errors import RunFailed, UserError
from engine.runs import files
from engine.runs.run import Run, load_weights
from engine.runs.stopping import Terminated, ending_on_signals
from engine.runs.tables import HISTORY
from engine.training import epoch as one_epoch
from engine.training import loop
from engine.training.build import load_split, make_model
from engine.training.epoch import learning_rate
from engine.training.evaluation import evaluate
from tests.killing import killed_after_epoch, killed_at_write


def contents(run: Run) -> dict[str, object]:
    """Return what must not depend on interruptions: every table's bytes and the final weights."""
    found = {path.name: path.read_bytes() for path in run.directory.glob("*.csv")}
    for name, array in files.read_arrays(run.examples_path, "epoch", "correct", "loss").items():
        found[name] = array.tobytes()
    state = run.read_checkpoint(run.config.train.epochs)
    return found | {name: value.numpy().tobytes() for name, value in state.items()}


# ---------------------------------------------------------------- schedule


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


# ---------------------------------------------------------------- what is trained


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


# ---------------------------------------------------------------- what is recorded


@pytest.fixture
def finished(tiny) -> Run:
    run = Run.of(tiny())
    gradient_accounting.EXPERIMENT.main(run)
    return run


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


# ---------------------------------------------------------------- interruptions


def test_killed_at_every_write_and_started_again(tiny, tmp_path, monkeypatch):
    """The process dies just before, or just after, the k-th file gets its name, for every k."""
    write = files.write_atomically
    overrides = ("train.epochs=2", "data.train_size=60", "data.test_size=20")
    whole = Run.of(tiny(*overrides, f"output_dir={tmp_path}/whole"))
    calls = []
    monkeypatch.setattr(files, "write_atomically", lambda *a: (calls.append(a[0]), write(*a)))
    gradient_accounting.EXPERIMENT.main(whole)
    monkeypatch.undo()
    expected = contents(whole)
    assert len(calls) >= 15

    for moment in range(len(calls)):
        run = Run.of(tiny(*overrides, f"output_dir={tmp_path}/killed{moment}"))
        with killed_at_write(moment, before=moment % 2 == 1):
            gradient_accounting.EXPERIMENT.main(run)
        gradient_accounting.EXPERIMENT.main(run)
        assert contents(run) == expected, calls[moment]


def test_layers_with_noise_of_their_own_resume_exactly(tiny, tmp_path, monkeypatch):
    """ViT's dropout draws from torch's global generator; augmentation from its own."""
    runs = [Run.of(tiny(*VIT, f"output_dir={tmp_path}/{name}")) for name in "ab"]
    gradient_accounting.EXPERIMENT.main(runs[0])
    with killed_after_epoch(1):
        gradient_accounting.EXPERIMENT.main(runs[1])
    assert runs[1].state == "interrupted after epoch 1"
    gradient_accounting.EXPERIMENT.main(runs[1])
    assert contents(runs[0]) == contents(runs[1])


VIT = (
    "model.name=vit_small", "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=1",
    "model.heads=2", "model.dim_head=8", "model.mlp_dim=16", "data.augment=true",
)  # fmt: skip


def send_signal_at(
    run: Run, monkeypatch, step: int, number: int = signal.SIGTERM, said: str = ""
) -> None:
    """Train a run until a signal comes in the middle of its k-th step."""
    backward, count = gradient_accounting.GradientAccountant.backward, iter(range(1, 1000))

    def backward_and_signal(*arguments):
        backward(*arguments)
        if next(count) == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(gradient_accounting.GradientAccountant, "backward", backward_and_signal)
        with ending_on_signals(), pytest.raises((Terminated, KeyboardInterrupt)) as end:
            gradient_accounting.EXPERIMENT.main(run)
    assert said in str(end.value.__context__)


@pytest.mark.parametrize("overrides", [(), VIT], ids=["resnet9", "vit, dropout, augmentation"])
def test_a_signal_ends_the_training_after_its_step(tiny, tmp_path, monkeypatch, overrides):
    """And the next start goes on with the next step: the same bytes, the same weights."""
    whole = Run.of(tiny(*overrides, f"output_dir={tmp_path}/whole"))
    gradient_accounting.EXPERIMENT.main(whole)
    for step in (1, 3, 5, 8, 15):
        run = Run.of(tiny(*overrides, f"output_dir={tmp_path}/{step}"))
        send_signal_at(run, monkeypatch, step)
        assert run.state == f"interrupted after epoch {(step - 1) // 5}"
        assert run.within_path.exists()
        if step < 15:
            send_signal_at(run, monkeypatch, 1, signal.SIGINT)
        gradient_accounting.EXPERIMENT.main(run)
        assert contents(run) == contents(whole)
        assert not run.within_path.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_middle_of_an_epoch_begins_it_anew(
    tiny, tmp_path, monkeypatch, capsys, finished, content
):
    run = Run.of(tiny(f"output_dir={tmp_path}/damaged"))
    send_signal_at(run, monkeypatch, step=7)
    whole = run.within_path.read_bytes()
    run.within_path.write_bytes(whole[:-99] if content is None else content)
    gradient_accounting.EXPERIMENT.main(run)
    assert (
        "within_epoch.pt: damaged, or not a checkpoint; restarting epoch 2"
        in capsys.readouterr().err
    )
    assert contents(run) == contents(finished)


def test_a_second_signal_does_not_wait(tiny, monkeypatch):
    backward, steps = gradient_accounting.GradientAccountant.backward, []

    def backward_and_signals(*arguments):
        steps.append(1)
        backward(*arguments)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("still there")

    monkeypatch.setattr(gradient_accounting.GradientAccountant, "backward", backward_and_signals)
    with ending_on_signals(), pytest.raises(Terminated):
        gradient_accounting.EXPERIMENT.main(Run.of(tiny()))
    assert len(steps) == 1


@pytest.mark.parametrize("damaged", ["checkpoint_path", "resume_path"])
@pytest.mark.parametrize("content", [b"", b"\x80garbage", None])
def test_a_damaged_newest_epoch_falls_back_to_the_one_before(
    tiny, tmp_path, monkeypatch, capsys, finished, damaged, content
):
    run = Run.of(tiny(f"output_dir={tmp_path}/damaged"))
    with killed_after_epoch(2):
        gradient_accounting.EXPERIMENT.main(run)
    path = getattr(run, damaged)(2)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    gradient_accounting.EXPERIMENT.main(run)
    assert "resuming from the epoch before" in capsys.readouterr().err
    assert contents(run) == contents(finished)


def diverge(monkeypatch, step: int, value: float) -> list[int]:
    """The k-th step of a training leaves this value in a weight; returns a list of all steps."""
    optimize, steps = torch.optim.SGD.step, []

    def optimize_and_diverge(optimizer):
        optimize(optimizer)
        steps.append(len(steps) + 1)
        if len(steps) == step:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(value)

    monkeypatch.setattr(torch.optim.SGD, "step", optimize_and_diverge)
    return steps


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("step", "seen", "rate", "kept"),
    [(6, "epoch 2, step 2 of 5", 0.08, 1), (10, "epoch 2, step 5 of 5", 0.05, 1)],
    ids=["seen by the next step", "seen by the evaluation, before it is saved"],
)
def test_a_loss_that_is_no_number_stops_the_run(tiny, monkeypatch, step, seen, rate, kept, value):
    run, advice = Run.of(tiny()), "A lower train.peak_lr than 0.1 may help"
    steps = diverge(monkeypatch, step, value)
    message = f"the loss became nan at {seen}, learning rate {rate}; epoch {kept} is kept. {advice}"
    with pytest.raises(RunFailed, match=f"^{re.escape(message)}$"):
        gradient_accounting.EXPERIMENT.main(run)
    assert len(steps) <= step + 1, "at once"
    assert run.state == f"interrupted after epoch {kept}"
    assert all(value.isfinite().all() for value in run.read_checkpoint(kept).values())
    assert not run.checkpoint_path(kept + 1).exists()


@pytest.mark.parametrize(
    ("step", "signal_at", "said"),
    [(7, 9, "the loss became nan"), (9, 9, "the largest weight became nan")],
    ids=["steps that nobody looked at", "weights of the last step"],
)
def test_a_signal_after_a_loss_that_is_no_number_saves_nothing(
    tiny, monkeypatch, step, signal_at, said
):
    """On a GPU, where the losses are looked at once in 50 steps."""
    monkeypatch.setitem(one_epoch.STEPS_UNSEEN, "cpu", 50)
    run = Run.of(tiny())
    diverge(monkeypatch, step, math.nan)
    send_signal_at(run, monkeypatch, signal_at, said=said)
    assert run.state == "interrupted after epoch 1"
    assert not run.within_path.exists()


def test_a_rate_that_is_far_too_high_stops_the_run(tiny):
    with pytest.raises(RunFailed, match=r"epoch 1, step \d of 5, learning rate .*epoch 0 is kept"):
        gradient_accounting.EXPERIMENT.main(Run.of(tiny("train.peak_lr=1e30")))


def test_other_data_under_the_same_run_are_refused(tiny, monkeypatch):
    run = Run.of(tiny())
    with killed_after_epoch(1):
        gradient_accounting.EXPERIMENT.main(run)
    arrays = files.read_arrays(run.split_path, "label", "true_label", "memorized", "index")
    arrays["label"][0] = (arrays["label"][0] + 1) % 10
    files.write_arrays(run.split_path, **arrays)
    with pytest.raises(UserError, match=r"its label is not what the data set gives now"):
        gradient_accounting.EXPERIMENT.main(run)
