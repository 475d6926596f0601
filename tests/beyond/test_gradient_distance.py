"""Gradient norms and distances agree with one example at a time, and no odd run is a crash."""

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import example_tied_dropout
import gradient_accounting
import plot_results
from beyond import gradient_distance
from beyond.gradient_distance import (
    DISTANCES,
    SUMMARY,
    compute_distances,
    compute_features,
    compute_gradient_norms,
    final_layer,
)
from data import normalize
from engine import stats
from engine.errors import RunFailed
from engine.launch.cli import run_script
from engine.runs.run import Run, load_weights
from engine.stats import rank_correlation
from engine.training.build import load_final_model, load_split
from engine.training.evaluation import evaluate
from models import build_model
from models.any_network import as_chain, example_images
from models.dropout import examples
from models.resnet9 import LOGIT_SCALE
from tests.conftest import complaints
from tests.killing import killed_at_write
from tests.models import networks

CPU = torch.device("cpu")
MODELS = {
    "resnet9": {"width": 0.1},
    "resnet50": {},
    "vit_small": {"patch": 4, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 16},
}


def slow_norms(model, images, label, index) -> list[float]:
    """One backward pass for each example."""
    model, norms = copy.deepcopy(model).eval().requires_grad_(True), []
    for row in range(len(label)):
        model.zero_grad()
        with examples(model, index[row : row + 1]):
            logits = model(normalize(images[row : row + 1]))
        F.cross_entropy(logits, label[row : row + 1]).backward()
        squares = [p.grad.double().square().sum().item() for p in model.parameters()]
        norms.append(math.sqrt(sum(squares)))
    return norms


def slow_distances(features, toward, split) -> list[float]:
    """Compute every mean again for every example."""

    features, label, clean = (
        features.double().numpy(),
        split.label.numpy(),
        ~split.memorized.numpy(),
    )

    def distance(row: int, kind: int) -> float:
        others = features[clean & (label == kind) & (np.arange(split.n) != row)]
        return np.linalg.norm(features[row] - others.mean(0)) if len(others) else np.nan

    found = []
    for row, kind in enumerate(toward.tolist()):
        squares = [distance(other, kind) ** 2 for other in np.flatnonzero(clean & (label == kind))]
        found.append(distance(row, kind) / np.sqrt(np.mean(squares)) if squares else np.nan)
    return found


