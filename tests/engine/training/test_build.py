"""Measurements start from the final model of a finished run, or end with one clear line."""

import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradient_accounting
from data import DataError, load_dataset
from engine.errors import UserError
from engine.runs import locking
from engine.runs.locking import FILE_NAME as CLAIM
from engine.runs.locking import holder_of
from engine.runs.run import Run
from engine.training import build, loop
from engine.training.build import load_final_model, load_split, load_typicality

CPU = torch.device("cpu")


def test_one_process_downloads_and_others_wait(tiny, tmp_path, monkeypatch):
    config = tiny("data.name=mnist", f"data.root={tmp_path}/data")
    root = Path(config.data.root)
    seen = []

    def load(*_, **__):
        seen.append(holder_of(root))
        raise DataError("no network")

    monkeypatch.setattr(build, "_load_dataset_once", load)
    with pytest.raises(DataError):
        load_split(config)
    assert seen[0].pid == os.getpid(), "files are missing: nobody else may download them"
    monkeypatch.setattr(build, "at_hand", lambda name, root: True)
    with pytest.raises(DataError):
        load_split(config)
    assert seen[1:] == [None]
    root.mkdir(parents=True)
    (root / CLAIM).write_text("{}")  # somebody else's, who may be at work
    monkeypatch.setattr(locking.time, "sleep", lambda _: (root / CLAIM).unlink())
    with pytest.raises(DataError):
        load_split(config)
    assert seen[2].pid == os.getpid(), "it waited"


def test_data_that_nobody_downloads_needs_no_lock(tiny, monkeypatch):
    """The folder for downloads may be another user's, with a lock in it."""

    def refuse(*_, **__):
        raise PermissionError

    for name in ("lock", "holder_of"):
        monkeypatch.setattr(build, name, refuse)
    assert load_split(tiny("data.train_size=60")).n == 60


def test_scores_of_a_file_come_before_the_data_sets_own(tiny, tmp_path):
    """Except in an atypical split, which they have chosen already."""
    split = load_split(tiny())
    assert torch.equal(load_typicality(tiny(), split), split.typicality)
    dataset = load_dataset("glyphs", train_size=150, test_size=40)
    scores = np.linspace(0, 1, 150)
    np.savez(tmp_path / "own.npz", labels=dataset.label.numpy(), scores=scores)
    config = tiny(f"data.c_scores={tmp_path / 'own.npz'}")
    found = load_typicality(config, load_split(config))
    assert found.tolist() == scores[split.index.numpy()].tolist()


def complaint(run: Run) -> str:
    with pytest.raises(UserError) as caught:
        load_final_model(run, load_split(run.config), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_final_model_is_the_last_checkpoint(tiny):
    run = Run.of(tiny("train.epochs=1"))
    gradient_accounting.EXPERIMENT.main(run)
    model = load_final_model(run, load_split(run.config), CPU)
    for name, value in run.read_checkpoint(1).items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("kind", "script"),
    [("none", "gradient_accounting.py"), ("example_tied", "example_tied_dropout.py")],
)
def test_a_missing_run_names_the_command_that_trains_it(tiny, monkeypatch, kind, script):
    monkeypatch.setattr(sys, "argv", ["x.py", "a b.yaml", "seed=[0, 1]", "--epochs", "0,1"])
    command = shlex.join([script, "a b.yaml", "seed=[0, 1]"])
    run = Run.of(tiny(f"dropout.kind={kind}"))
    assert f"no such run; `python {command}` trains it" in complaint(run)


def test_a_half_finished_run_names_the_command_that_finishes_it(tiny, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    run = Run.of(tiny())
    monkeypatch.setattr(sys, "argv", ["gradient_accounting.py", "tiny.yaml"])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Record, "tables", die)
        with pytest.raises(KeyboardInterrupt):
            gradient_accounting.EXPERIMENT.main(run)
    monkeypatch.setattr(sys, "argv", ["layer_rewinding.py", "other.yaml"])
    assert complaint(run).endswith(
        "its training is interrupted after epoch 0; "
        f"`python gradient_accounting.py {run.directory}` finishes it"
    )


def test_a_run_on_other_examples_is_refused(tiny):
    run = Run.of(tiny("train.epochs=1"))
    gradient_accounting.EXPERIMENT.main(run)
    other = load_split(tiny("data.noise_seed=1"))
    with pytest.raises(UserError, match="is not what the data set gives now"):
        load_final_model(run, other, CPU)


def test_an_epoch_that_was_not_kept_names_those_that_were(tiny):
    run = Run.of(tiny("checkpoints.keep=[0]"))
    gradient_accounting.EXPERIMENT.main(run)
    with pytest.raises(UserError, match="no such file; the epochs kept are 0, 3"):
        run.read_checkpoint(2)
