"""Estimates: what is counted, where the seconds come from, and how they add up."""

import math

import pytest
import torch

from engine.config.load import to_yaml
from engine.launch import estimates
from engine.launch.estimates import Speeds, calibrate, duration, makespan
from engine.launch.experiments import load_experiments
from engine.runs import files
from engine.runs.provenance import describe_device
from engine.runs.run import Run
from engine.runs.stopping import time_left

CPU = torch.device("cpu")


def test_training_is_counted_in_passes(tiny):
    """150 images: forward and two or one times backward, and evaluation with 40 test images."""
    passes = load_experiments()["gradients"].passes
    assert passes(Run.of(tiny())) == 3 * (5 * 150 + 150 + 40)
    assert passes(Run.of(tiny("train.account_gradients=false"))) == 3 * (3 * 150 + 150 + 40)


def test_only_the_epochs_that_are_left_count(tiny):
    run = Run.of(tiny("train.epochs=4"))
    whole = load_experiments()["gradients"].passes(run)
    files.write_text(run.resume_path(3), "")
    assert load_experiments()["gradients"].passes(run) == whole / 4


def test_asking_for_more_takes_longer(tiny):
    for name, few, many in (
        ("rewinding", "rewinding.epochs=[0,3]", "rewinding.epochs=all"),
        ("retraining", "retraining.epochs=10", "retraining.epochs=11"),
        ("flipping", "flipping.examples=5", "flipping.examples=6"),
        ("flipping", "flipping.noise_copies=5", "flipping.noise_copies=6"),
        ("flipping", "flipping.second_split=false", "flipping.second_split=true"),
        ("dropout", "dropout.kind=standard", "dropout.kind=example_tied"),
    ):
        passes = load_experiments()[name].passes
        assert passes(Run.of(tiny(many))) > passes(Run.of(tiny(few))) > 0


@pytest.fixture
def finished(tiny):
    """Make the files of a finished training of 30 seconds that estimates read."""

    def make(*overrides: str, **provenance) -> Run:
        run = Run.of(tiny(*overrides))
        files.write_text(run.config_path, to_yaml(run.config))
        found = {"identity": run.identity, "finished": True, "seconds": 30.0}
        found["device"] = describe_device(CPU)
        files.write_json(run.provenance_path, found | provenance)
        return run

    return make


def test_past_runs_of_the_same_shape_tell_the_time(tiny, finished, monkeypatch):
    monkeypatch.setattr(estimates, "calibrate", lambda config, device: pytest.fail("not needed"))
    finished("seed=0", seconds=30.0)
    finished("seed=1", seconds=30.0)
    finished("seed=2", seconds=1000.0)  # an outlier: the median counts
    speeds = Speeds(torch.get_num_threads())
    seconds = speeds.seconds(
        load_experiments()["gradients"], Run.of(tiny("seed=9", "train.epochs=6"))
    )
    assert seconds == pytest.approx(60)


def test_a_finished_run_killed_before_it_tidied_up_tells_the_time(tiny, finished):
    run = finished()
    files.write_tensors(run.resume_path(3), {})
    speeds = Speeds(torch.get_num_threads())
    assert speeds.seconds(load_experiments()["gradients"], Run.of(tiny("seed=9"))) == pytest.approx(
        30
    )


@pytest.mark.parametrize(
    ("overrides", "provenance"),
    [
        (["model.width=0.1"], {}),
        (["train.batch_size=64"], {}),
        (["seed=0"], {"device": "another"}),
        (["seed=0"], {"finished": False}),
        *((["seed=0"], {"seconds": seconds}) for seconds in ("x", None, [], 0, True)),
    ],
)
def test_other_runs_tell_nothing(tiny, finished, monkeypatch, overrides, provenance):
    monkeypatch.setattr(estimates, "calibrate", lambda config, device: 0.5)
    finished(*overrides, **provenance)
    assert Speeds(torch.get_num_threads()).of(tiny("seed=9")) == 0.5


def test_calibration_happens_once_a_shape_with_the_threads_of_a_slot(tiny, monkeypatch):
    calls = []

    def calibrate(config, device):
        calls.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(estimates, "calibrate", calibrate)
    speeds, before = Speeds(3), torch.get_num_threads()
    for overrides in (["seed=1"], ["seed=2"], ["train.epochs=7"], ["model.width=0.1"]):
        speeds.of(tiny(*overrides))
    assert calls == [3, 3]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("override", ["seed=0", "dropout.kind=example_tied", "train.peak_lr=1e30"])
def test_calibration_trains_on_random_images(tiny, monkeypatch, override):
    monkeypatch.setattr(estimates, "CALIBRATION", 0.05)
    state = torch.get_rng_state()
    assert 0 < calibrate(tiny(override), CPU) < 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_larger_network_takes_longer(tiny, monkeypatch):
    monkeypatch.setattr(estimates, "CALIBRATION", 0.2)
    assert calibrate(tiny("model.width=0.5"), CPU) > 2 * calibrate(tiny(), CPU)


@pytest.mark.parametrize(("each", "largest"), [(1e-4, 128), (0.02, 128), (0.1, 32), (3.0, 2)])
def test_what_a_step_takes_for_its_weights_is_not_taken_for_every_image(
    tiny, monkeypatch, each, largest
):
    now, sizes = [0.0], []

    def train_epoch(model, optimizer, split, *others):
        now[0] += 0.4 + each * split.n
        sizes.append(split.n)

    monkeypatch.setattr(estimates, "train_epoch", train_epoch)
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: now[0])
    found = calibrate(tiny("train.batch_size=128"), CPU)
    assert found == pytest.approx((0.4 / 128 + each) / 3, rel=0.07)
    assert max(sizes) == largest
    assert len(sizes) < 12


def test_a_gpu_that_is_not_here_takes_an_unknown_time(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert math.isnan(Speeds(1).of(tiny("device=cuda")))


def test_whoever_is_free_takes_the_next_piece():
    assert makespan([3, 3, 2, 2], 1) == 10
    assert makespan([3, 3, 2, 2], 2) == 5
    assert makespan([1, 1, 9], 2) == 10
    assert makespan([], 2) == 0


def test_durations_in_words():
    expected = {0.2: "1 s", 89: "89 s", 90: "1.5 min", 5400: "1.5 h", 2e5: "2.3 days"}
    assert {seconds: duration(seconds) for seconds in expected} == expected
    assert duration(math.nan) == "an unknown time"


def test_without_a_budget_there_is_no_end():
    assert time_left() == math.inf
