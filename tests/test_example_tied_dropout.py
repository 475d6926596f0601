"""Example-tied dropout as a run: trained, resumed, dropped, measured, and read by others."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import example_tied_dropout
import gradient_accounting
from data import normalize
from engine.config.load import load_configs
from engine.errors import UserError
from engine.launch.cli import find_runs
from engine.runs import files
from engine.runs.run import Run
from engine.runs.tables import HISTORY
from engine.training.build import load_final_model, load_split
from engine.training.evaluation import evaluate_split
from example_tied_dropout import (
    ABLATION,
    ACCURACIES,
    DROPOUT,
    FORGOTTEN,
    TYPICALITY,
    UNLEARNING,
    accuracies,
    choose_learned,
    compute_unlearning,
    dropped,
    recalibrated,
    without_accounting,
)
from models.dropout import examples, tied_layers
from tests.conftest import TINY
from tests.killing import killed_after_epoch

CPU = torch.device("cpu")

OWN = ("model.width=0.1", "dropout.kind=example_tied", "dropout.forget_draws=2")

VIT = (
    "model.name=vit_small", "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=2",
    "model.heads=2", "model.dim_head=8", "model.mlp_dim=16",
)  # fmt: skip

MODELS = {
    "resnet9": ("model.width=0.1",),
    "resnet50": ("model.name=resnet50", "model.width=1.0", "data.train_size=40"),
    "vit_small": VIT,
}


@pytest.fixture
def run_of(tiny):
    """A run with example-tied dropout, unless overrides say something else."""

    def make(*overrides: str) -> Run:
        given = {override.partition("=")[0] for override in overrides}
        kept = [own for own in OWN if own.partition("=")[0] not in given]
        return Run.of(without_accounting(tiny(*kept, *overrides)))

    return make


LEARNED = ("data.noise_rate=0.5", "train.peak_lr=0.05")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The directory of a run that is trained and measured once for all tests."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "a.yaml").write_text(TINY + f"output_dir: {directory / 'runs'}\n")
    (config,) = load_configs(directory / "a.yaml", (*OWN, *LEARNED))
    run = Run.of(without_accounting(config))
    example_tied_dropout.EXPERIMENT.main(run)
    return run.directory


@pytest.fixture
def finished(trained, run_of) -> Run:
    """A copy of it, where its configuration expects it."""
    run = run_of(*LEARNED)
    shutil.copytree(trained, run.directory)
    return run


def states(run: Run) -> dict[str, dict]:
    path = run.directory / "example_tied_dropout.csv"
    return {row["state"]: row for row in DROPOUT.read(path.parent)}


def contents(run: Run) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in run.directory.glob("*.csv")}
    state = run.read_checkpoint(run.config.train.epochs)
    return found | {name: value.numpy().tobytes() for name, value in state.items()}


def test_each_training_example_is_recorded_under_its_own_mask(finished):
    split = load_split(finished.config)
    model = load_final_model(finished, split, CPU).eval()
    correct = []
    for row in range(split.n):
        with examples(model, split.index[row : row + 1]), torch.no_grad():
            logits = model(normalize(split.images[row : row + 1]))
        correct.append(int(logits.argmax()) == int(split.label[row]))
    with torch.no_grad():  # test images: the expected mask
        prediction = model(normalize(split.test_images)).argmax(1)
    correct = np.array(correct)
    last = HISTORY.read(finished.directory)[-1]
    assert last["acc_total"] == pytest.approx(correct.mean())
    assert last["acc_noisy"] == pytest.approx(correct[split.memorized.numpy()].mean())
    assert last["acc_test"] == pytest.approx((prediction == split.test_label).double().mean())
    assert {k: states(finished)["before"][k] for k in ACCURACIES} == {
        k: pytest.approx(last[k]) for k in ACCURACIES
    }


@pytest.mark.parametrize("kind", ["example_tied", "standard"])
def test_a_resumed_run_has_the_same_masks_and_results(run_of, tmp_path, kind):
    """Standard dropout draws anew at every step, from the epoch's own stream."""
    whole, killed = (run_of(f"dropout.kind={kind}", f"output_dir={tmp_path}/{x}") for x in "ab")
    example_tied_dropout.EXPERIMENT.main(whole)
    with killed_after_epoch(1):
        example_tied_dropout.EXPERIMENT.main(killed)
    example_tied_dropout.EXPERIMENT.main(killed)
    assert contents(whole) == contents(killed)
    layers = [
        tied_layers(load_final_model(run, load_split(run.config), CPU)) for run in (whole, killed)
    ]
    assert len(layers[0]) == (6 if kind == "example_tied" else 0)
    for one, other in zip(*layers):
        assert torch.equal(one.masks, other.masks)


