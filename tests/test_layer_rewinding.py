"""Layer rewinding agrees, prediction by prediction, with loading, swapping and evaluating all."""

import copy
import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch

import example_tied_dropout
import gradient_accounting
import layer_rewinding
from data import normalize
from engine.errors import UserError
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.run import Run
from engine.runs.tables import HISTORY
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision
from engine.training.evaluation import batch_size, eval_mode, evaluate, mean_by_subset
from layer_rewinding import REWINDING, compute_predictions, load_earlier_groups
from models import build_model
from models.layer_groups import layer_groups
from tests.conftest import complaints
from tests.killing import killed_at_write

CPU = torch.device("cpu")
MODELS = {
    "resnet9": {"width": 0.1},
    "resnet50": {},
    "vit_small": {"patch": 4, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 16},
}
MODELS["torchvision:resnet18"] = {"layers": ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]}
ROWS = "rewinding.epochs=[0, 1, 2]"


def trained(config) -> Run:
    run = Run.of(config)
    gradient_accounting.EXPERIMENT.main(run)
    return run


@pytest.fixture
def finished(tiny) -> Run:
    return trained(tiny(ROWS))


def table(run: Run) -> dict[tuple[int, int], dict[str, float]]:
    rows = REWINDING.read(run.directory)
    return {(int(row["group"]), int(row["epoch"])): row for row in rows}


def swapped(run: Run, final, group, epoch: int, batchnorm: str):
    """The slow way: a whole model in which this group's tensors are replaced by name."""
    model, saved = copy.deepcopy(final), run.read_checkpoint(epoch)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    for name in state:
        if group.owns(name) and (name in parameters or batchnorm == "checkpoint"):
            state[name].copy_(saved[name])
    return model


@torch.no_grad()
def predict_slowly(model, images, batch_size: int, precision: str) -> torch.Tensor:
    with eval_mode(model), compute_precision(precision, CPU):
        batches = images.split(batch_size)
        return torch.cat([model(normalize(batch)).float().argmax(1) for batch in batches])


class MadeUpRun:
    """Checkpoints of models that saw the images once, each with running statistics of its own."""

    def __init__(self, name: str, images: torch.Tensor) -> None:
        make = {"channels": 1, "classes": 100, "image_size": 20, **MODELS[name]}
        self.models = [build_model(name, seed=seed, **make) for seed in range(3)]
        for model in self.models:
            for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
                norm.momentum = 1.0
            model.train()(normalize(images))
        self.final = self.models[-1].eval()

    def read_checkpoint(self, epoch: int):
        return self.models[epoch].state_dict()

    def checkpoint_path(self, epoch: int) -> Path:
        return Path(f"epoch_{epoch:03d}.pt")


