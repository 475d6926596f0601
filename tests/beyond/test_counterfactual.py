"""Trainings on halves: each once, whoever does them, and the table that comes from them."""

import subprocess
import sys

import numpy as np
import pytest

import gradient_accounting
from beyond import counterfactual, example_scores
from beyond.counterfactual import read_counterfactual
from beyond.halves import draw_half
from engine.config.load import load_configs
from engine.errors import UserError
from engine.runs.run import Run
from engine.training.build import load_split
from plotting.beyond.counterfactual import plot_counterfactual
from plotting.families import Family
from plotting.figures import draw_figure

FEW = ("counterfactual.trainings=4", "train.epochs=2", "data.train_size=60")


@pytest.fixture
def run(tiny) -> Run:
    run = Run.of(tiny(*FEW))
    gradient_accounting.EXPERIMENT.main(run)
    return run


def test_the_table_against_trainings_one_by_one(run):
    counterfactual.EXPERIMENT.main(run)
    split, config = load_split(run.config), run.config
    halves = [draw_half(60, 0, number) for number in range(4)]
    correct = [counterfactual.train_on(config, split, h, k) for k, h in enumerate(halves)]
    table = read_counterfactual(run)
    assert table["index"].tolist() == split.index.tolist()
    for i in range(60):
        inside = [c[i] for h, c in zip(halves, correct) if h[i]]
        outside = [c[i] for h, c in zip(halves, correct) if not h[i]]
        assert (table["trained_in"][i], table["trained_out"][i]) == (len(inside), len(outside))
        if inside and outside:
            assert table["memorization"][i] == pytest.approx(np.mean(inside) - np.mean(outside))
        else:
            assert np.isnan(table["memorization"][i])
    assert len({c.tobytes() for c in correct}) == 4
    assert counterfactual.EXPERIMENT.is_done(run)


def test_a_training_sees_its_half_alone(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        counterfactual, "train_epoch", lambda m, o, split, *_: seen.append(split.index.tolist())
    )
    split, half = load_split(run.config), draw_half(60, 0, 1)
    counterfactual.train_on(run.config, split, half, 1)
    assert seen == [split.index[np.flatnonzero(half)].tolist()] * 2


def test_trainings_that_are_done_stay_when_a_later_one_dies_or_more_are_asked_for(
    run, tiny, monkeypatch
):
    train, calls = counterfactual.train_on, []

    def die_in_the_third(config, split, half, number):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(config, split, half, number)

    monkeypatch.setattr(counterfactual, "train_on", die_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        counterfactual.EXPERIMENT.main(run)
    assert not counterfactual.EXPERIMENT.is_done(run)
    counterfactual.EXPERIMENT.main(run)
    assert calls == [0, 1, 2, 2, 3]
    more = Run.of(tiny(*FEW[1:], "counterfactual.trainings=6"))
    counterfactual.EXPERIMENT.main(more)
    assert calls == [0, 1, 2, 2, 3, 4, 5]
    table = read_counterfactual(more)
    assert (table["trained_in"] + table["trained_out"] == 6).all()


@pytest.mark.slow(reason="three processes, which import torch: a minute on a busy CPU")
def test_several_processes_share_the_trainings(tiny_file, tmp_path):
    """Three at once, each in a process of its own: every training once, and one whole table."""
    overrides = [*FEW[1:], "counterfactual.trainings=8"]
    (config,) = load_configs(tiny_file, overrides)
    run = Run.of(config)
    gradient_accounting.EXPERIMENT.main(run)
    command = [sys.executable, "-m", "beyond.counterfactual", str(tiny_file), *overrides]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert any("median standard error" in line for line in lines)
    assert all("median standard error" in x or "other processes do" in x for x in lines)
    shared = (run.directory / "counterfactual.csv").read_bytes()
    table = read_counterfactual(run)
    assert (table["trained_in"] + table["trained_out"] == 8).all()

    alone = Run.of(load_configs(tiny_file, [*overrides, f"output_dir={tmp_path}/alone"])[0])
    gradient_accounting.EXPERIMENT.main(alone)
    counterfactual.EXPERIMENT.main(alone)
    assert (alone.directory / "counterfactual.csv").read_bytes() == shared


def test_the_figure_needs_scores(run, tmp_path):
    counterfactual.EXPERIMENT.main(run)
    family = Family(run.directory.parent, (run,))
    with pytest.raises(ValueError, match="example_scores"):
        plot_counterfactual(family)
    example_scores.EXPERIMENT.main(run)
    (path,) = draw_figure(plot_counterfactual, family, tmp_path / "figure", ["png"])
    assert path.stat().st_size > 5000


def test_an_untrained_run_is_refused_in_one_line(tiny):
    with pytest.raises(UserError, match="no such run"):
        counterfactual.EXPERIMENT.main(Run.of(tiny()))


def test_without_any_comparison_the_line_says_none(tiny, recwarn):
    few = ("counterfactual.trainings=2", "train.epochs=1", "data.train_size=2")
    run = Run.of(tiny(*few))
    gradient_accounting.EXPERIMENT.main(run)
    assert "median standard error none" in counterfactual.EXPERIMENT.main(run)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