def test_a_step_trains_each_example_with_its_own_neurons(run_of, monkeypatch):
    """In the linear layer, behind the last dropout: what no example uses, no step changes.

    As in a subset, an example's index is not its row.
    """

    def subset(config):
        split = load_split(config)
        return dataclasses.replace(split, index=7 * split.index + 3)

    monkeypatch.setattr(example_tied_dropout, "load_split", subset)
    run = run_of(
        "train.epochs=1", "train.peak_epoch=0", "train.batch_size=2", "train.weight_decay=0",
        "data.train_size=4", "dropout.p_mem=0.1",
    )  # fmt: skip
    example_tied_dropout.EXPERIMENT.main(run)
    split = subset(run.config)
    layer = tied_layers(load_final_model(run, split, CPU))[-1]
    unused = layer.generalization + (~layer.masks[split.index].any(0)).nonzero().flatten()
    assert len(unused)
    weights = [run.read_checkpoint(epoch)["linear.weight"] for epoch in (0, 1)]
    assert torch.equal(weights[0][:, unused], weights[1][:, unused])
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("resnet9", "example_tied"), ("resnet9", "sparse"), ("vit_small", "example_tied"),
        ("vit_small", "sparse"), ("resnet50", "example_tied"),
        pytest.param(
            "resnet50", "sparse", marks=pytest.mark.slow(reason="24 million weights: five seconds")
        ),
    ],
)  # fmt: skip
def test_every_model_has_its_sites(run_of, model, kind):
    run = run_of(*MODELS[model], f"dropout.kind={kind}", "train.epochs=1")
    line = example_tied_dropout.EXPERIMENT.main(run)
    assert f"{kind.replace('_', '-')} 0.4" in line
    assert set(states(run)) == {"before", "after"}


def test_p_gen_1_is_training_without_dropout(run_of):
    found = [run_of("dropout.p_gen=1"), run_of("dropout.kind=none")]
    for run in found:
        example_tied_dropout.EXPERIMENT.main(run)
    weights = [run.read_checkpoint(3) for run in found]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_what_decides_the_weights_decides_the_directory(run_of):
    kinds = [run_of(f"dropout.kind={k}") for k in ("example_tied", "standard", "sparse", "none")]
    changed = ["p_gen=0.5", "p_mem=0.3", "sites=layers", "seed=1"]
    own = [run_of(f"dropout.{change}") for change in changed]
    directories = [run.directory for run in (*kinds, *own)]
    assert len(set(directories)) == len(directories)
    for change in ("rescale=paper", "batchnorm=recalibrated", "forget=[2]", "forget_draws=3"):
        assert run_of(f"dropout.{change}").directory == kinds[0].directory
    for kind, without_effect in (
        ("standard", ["p_mem=0.3", "seed=1"]),
        ("sparse", ["p_mem=0.3"]),
        ("none", changed),
    ):
        expected = run_of(f"dropout.kind={kind}").directory
        for change in without_effect:
            assert run_of(f"dropout.kind={kind}", f"dropout.{change}").directory == expected


def test_the_other_scripts_train_without_dropout(tiny_file, tiny):
    plain = Run.of(tiny())
    for override in ("dropout.kind=example_tied", "sweep.dropout.p_gen=[0.2, 0.4]"):
        assert find_runs(str(tiny_file), [override]) == [plain]
    swept = find_runs(str(tiny_file), ["sweep.dropout.kind=[sparse, none]"], without_accounting)
    assert [run.config.dropout.kind for run in swept] == ["sparse", "none"]


