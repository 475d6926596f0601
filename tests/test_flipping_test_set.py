"""neuron_flipping.py: accuracy on the test set before and after zeroing an example's neurons."""

import numpy as np
import pytest
import torch

import gradient_accounting
import neuron_flipping
from data.random_streams import draw_rows
from engine.flipping.gates import Gates
from engine.runs import files
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split
from neuron_flipping import FLIPPING, search_measurement
from tests.slow_neurons import SlowNeurons

SETTINGS = (
    "data.train_size=80", "data.test_size=30", "model.width=0.12", "train.epochs=20",
    "train.batch_size=16", "train.peak_epoch=5", "flipping.reference_batch=20",
    "flipping.noise_copies=2", "flipping.max_neurons=4",
)  # fmt: skip


@pytest.fixture
def searched(tiny):
    def search(*overrides: str) -> Run:
        run = Run.of(tiny(*SETTINGS, "flipping.examples=3", *overrides))
        gradient_accounting.EXPERIMENT.main(run)
        neuron_flipping.EXPERIMENT.main(run)
        return run

    return search


@pytest.mark.parametrize("remaining", ["null", "18"])
def test_accuracies_are_those_of_the_slow_way(searched, remaining):
    run = searched(f"flipping.remaining={remaining}")
    split = load_split(run.config)
    chosen = draw_rows(30, None if remaining == "null" else 9, "flipping test", 0)
    assert len(chosen) == (30 if remaining == "null" else 9)
    images, label = split.test_images[chosen], split.test_label[chosen]
    model = load_final_model(run, split, torch.device("cpu")).eval()
    with Gates(model) as gates:
        names = {gates.site_of(gate).describe(gate): gate for gate in range(gates.count)}
    rows = FLIPPING.read(run.directory)
    for row in rows:
        slow = SlowNeurons(model, "resnet9", "activation")
        assert row["acc_test_before"] == pytest.approx(slow.accuracy(images, label, left_out=-1))
        for name in row["neurons_ids"].split():
            slow.close(names[name])
        assert row["acc_test_after"] == pytest.approx(slow.accuracy(images, label, left_out=-1))
    assert len({row["acc_test_after"] for row in rows}) > 1, "zeroing changes nothing"


def forget_test_accuracies(run: Run) -> None:
    """Leave the parts and the table as an earlier version wrote them."""
    measurement = search_measurement(run)
    for path in measurement.folder.glob("*.pt"):
        content = measurement.part(path.stem)
        for column in FLIPPING.added:
            del content[column]
        measurement.save(path.stem, content)
    earlier = tuple(column for column in FLIPPING.columns if column not in FLIPPING.added)
    rows = FLIPPING.read(run.directory)
    files.write_csv(measurement.path, earlier, rows)
    source = files.read_json(measurement.source_path)
    source["sha256"] = files.file_digest(measurement.path)
    files.write_json(measurement.source_path, source)


def test_a_search_of_an_earlier_version_stays_finished_and_can_be_extended(searched, tiny):
    run = searched()
    whole = {row["example"]: row for row in FLIPPING.read(run.directory)}
    forget_test_accuracies(run)
    assert search_measurement(run).finished
    assert ", test " not in neuron_flipping.summarize(run)

    more = Run.of(tiny(*SETTINGS, "flipping.examples=4"))
    assert more.directory == run.directory
    neuron_flipping.EXPERIMENT.main(more)
    rows = {row["example"]: row for row in FLIPPING.read(run.directory)}
    assert len(rows) > len(whole)
    for example, row in rows.items():
        assert np.isnan(row["acc_test_after"]) == (example in whole)
        if example in whole:
            assert row["neurons_ids"] == whole[example]["neurons_ids"]


def test_the_printed_line_names_the_test_accuracy(searched):
    line = neuron_flipping.summarize(run := searched())
    rows = FLIPPING.read(run.directory)
    for memorized, word in ((1, "memorized"), (0, "clean")):
        own = [row for row in rows if row["memorized"] == memorized]
        after = np.mean([row["acc_test_after"] for row in own])
        part = next(part for part in line.split("; ") if f"{word}: " in part)
        assert part.endswith(f"-> {after:.2%}")
        assert ", test " in part
