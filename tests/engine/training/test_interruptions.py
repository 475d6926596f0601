"""A killed, stopped or damaged training ends with the same bytes, or says why it cannot."""

import errno
import math
import os
import re
import signal
import zipfile

import pytest
import torch
from torch import nn

import gradient_accounting
from engine.config.schema import TrainConfig
from engine.errors import RunFailed, UserError
from engine.runs import files
from engine.runs.run import Run
from engine.runs.stopping import Terminated, ending_on_signals
from engine.training import epoch as one_epoch
from engine.training import loop
from tests.killing import killed_after_epoch, killed_at_write


def contents(run: Run) -> dict[str, object]:
    """Return what must not depend on interruptions: every table's bytes and the final weights."""
    found = {path.name: path.read_bytes() for path in run.directory.glob("*.csv")}
    for name, array in files.read_arrays(run.examples_path, "epoch", "correct", "loss").items():
        found[name] = array.tobytes()
    state = run.read_checkpoint(run.config.train.epochs)
    return found | {name: value.numpy().tobytes() for name, value in state.items()}


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


@pytest.mark.parametrize("missing", [[2], [1, 2]])
def test_what_cannot_be_resumed_never_comes_back(tiny, tmp_path, capsys, finished, missing):
    """Each start goes on from what the one before it trained, not from an older unusable epoch."""
    run = Run.of(tiny(f"output_dir={tmp_path}/unusable"))
    with killed_after_epoch(2):
        gradient_accounting.EXPERIMENT.main(run)
    for epoch in missing:
        run.checkpoint_path(epoch).unlink()
    first = min(missing)
    with killed_after_epoch(first):
        gradient_accounting.EXPERIMENT.main(run)
    assert "epoch_002.pt: no such file; resuming from the epoch before" in capsys.readouterr().err
    assert run.resumable_epochs() == [first, first - 1]
    assert {p.stem for p in run.resume_path(0).parent.glob("*.unusable")} == {
        f"epoch_{epoch:03d}" for epoch in missing
    }
    gradient_accounting.EXPERIMENT.main(run)
    assert "resuming from the epoch before" not in capsys.readouterr().err
    resumed = 0 if first == 1 else first  # two epochs are kept
    assert [start["from_epoch"] for start in run.starts()] == [0, resumed, first + 1]
    assert contents(run) == contents(finished)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_disk_that_cannot_read_an_epoch_leaves_it_alone(tiny, monkeypatch, number):
    run = Run.of(tiny())
    with killed_after_epoch(2):
        gradient_accounting.EXPERIMENT.main(run)
    before = sorted(p.name for p in run.resume_path(0).parent.iterdir())
    read = zipfile.ZipFile.testzip

    def fails(archive):
        if archive.filename.endswith("resume/epoch_002.pt"):
            raise OSError(number, os.strerror(number))
        return read(archive)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "testzip", fails)
        with pytest.raises(OSError, match=r"resume/epoch_002\.pt") as refused:
            gradient_accounting.EXPERIMENT.main(run)
    assert refused.value.errno == number
    assert sorted(p.name for p in run.resume_path(0).parent.iterdir()) == before
    gradient_accounting.EXPERIMENT.main(run)
    assert [start["from_epoch"] for start in run.starts()] == [0, 3]


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


def test_a_compiled_training_that_diverges_may_try_without(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **rest: model)
    diverge(monkeypatch, 6, math.nan)
    with pytest.raises(RunFailed, match=r"than 0\.1 may help, or train\.compile=false$"):
        gradient_accounting.EXPERIMENT.main(Run.of(tiny("train.compile=true")))


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


@pytest.mark.parametrize("place", [0, -1])
def test_one_weight_that_is_no_number_is_enough(place):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    [*model.parameters()][place].data[-1] = math.nan
    with pytest.raises(one_epoch.Diverged, match="the largest weight became nan"):
        loop._require_finite_weights(model, 1, one_epoch.Position(2, {}), 5, TrainConfig())


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