def test_other_scripts_read_such_a_run_by_its_directory(finished, tmp_path):
    (run,) = find_runs(str(finished.directory.rename(tmp_path / "moved")))
    assert run.config.dropout.kind == "example_tied"
    split = load_split(run.config)
    model = load_final_model(run, split, CPU)
    history = HISTORY.read(run.directory)[-1]
    found = accuracies(split, *evaluate_split(model, split))
    assert found == {name: pytest.approx(history[name]) for name in ACCURACIES}
    assert "clean" in gradient_accounting.EXPERIMENT.main(run)  # finished, so only read
    with pytest.raises(UserError, match=r"dropout\.p_mem: cannot be changed"):
        Run.at(run.directory, ("dropout.p_mem=0.5",))


def test_an_unfinished_run_that_accounts_gradients_is_left_to_its_script(tiny, monkeypatch):
    run = Run.of(tiny())
    with pytest.raises(UserError, match="no such run"):
        example_tied_dropout.EXPERIMENT.main(run)
    gradient_accounting.EXPERIMENT.main(run)
    assert "no" in example_tied_dropout.EXPERIMENT.main(run)
    assert states(run)["after"]["acc_noisy"] == states(run)["before"]["acc_noisy"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dropout.kind=tied"], "one of example_tied, standard, sparse, none"),
        (["dropout.p_gen=0"], "a number above 0, 1 at the most"),
        (["dropout.p_mem=1.5"], "from 0 to 1"),
        (["dropout.forget=[1, 1]"], "a list of different whole numbers"),
        (["dropout.forget=3"], "a list of different whole numbers"),
        ([*VIT, "dropout.sites=layers"], "vit_small takes dropout behind its blocks only"),
    ],
)
def test_a_mistake_gets_one_line(tiny_file, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_configs(tiny_file, overrides)
    assert "\n" not in str(caught.value)


def test_a_share_of_no_channel_at_all_gets_one_line(run_of):
    with pytest.raises(UserError, match=r"dropout: a share of 0\.1 of 6 channels is none at all"):
        example_tied_dropout.EXPERIMENT.main(run_of("dropout.p_gen=0.1"))


def test_measurement_settings_measure_again_and_never_train_again(finished, run_of, monkeypatch):
    monkeypatch.setattr(example_tied_dropout, "train_run", None)
    first = states(finished)["after"]
    assert finished.directory == run_of(*LEARNED).directory
    rows = ABLATION.read(finished.directory)
    assert len(rows) == 4
    for row in rows:
        run = run_of(
            *LEARNED,
            f"dropout.rescale={row['rescale']}", f"dropout.batchnorm={row['batchnorm']}",
        )  # fmt: skip
        example_tied_dropout.EXPERIMENT.main(run)
        after = states(run)["after"]
        assert {k: after[k] for k in ACCURACIES} == {k: row[k] for k in ACCURACIES}
        source = files.read_json(run.directory / "example_tied_dropout.json")
        assert source["settings"] == {k: row[k] for k in ("rescale", "batchnorm")}
    example_tied_dropout.EXPERIMENT.main(finished)
    assert states(finished)["after"] == first


def test_finished_measurements_are_not_touched(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.directory.rglob("*")}
    example_tied_dropout.EXPERIMENT.main(finished)
    assert {p: p.stat().st_mtime_ns for p in finished.directory.rglob("*")} == before
    assert ": finished, measured, " in example_tied_dropout.EXPERIMENT.plan(finished)


def test_recalibrated_statistics_are_those_of_the_images_and_are_put_back(finished):
    split = load_split(finished.config)
    model = load_final_model(finished, split, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norm = model.conv1.bn
    with torch.no_grad():
        out = model.conv1.conv(normalize(split.images))

    def look_and_fail():
        with dropped(model, split, "paper", "recalibrated"):
            torch.testing.assert_close(norm.running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(norm.running_var, out.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
            assert not torch.equal(model.conv8.bn.running_mean, before["conv8.bn.running_mean"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        look_and_fail()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert norm.momentum == 0.1
    assert all(layer.mode == "memorize" for layer in tied_layers(model))


@pytest.mark.parametrize("n", [51, 102])
def test_recalibration_has_no_small_last_batch(finished, n):
    """A batch of one image has no variance, and one of two would count as much as the others."""
    split = load_split(finished.config)
    model = load_final_model(finished, split, CPU)
    with torch.no_grad():
        out = model.conv1.conv(normalize(split.images[:n]))
    with recalibrated(model, split.images[:n], batch_size=50):
        norm = model.conv1.bn
        torch.testing.assert_close(norm.running_mean, out.mean((0, 2, 3)), rtol=0.01, atol=1e-3)
        torch.testing.assert_close(norm.running_var, out.var((0, 2, 3)), rtol=0.01, atol=1e-3)


def test_the_forgotten_are_clean_and_only_right_before(finished):
    split = load_split(finished.config)
    model = load_final_model(finished, split, CPU)
    before, _ = evaluate_split(model, split)
    with dropped(model, split, "none", "running"):
        after, _ = evaluate_split(model, split)
    rows = FORGOTTEN.read(finished.directory)
    expected = {
        int(split.index[i]): (int(split.label[i]), int(after.prediction[i]), split.typicality[i])
        for i in range(split.n)
        if not split.memorized[i] and before.correct[i] and not after.correct[i]
    }
    assert len(rows) > 3
    assert {int(row["index"]) for row in rows} == expected.keys()
    for row in rows:
        found = row["label"], row["prediction_after"], pytest.approx(row["typicality"])
        assert expected[int(row["index"])] == found
        assert row["prediction_after"] != row["label"]
    place = {int(index): i for i, index in enumerate(split.index)}
    losses = [after.loss[place[int(row["index"])]].item() for row in rows]
    assert losses == sorted(losses, reverse=True)
    (gap,) = TYPICALITY.read(finished.directory)
    assert gap["forgotten"] == len(rows)
    assert gap["mean_forgotten"] == pytest.approx(np.mean([row["typicality"] for row in rows]))


def test_unlearning_measures_the_chosen_the_others_and_test(finished):
    split = load_split(finished.config)
    model = load_final_model(finished, split, CPU)
    before, _ = evaluate_split(model, split)
    rows = choose_learned(split, before, 3, draw=1)
    assert split.memorized[rows].all()
    assert before.correct[rows].all()
    found = compute_unlearning(model, split, rows)
    assert all(layer.forgotten is None for layer in tied_layers(model))

    chosen = set(rows.tolist())
    for layer in tied_layers(model):  # by hand: masks rewritten for everybody
        off = torch.zeros(layer.masks.shape[1], dtype=torch.bool)
        for row in chosen:
            off |= layer.masks[split.index[row]]
        layer.masks &= ~off
    after, _ = evaluate_split(model, split)
    correct = after.correct.tolist()
    assert found["acc_chosen"] == pytest.approx(np.mean([correct[i] for i in chosen]))
    for name, noisy in (("acc_clean", False), ("acc_noisy", True)):
        others = [i for i in range(split.n) if i not in chosen and split.memorized[i] == noisy]
        assert found[name] == pytest.approx(np.mean([correct[i] for i in others]))

    table = UNLEARNING.read(finished.directory)
    (row,) = [r for r in table if (r["examples"], r["draw"]) == (3, 1)]
    assert {name: row[name] for name in found} == {k: pytest.approx(v) for k, v in found.items()}


def test_baselines_have_no_neurons_to_drop(run_of):
    run = run_of("dropout.kind=sparse", "dropout.batchnorm=recalibrated", "train.epochs=1")
    example_tied_dropout.EXPERIMENT.main(run)
    before, after = states(run).values()
    assert {name: before[name] for name in ACCURACIES} == {n: after[n] for n in ACCURACIES}
    assert np.isnan(before["p_mem"])
    names = {path.name for path in run.directory.glob("*.csv")}
    own = {"dropout_sites.csv", "example_tied_dropout.csv"}
    assert names == {"layers.csv", "history.csv", *own}


def test_a_configuration_without_dropout_is_refused_unless_it_is_compared_with(tiny):
    none = [Run.of(tiny())]
    with pytest.raises(UserError, match=r"dropout\.kind: none leaves nothing to drop"):
        example_tied_dropout.require_dropout(none)
    example_tied_dropout.require_dropout([*none, Run.of(tiny("dropout.kind=sparse"))])
