"""The paper's phenomena on real images, at a size that two CPU cores can do."""

from pathlib import Path

import numpy as np
import pytest

import example_tied_dropout
import gradient_accounting
import layer_rewinding
import neuron_flipping
from data import load_dataset
from engine.config.load import load_configs
from engine.runs.run import Run
from engine.runs.tables import HISTORY
from engine.training.build import load_split
from gradient_accounting import ACCOUNTS

SMALL = Path(__file__).resolve().parents[1] / "configs" / "small"


@pytest.mark.real_data
def test_mnist_as_npz_is_the_same_problem(real_data, tmp_path):
    mnist = load_dataset("mnist", root=real_data)
    np.savez(
        tmp_path / "mnist.npz",
        x_train=mnist.images[:, 0].numpy(),
        y_train=mnist.label.numpy(),
        x_test=mnist.test_images[:, 0].numpy(),
        y_test=mnist.test_label.numpy(),
    )
    splits = []
    for overrides in (
        [f"data.root={real_data}"],
        ["data.name=npz", f"data.path={tmp_path / 'mnist.npz'}"],
    ):
        (config,) = load_configs(SMALL / "mnist.yaml", overrides)
        splits.append(load_split(config))
    for name in ("images", "label", "true_label", "memorized", "index", "test_images"):
        assert (getattr(splits[0], name) == getattr(splits[1], name)).all(), name
    assert splits[0].n == 4000
    assert splits[0].memorized.sum() == 400


@pytest.fixture(scope="module")
def mnist_run(real_data, tmp_path_factory) -> Run:
    overrides = [f"data.root={real_data}", f"output_dir={tmp_path_factory.mktemp('runs')}"]
    (config,) = load_configs(SMALL / "mnist.yaml", [*overrides, "device=cpu"])
    run = Run.of(config)
    gradient_accounting.EXPERIMENT.main(run)
    return run


@pytest.mark.real_data
@pytest.mark.slow(reason="trains for some three minutes on two cores")
@pytest.mark.timeout(1200)
def test_gradients_of_the_mislabeled_oppose_those_of_the_clean(mnist_run):
    run = mnist_run
    history = HISTORY.read(run.directory)
    assert history[-1]["acc_clean"] > 0.999
    assert history[-1]["acc_noisy"] > 0.98

    # The epochs in which the mislabeled examples are learned.
    learning = [int(row["epoch"]) for row in history if 0.1 < row["acc_noisy"] < 0.95]
    rows = ACCOUNTS.read(run.directory)
    rows = [row for row in rows if row["epoch"] in learning]
    ratios = [row["norm_noisy"] / row["norm_clean"] for row in rows]
    assert 0.7 < np.median(ratios) < 1.3
    cosines = np.array([row["cosine"] for row in rows]).reshape(-1, 9)
    assert (np.median(cosines, axis=0) < -0.75).sum() >= 7, "of nine layers"


@pytest.mark.real_data
@pytest.mark.slow(reason="trains twice for some four minutes on two cores")
@pytest.mark.timeout(2400)
def test_what_is_memorized_can_be_dropped_where_it_is_tied(real_data, tmp_path):
    """Tables 1 and 3 in small; and the forgotten are less typical than the rest."""
    overrides = [f"data.root={real_data}", f"output_dir={tmp_path}", "device=cpu"]
    overrides += ["sweep.dropout.kind=[example_tied, sparse]", "dropout.forget_draws=1"]
    configs = load_configs(SMALL / "dropout_mnist.yaml", overrides)
    runs = [Run.of(example_tied_dropout.without_accounting(config)) for config in configs]
    for run in runs:
        example_tied_dropout.EXPERIMENT.main(run)
    tied, sparse = (example_tied_dropout.DROPOUT.read(run.directory) for run in runs)
    before, after = tied
    assert min(before["acc_clean"], before["acc_noisy"]) >= 0.99
    assert after["acc_clean"] >= 0.95
    assert after["acc_noisy"] <= 0.05
    assert sparse[1]["acc_noisy"] >= 0.9
    path = runs[0].directory / "forgotten_typicality.csv"
    (gap,) = example_tied_dropout.TYPICALITY.read(path.parent)
    assert gap["high"] < 0


@pytest.mark.real_data
@pytest.mark.slow(reason="trains for some three minutes on two cores")
@pytest.mark.timeout(1200)
def test_the_mislabeled_are_not_memorized_in_the_last_layer(mnist_run):
    history = HISTORY.read(mnist_run.directory)
    before = max(int(row["epoch"]) for row in history if row["acc_noisy"] < 0.2)
    run = Run.at(mnist_run.directory, (f"rewinding.epochs=[0, {before}]",))
    layer_rewinding.EXPERIMENT.main(run)
    rows = layer_rewinding.REWINDING.read(run.directory)
    noisy = {(row["group"], row["epoch"]): row["acc_noisy"] for row in rows}
    assert noisy[8, before] > 0.8
    at_initialization = [noisy[group, 0] for group in range(9)]
    assert sum(accuracy > 0.5 for accuracy in at_initialization) >= 2
    assert np.argmin(at_initialization) != 8


@pytest.mark.real_data
@pytest.mark.slow(reason="trains for some three minutes on two cores, and searches for one")
@pytest.mark.timeout(1800)
def test_the_mislabeled_flip_with_fewer_neurons_and_less_damage(mnist_run):
    settings = ("flipping.examples=40", "flipping.reference_batch=128", "flipping.noise_copies=3")
    run = Run.at(mnist_run.directory, settings)
    neuron_flipping.EXPERIMENT.main(run)
    rows = neuron_flipping.read_results(run).values()
    memorized, clean = ([row for row in rows if row["memorized"] == kind] for kind in (1, 0))
    assert len(memorized) == len(clean) == 40
    for column, sign in (("neurons", -1), ("acc_remaining_after", 1)):
        difference = sign * (
            np.mean([row[column] for row in memorized]) - np.mean([row[column] for row in clean])
        )
        assert difference > 0, column
    assert np.mean([row["neurons"] for row in memorized]) < 4
    (area,) = [row for row in neuron_flipping.detect([run]) if row["method"] == "neurons"]
    assert area["low"] > 0.5


@pytest.mark.real_data
def test_c_scores_that_came_later_are_used(real_data, tmp_path):
    root = tmp_path / "datasets"
    root.mkdir()
    (root / "MNIST").symlink_to(real_data / "MNIST")
    overrides = [
        f"data.root={root}", f"output_dir={tmp_path / 'runs'}", "device=cpu", "model.width=0.05",
        "data.train_size=200", "data.test_size=50", "train.epochs=2", "train.peak_epoch=1",
        "sweep.dropout.kind=[example_tied]", "dropout.forget_draws=1",
        "train.account_gradients=false",
    ]  # fmt: skip
    (config,) = load_configs(SMALL / "dropout_mnist.yaml", overrides)
    run, known = Run.of(config), []
    for at_hand in (False, True):
        if at_hand:
            (root / "c_scores").symlink_to(real_data / "c_scores")
        example_tied_dropout.EXPERIMENT.main(run)
        rows = example_tied_dropout.FORGOTTEN.read(run.directory)
        known.append([not np.isnan(row["typicality"]) for row in rows])
    assert len(known[0]) == len(known[1]) > 0
    assert not any(known[0])
    assert all(known[1])