@pytest.mark.parametrize(
    ("model", "batchnorm"),
    [
        ("resnet9", "final"), ("resnet9", "checkpoint"),
        pytest.param(
            "resnet50", "checkpoint",
            marks=pytest.mark.slow(reason="18 networks of 24 million weights: ten seconds"),
        ),
        ("vit_small", "final"), ("torchvision:resnet18", "checkpoint"),
    ],
)  # fmt: skip
def test_predictions_are_those_of_the_slow_way(model, batchnorm):
    """At batch sizes that divide the number of images, that do not, and of one image."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(256, (12, 1, 4, 4), dtype=torch.uint8, generator=generator)
    images = coarse.repeat_interleave(5, dim=2).repeat_interleave(5, dim=3)
    run = MadeUpRun(model, images)
    earlier = load_earlier_groups(run, run.final, [0, 1], batchnorm)
    groups = layer_groups(run.final)
    slow_models = {
        (group.index, epoch): swapped(run, run.final, group, epoch, batchnorm)
        for group in groups
        for epoch in earlier
    }
    different = 0
    for size, n in ((12, 12), (5, 12), (1, 2)):
        found = [compute_predictions(groups, earlier, batch) for batch in images[:n].split(size)]
        own = torch.cat([prediction for prediction, _ in found])
        assert torch.equal(own, predict_slowly(run.final, images[:n], size, "fp32"))
        for (group, epoch), model in slow_models.items():
            fast = torch.cat([predicted[epoch][group] for _, predicted in found])
            assert torch.equal(fast, predict_slowly(model, images[:n], size, "fp32"))
            different += not torch.equal(fast, own)
    assert different > len(groups), "hardly a prediction changes: the comparison shows little"


def test_reduced_precision_uses_each_epochs_own_weights(tiny):
    """Autocast remembers the weights that it rounded; those of another epoch must not be used."""
    run = trained(tiny("precision=bf16", "measure_precision=bf16", ROWS))
    layer_rewinding.EXPERIMENT.main(run)
    split = load_split(run.config)
    final = load_final_model(run, split, CPU)
    for group in layer_groups(final):
        for epoch in (0, 1, 2):
            slow_model = swapped(run, final, group, epoch, "final")
            slow = predict_slowly(slow_model, split.images, batch_size(CPU), "bf16") == split.label
            expected = mean_by_subset(slow, split.memorized, "acc")
            row = table(run)[group.index, epoch]
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batchnorm", ["final", "checkpoint"])
def test_the_table_of_a_run(tiny, monkeypatch, batchnorm):
    run = trained(tiny(f"rewinding.batchnorm={batchnorm}"))
    monkeypatch.setattr(layer_rewinding, "batch_size", lambda device: 37)
    layer_rewinding.EXPERIMENT.main(run)
    split = load_split(run.config)
    final = load_final_model(run, split, CPU)
    assert list(table(run)) == [(group, epoch) for group in range(9) for epoch in (0, 3)]
    for group in layer_groups(final):
        for epoch in (0, 3):
            model = swapped(run, final, group, epoch, batchnorm)
            slow = evaluate(model, split.images, split.label, size=37).correct
            expected = mean_by_subset(slow, split.memorized, "acc")
            row = table(run)[group.index, epoch]
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_the_last_epoch_is_the_trained_model(tiny):
    run = trained(tiny("rewinding.epochs=all"))
    layer_rewinding.EXPERIMENT.main(run)
    last = HISTORY.read(run.directory)[-1]
    for group in range(9):
        row = table(run)[group, 3]
        assert [row[name] for name in REWINDING.columns[2:]] == [
            last[name] for name in REWINDING.columns[2:]
        ]


def test_a_finished_table_is_not_touched(finished):
    layer_rewinding.EXPERIMENT.main(finished)
    before = {p: p.stat().st_mtime_ns for p in finished.directory.rglob("*")}
    layer_rewinding.EXPERIMENT.main(finished)
    assert {p: p.stat().st_mtime_ns for p in finished.directory.rglob("*")} == before


def test_without_noisy_examples_their_accuracy_is_nan(tiny):
    run = trained(tiny("data.noise_rate=0", "train.epochs=1"))
    layer_rewinding.EXPERIMENT.main(run)
    assert all(math.isnan(row["acc_noisy"]) for row in table(run).values())
    assert all(row["acc_total"] == row["acc_clean"] for row in table(run).values())


# ---------------------------------------------------------------- nothing is measured twice


def spy_on_counts(monkeypatch) -> list[tuple[int, ...]]:
    """Record the epochs that each batch is measured at."""
    calls, compute = [], layer_rewinding.compute_counts

    def spy(final, earlier, *rest):
        calls.append(tuple(earlier))
        return compute(final, earlier, *rest)

    monkeypatch.setattr(layer_rewinding, "compute_counts", spy)
    return calls


def at(run: Run, *overrides: str) -> Run:
    return Run.at(run.directory, overrides)


def test_other_epochs_reuse_the_cells_that_are_there(finished, monkeypatch):
    layer_rewinding.EXPERIMENT.main(at(finished, "rewinding.epochs=[0, 2]"))
    calls = spy_on_counts(monkeypatch)
    layer_rewinding.EXPERIMENT.main(at(finished, "rewinding.epochs=all"))
    assert set(calls) == {(1,)}
    assert {epoch for _, epoch in table(finished)} == {0, 1, 2, 3}
    calls.clear()
    layer_rewinding.EXPERIMENT.main(at(finished, "rewinding.epochs=[1]"))
    assert not calls
    assert {epoch for _, epoch in table(finished)} == {1}
    layer_rewinding.EXPERIMENT.main(at(finished, "rewinding.batchnorm=checkpoint"))
    assert set(calls) == {(0, 1, 2)}


def test_killed_at_every_write_and_started_again(finished, monkeypatch):
    monkeypatch.setattr(layer_rewinding, "batch_size", lambda device: 40)
    layer_rewinding.EXPERIMENT.main(finished)
    path = finished.directory / "layer_rewinding.csv"
    expected = path.read_bytes()

    for moment in range(6):  # four batches, table, source
        for made in finished.directory.glob("layer_rewinding.*"):
            made.unlink()
        for part in finished.directory.glob("parts/*/*"):
            part.unlink()
        with killed_at_write(moment):
            layer_rewinding.EXPERIMENT.main(finished)
        with monkeypatch.context() as patch:
            calls = spy_on_counts(patch)
            layer_rewinding.EXPERIMENT.main(finished)
            assert len(calls) == max(0, 3 - moment)
        assert path.read_bytes() == expected


# ---------------------------------------------------------------- mistakes: one line, exit 2


def complain(run: Run, capsys, *overrides: str) -> str:
    capsys.readouterr()
    arguments = [str(run.directory), *overrides]
    assert run_script(layer_rewinding.EXPERIMENT, "", arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = complaints(printed.err)
    return line


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_bad_checkpoints_get_one_line_and_nothing_is_lost(finished, tiny, tmp_path, capsys):
    layer_rewinding.EXPERIMENT.main(at(finished, "rewinding.epochs=[0]"))
    before = (finished.directory / "layer_rewinding.csv").read_bytes()
    path, trace = finished.checkpoint_path(1), tmp_path / "executed"
    good = path.read_bytes()

    path.write_bytes(good[:-200])
    assert "damaged" in complain(finished, capsys, ROWS)
    path.write_bytes(pickle.dumps(Bomb(trace)))
    assert "damaged, or not a checkpoint" in complain(finished, capsys, ROWS)
    torch.save({"identity": finished.identity, "epoch": 1, "model": Bomb(trace)}, path)
    assert "damaged, or not a checkpoint" in complain(finished, capsys, ROWS)
    assert not trace.exists()
    other = trained(tiny("model.width=0.1", "train.epochs=1"))
    path.write_bytes(other.checkpoint_path(1).read_bytes())
    assert "belongs to another run" in complain(finished, capsys, ROWS)
    content = files.read_tensors(other.checkpoint_path(1))
    files.write_tensors(path, content | {"identity": finished.identity})
    assert "of another model: conv1.conv.weight is" in complain(finished, capsys, ROWS)
    path.unlink()
    assert "no such file; the epochs kept are 0, 2, 3" in complain(finished, capsys, ROWS)

    assert (finished.directory / "layer_rewinding.csv").read_bytes() == before
    path.write_bytes(good)
    layer_rewinding.EXPERIMENT.main(at(finished, ROWS))
    assert len(table(finished)) == 27


def test_a_missing_run_is_status_2_and_a_dry_run_says_so(tiny_file, capsys):
    arguments = [str(tiny_file)]
    script = (layer_rewinding.EXPERIMENT, "")
    assert run_script(*script, arguments) == 2
    assert "no such run; `python gradient_accounting.py" in capsys.readouterr().err
    assert run_script(*script, [*arguments, "--dry-run"]) == 0
    assert "to do after its training, which is to do" in capsys.readouterr().out


def test_an_epoch_beyond_the_training_is_refused_at_the_door(tiny):
    with pytest.raises(UserError, match=r"rewinding\.epochs: 4 is not allowed: at most"):
        tiny("rewinding.epochs=[0, 4]")


def test_each_example_keeps_its_own_mask_in_a_run_with_dropout(tiny):
    """Nothing taken back, the network is as its history last saw it: everybody under its mask."""
    config = example_tied_dropout.without_accounting(tiny("dropout.kind=example_tied"))
    run = Run.of(dataclasses.replace(config, model=dataclasses.replace(config.model, width=0.1)))
    example_tied_dropout.train(run, CPU)
    layer_rewinding.EXPERIMENT.main(run)
    history = HISTORY.read(run.directory)[-1]
    rows = REWINDING.read(run.directory)
    last = [row for row in rows if row["epoch"] == history["epoch"]]
    assert {row["acc_total"] for row in last} == {history["acc_total"]}

    split = load_split(run.config)
    final = load_final_model(run, split, CPU)
    model = copy.deepcopy(final)
    state = model.state_dict()
    for name in filter(layer_groups(model)[2].owns, state):
        if "running" not in name and "tracked" not in name:
            state[name].copy_(run.read_checkpoint(0)[name])
    outcome = evaluate(model, split.images, split.label, index=split.index)
    (row,) = [row for row in rows if (row["group"], row["epoch"]) == (2, 0)]
    assert row["acc_total"] == pytest.approx(outcome.correct.double().mean().item())