class MadeUpSplit:
    """Four classes: of five clean examples or more, of two, of one, and of none."""

    classes = 4

    def __init__(self, n: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n, self.index = n, torch.arange(n)
        self.images = torch.randint(256, (n, 1, 20, 20), dtype=torch.uint8, generator=generator)
        self.label = torch.tensor([0] * (n - 9) + [1, 1, 1, 2, 2, 3, 3, 0, 0])
        self.memorized = torch.zeros(n, dtype=torch.bool)
        self.memorized[[n - 7, n - 5, n - 4, n - 3, n - 2, n - 1]] = True
        self.true_label = torch.where(self.memorized, (self.label + 1) % 4, self.label)


def made_up_model(name: str, images):
    """One that saw the images, so that its running statistics are not those of the start."""
    make = {"channels": 1, "classes": 4, "image_size": 20, **MODELS[name]}
    model = build_model(name, seed=1, **make)
    model.train()(normalize(images))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_gradient_norms_are_those_of_one_backward_pass_each(name):
    split = MadeUpSplit()
    rows = torch.tensor([3, 18])
    model = made_up_model(name, split.images)
    batch = (split.images[rows], split.label[rows], split.index[rows])
    before = copy.deepcopy(model.state_dict())
    found = compute_gradient_norms(model, *batch)
    assert found.tolist() == pytest.approx(slow_norms(model, *batch), rel=1e-3)
    assert found.max() > 1.01 * found.min()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_each_example_keeps_its_own_mask(tiny):
    config = example_tied_dropout.without_accounting(
        tiny("dropout.kind=example_tied", "model.width=0.1", "train.epochs=1")
    )
    run = Run.of(config)
    example_tied_dropout.train(run, CPU)
    split = load_split(config)
    model = load_final_model(run, split, CPU).eval()
    batch = (split.images[:6], split.label[:6], split.index[:6])
    found = compute_gradient_norms(model, *batch).tolist()
    assert found == pytest.approx(slow_norms(model, *batch), rel=1e-3)
    others = (*batch[:2], split.index[6:12])
    assert found != pytest.approx(slow_norms(model, *others), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_what_the_final_layer_sees(name):
    split = MadeUpSplit()
    model = made_up_model(name, split.images)
    features, loss = compute_features(model, split)
    final = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    logits = final(features) * (LOGIT_SCALE if name == "resnet9" else 1)
    assert torch.allclose(logits, model(normalize(split.images)), atol=1e-5)
    assert torch.allclose(loss, F.cross_entropy(logits, split.label, reduction="none"), atol=1e-5)


def test_a_network_without_a_final_linear_layer_is_refused():
    head = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = as_chain(nn.Sequential(nn.Conv2d(1, 1, 1), head), example_images(1, 8), 3)
    with pytest.raises(RunFailed, match=r"1\.0: the last layer is no nn.Linear"):
        final_layer(model)


def test_a_network_without_a_linear_layer_is_refused():
    model = build_model("resnet9", seed=0, channels=1, classes=4, image_size=20, width=0.1)
    model.linear = nn.Identity()
    matrix = as_chain(nn.Sequential(networks.Matrix(64, 3)), example_images(1, 8), 3)
    for network in (model, matrix):
        with pytest.raises(RunFailed, match=r"the network: the last layer is no nn\.Linear"):
            final_layer(network)


class OnTokens(nn.Module):
    """A network that averages the logits of all places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 3, 5), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).flatten(2).transpose(1, 2)).mean(1)


def test_a_final_layer_on_several_vectors_of_an_image_is_refused():
    model = as_chain(OnTokens(), example_images(1, 20), 4)
    with pytest.raises(RunFailed, match="more than one vector of an image"):
        compute_features(model, MadeUpSplit())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.linear = nn.GRU(20, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.rows(x.squeeze(1))[0][:, -1])


def test_a_network_that_vmap_cannot_run_is_refused():
    split = MadeUpSplit()
    batch = (split.images[:2], split.label[:2], split.index[:2])
    with pytest.raises(RunFailed, match="of single examples failed"):
        compute_gradient_norms(Recurrent().eval(), *batch)


def test_distances_are_those_of_each_mean_made_anew():
    split = MadeUpSplit()
    features = torch.randn(24, 5, generator=torch.Generator().manual_seed(3)) + 10
    for toward in (split.label, split.true_label):
        found = compute_distances(features, toward, split)
        slow = slow_distances(features, toward, split)
        assert found.tolist() == pytest.approx(slow, nan_ok=True)
        assert (found.isnan() == ((toward == 2) | (toward == 3))).all()
    own = compute_distances(features, split.label, split)
    for kind in (0, 1):  # the unit
        clean = (split.label == kind) & ~split.memorized
        assert own[clean].square().mean() == pytest.approx(1)


def test_a_class_that_is_one_point_has_no_distance():
    split = MadeUpSplit()
    assert compute_distances(torch.full((24, 5), 0.1), split.label, split).isnan().all()


# ---------------------------------------------------------------- a run


TWENTY = "gradient_distance.examples=20"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 50)


def trained(tiny, *overrides: str) -> Run:
    run = Run.of(tiny("data.train_size=60", *overrides))
    gradient_accounting.EXPERIMENT.main(run)
    return run


def command(arguments: Sequence[str]) -> int:
    return run_script(gradient_distance.EXPERIMENT, "", arguments)


def measured(run: Run, *options: str) -> tuple[list[dict], list[dict]]:
    assert command([str(run.directory), *options]) == 0
    return DISTANCES.read(run.directory), SUMMARY.read(run.directory)


def test_the_tables_of_a_run(tiny, capsys):
    """The run was trained in reduced precision; the measurement is in full precision."""
    run = trained(tiny, "precision=bf16")
    table, summary = measured(run)
    split = load_split(run.config)
    model = load_final_model(run, split, CPU).eval()
    assert [row["epoch"] for row in table] == [epoch for epoch in range(4) for _ in range(split.n)]
    for epoch in (0, 2):
        load_weights(model, run.read_checkpoint(epoch), run.checkpoint_path(epoch))
        rows = [row for row in table if row["epoch"] == epoch]
        column = {name: [row[name] for row in rows] for name in DISTANCES.columns}
        assert column["example"] == split.index.tolist()
        assert column["memorized"] == split.memorized.tolist()
        slow = slow_norms(model, split.images, split.label, split.index)
        assert column["gradient_norm"] == pytest.approx(slow, rel=1e-3)
        loss = evaluate(model, split.images, split.label).loss
        assert column["loss"] == pytest.approx(loss.tolist(), rel=1e-5)
        features, _ = compute_features(model, split)
        for name, toward in (("distance", split.label), ("distance_true", split.true_label)):
            slow = slow_distances(features, toward, split)
            assert column[name] == pytest.approx(slow, rel=1e-5)
        noisy = split.memorized.numpy()
        for row in (row for row in summary if row["epoch"] == epoch):
            here = {"clean": ~noisy, "noisy": noisy, "all": noisy | ~noisy}[row["subset"]]
            pair = [np.array(column[row[end]])[here] for end in ("of", "with")]
            assert row["n"] == here.sum()
            assert row["rho"] == pytest.approx(rank_correlation(*pair))
            assert row["low"] < row["rho"] < row["high"]
    assert len(summary) == 4 * 3 * 3
    assert "epoch 1: clean" in (said := capsys.readouterr().out)
    assert "epoch 3: clean" in said
    assert plot_results.main([str(run.directory), "--figure", "gradient-distance"]) == 0
    figures = run.directory.parent / "figures"
    assert {path.name for path in figures.glob("*.p*")} == {
        "gradient_distance.pdf",
        "gradient_distance.png",
    }


def test_nothing_is_measured_twice(tiny, monkeypatch):
    run = trained(tiny)
    measured(run, "gradient_distance.epochs=[0,3]", TWENTY)
    assert len(measured(run, "gradient_distance.epochs=[0,3]", TWENTY)[0]) == 40
    before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")}
    calls, compute = [], gradient_distance.compute_epoch

    def spy(*arguments):
        calls.append(arguments[-1])
        return compute(*arguments)

    monkeypatch.setattr(gradient_distance, "compute_epoch", spy)
    measured(run, "gradient_distance.epochs=[3,0]", TWENTY)
    assert {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")} == before
    assert not calls
    table, _ = measured(run, "gradient_distance.epochs=all", TWENTY)
    assert [call[-1] for call in calls] == ["1", "2"]
    assert len({row["example"] for row in table}) == 20
    assert len(table) == 80


def test_killed_at_every_write_and_started_again(tiny, monkeypatch):
    run = trained(tiny)
    few = ("gradient_distance.epochs=[0,3]", "gradient_distance.examples=5")
    run = Run.at(run.directory, few)
    gradient_distance.EXPERIMENT.main(run)
    paths = [run.directory / f"gradient_distance{end}.csv" for end in ("", "_summary")]
    expected = [path.read_bytes() for path in paths]

    for moment in range(6):  # two epochs, and two tables with their sources
        for made in [*run.directory.glob("gradient_d*"), *run.directory.glob("parts/*/*")]:
            made.unlink()
        with killed_at_write(moment):
            gradient_distance.EXPERIMENT.main(run)
        gradient_distance.EXPERIMENT.main(run)
        assert [path.read_bytes() for path in paths] == expected


@pytest.mark.parametrize(
    ("last", "chosen"),
    [(0, [0]), (3, [0, 1, 2, 3]), (20, [0, 4, 8, 12, 16, 20]), (50, [0, 10, 20, 30, 40, 50])],
)
def test_six_epochs_of_those_on_disk(tiny, tmp_path, last, chosen):
    run = Run(tmp_path, tiny())
    for epoch in range(last + 1):
        run.checkpoint_path(epoch).parent.mkdir(exist_ok=True)
        run.checkpoint_path(epoch).touch()
    assert gradient_distance.chosen_epochs(run) == chosen


# ---------------------------------------------------------------- odd runs


def test_without_noisy_examples(tiny, monkeypatch, capsys):
    run = trained(tiny, "data.noise_rate=0", "train.epochs=1")
    _, summary = measured(run, TWENTY)
    noisy = [row for row in summary if row["subset"] == "noisy"]
    assert {row["n"] for row in noisy} == {0}
    assert all(math.isnan(row["rho"]) for row in noisy)
    assert "noisy none; there are no noisy examples" in capsys.readouterr().out


def test_epochs_without_gradients_or_without_numbers(tiny, monkeypatch, capsys):
    """Weights of zero make zeros alone, a diverged training no numbers."""
    run = trained(tiny)
    model = load_final_model(run, load_split(run.config), CPU)
    for epoch, value in ((1, 0.0), (2, math.nan)):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, value)
        run.write_checkpoint(epoch, model.state_dict())
    table, summary = measured(run)
    assert {row["gradient_norm"] for row in table if row["epoch"] == 1} == {0}
    assert all(math.isnan(row["gradient_norm"]) for row in table if row["epoch"] == 2)
    assert {row["n"] for row in summary if row["epoch"] in (1, 2) and row["of"] != "loss"} == {0}
    assert all(row["n"] > 0 for row in summary if row["epoch"] in (0, 3))
    said = capsys.readouterr().out
    assert "epoch 1: clean none, noisy none" in said
    assert "60 of 240 without a gradient_norm" in said
    assert "120 of 240 without a distance" in said


def complain(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert command(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = complaints(printed.err)
    return line


def test_mistakes_get_one_line(tiny, tiny_file, capsys):
    assert "no such run" in complain(capsys, str(tiny_file))
    assert command([str(tiny_file), "--dry-run"]) == 0
    assert "to do after its training" in capsys.readouterr().out
    run = trained(tiny)
    place = str(run.directory)
    (run.directory / "checkpoints" / "epoch_002.pt").unlink()
    missing = complain(capsys, place, "gradient_distance.epochs=[0,2]")
    assert "2 is not allowed" in missing
    assert "kept the weights of the epochs 0, 1, 3" in missing
    for wrong in ("gradient_distance.epochs=half", "gradient_distance.examples=0"):
        assert "is not allowed" in complain(capsys, place, wrong)
    assert command([place, "--dry-run"]) == 0
    assert ": to do, " in capsys.readouterr().out
    assert not list(run.directory.glob("gradient_distance*"))
    for path in run.directory.glob("checkpoints/*"):
        path.unlink()
    assert "is missing from a finished run" in complain(capsys, place)
