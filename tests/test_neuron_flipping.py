"""neuron_flipping.py agrees with a slow way, searches whom it names, and resumes exactly."""

import math
import shutil

import numpy as np
import pytest
import torch

import example_tied_dropout
import gradient_accounting
import neuron_flipping
from data import normalize
from engine.errors import UserError
from engine.flipping import estimates
from engine.flipping.gates import Gates
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.run import Run
from engine.stats import compute_area
from engine.training.build import load_final_model, load_split
from engine.training.evaluation import evaluate
from neuron_flipping import (
    DETECTION,
    FLIPPING,
    MEANS,
    choose_searched,
    compute_flipping,
    noisy_copies,
)
from plotting.families import find_families, name_other_settings
from tests.slow_neurons import SlowNeurons, slow_search

TRAINED = (
    "data.train_size=80", "model.width=0.12", "train.epochs=20", "train.batch_size=16",
    "train.peak_epoch=5",
)  # fmt: skip

VIT = (
    "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=2", "model.heads=2",
    "model.dim_head=8", "model.mlp_dim=16",
)  # fmt: skip

SMALL = (
    "flipping.examples=4", "flipping.reference_batch=20", "flipping.noise_copies=2",
    "flipping.max_neurons=8",
)  # fmt: skip


def test_noise_has_the_asked_for_size_and_is_the_examples_own():
    image = torch.rand(3, 8, 8) - 0.5
    first, again, other = (noisy_copies(image, i, 0, 4, 0.1) - image for i in (3, 3, 4))
    torch.testing.assert_close(first.flatten(1).norm(dim=1), 0.1 * image.norm().expand(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(noisy_copies(image, 3, 0, 2, 0.0), image.expand(2, -1, -1, -1))


def test_chosen_are_only_those_predicted_as_trained(tiny):
    split = load_split(tiny())
    correct = torch.arange(split.n) % 3 != 0
    rows = choose_searched(split, correct, 12)
    assert len(set(rows)) == 24
    assert correct[rows].all()
    assert split.memorized[rows].tolist() == [True] * 12 + [False] * 12
    fewer = choose_searched(split, correct, 5)
    assert fewer == rows[:5] + rows[12:17]
    assert sum(split.memorized[choose_searched(split, correct, 10_000)]) == sum(
        split.memorized & correct
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directories of runs that are trained once; tests measure on copies of their own."""
    return {}


@pytest.fixture
def run_of(tiny, trained, tmp_path):
    """A finished run with these settings, in a folder of its own."""

    def make_run(*overrides: str) -> Run:
        trains = tuple(o for o in overrides if not o.startswith("flipping."))
        if trains not in trained:
            run = Run.of(tiny(*TRAINED, *trains))
            gradient_accounting.EXPERIMENT.main(run)
            keep = shutil.copytree(run.directory, run.directory.parents[2] / f"kept{len(trained)}")
            shutil.rmtree(run.directory)
            trained[trains] = keep
        run = Run.of(tiny(*TRAINED, *overrides))
        if not run.directory.exists():
            shutil.copytree(trained[trains], run.directory)
        return run

    return make_run


def results(run: Run) -> list[dict]:
    return FLIPPING.read(run.directory)


def test_a_run_against_the_slow_way(run_of):
    run = run_of(*SMALL)
    neuron_flipping.EXPERIMENT.main(run)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu")).eval()
    order = neuron_flipping.draw_rows(split.n, 20, "flipping reference", 0)

    def copies(row):
        return noisy_copies(normalize(split.images[row]), int(split.index[row]), 0, 2, 0.01)

    reference = torch.stack([copies(row) for row in order.tolist()])
    rows = results(run)
    assert len(rows) == 8
    for result in rows[::2]:
        row = int((split.index == int(result["example"])).nonzero())
        closed, flipped, slow = slow_search(
            model, "resnet9", "activation", copies(row), split.label[row],
            reference, split.label[order], most=8,
        )  # fmt: skip
        assert (result["neurons"], result["flipped"]) == (len(closed), flipped)
        assert result["memorized"] == split.memorized[row]
        with Gates(model) as gates:
            sites = [gates.site_of(gate) for gate in closed]
        names = " ".join(site.describe(gate) for site, gate in zip(sites, closed))
        assert result["neurons_ids"] == names
        assert result["groups"] == " ".join(str(site.group) for site in sites)
        whole = SlowNeurons(model, "resnet9", "activation")
        before = whole.accuracy(split.images, split.label, row)
        after = slow.accuracy(split.images, split.label, row)
        assert result["acc_remaining_before"] == pytest.approx(before)
        assert result["acc_remaining_after"] == pytest.approx(after)


def test_a_killed_measurement_goes_on_and_ends_with_the_same_bytes(run_of, monkeypatch):
    run = run_of(*SMALL)
    neuron_flipping.EXPERIMENT.main(run)
    path = FLIPPING.path(run.directory)
    expected = path.read_bytes()
    path.unlink()
    parts = sorted((run.directory / "parts").glob("neuron_flipping-*/*.pt"))
    assert len(parts) == 8
    for part in parts[::2]:
        part.unlink()
    searched = []
    compute = neuron_flipping.compute_flipping

    def counting(run, split, model, rows):
        searched.extend(rows)
        return compute(run, split, model, rows)

    monkeypatch.setattr(neuron_flipping, "compute_flipping", counting)
    neuron_flipping.EXPERIMENT.main(run)
    assert path.read_bytes() == expected
    assert len(searched) == 4


def test_other_settings_measure_again_and_never_train(run_of, monkeypatch):
    run = run_of(*SMALL)
    first = neuron_flipping.EXPERIMENT.main(run)
    monkeypatch.setattr(gradient_accounting, "train_run", None)
    other = run_of(*SMALL[:3], "flipping.max_neurons=1")
    assert other.directory == run.directory
    neuron_flipping.EXPERIMENT.main(other)
    assert max(row["neurons"] for row in results(other)) == 1
    source = files.read_json(run.directory / "neuron_flipping.json")
    assert source["settings"]["max_neurons"] == 1
    assert neuron_flipping.EXPERIMENT.main(run) == first
    more = run_of("flipping.examples=5", *SMALL[1:])
    neuron_flipping.EXPERIMENT.main(more)
    assert len(results(more)) == 10


def test_a_search_that_gives_up_is_neither_dropped_nor_called_flipped(run_of):
    run = run_of(*SMALL[:3], "flipping.max_neurons=1")
    line = neuron_flipping.EXPERIMENT.main(run)
    rows = results(run)
    assert len(rows) == 8
    gave_up = [row for row in rows if not row["flipped"]]
    assert gave_up
    assert all(row["neurons"] == 1 for row in gave_up)
    assert "never flipped" in line
    means = {row["example"]: row["neurons"] for row in neuron_flipping.compute_means([run])}
    assert all(means[row["example"]] == 2 for row in gave_up)


def test_a_sampled_reference_is_reproducible_and_close_to_the_exact_search(run_of):
    exact = run_of(*SMALL, "flipping.exact=true")
    neuron_flipping.EXPERIMENT.main(exact)
    first = [row["neurons_ids"].split()[:1] for row in results(exact)]
    run = run_of(*SMALL, "flipping.reference_rows=15")
    neuron_flipping.EXPERIMENT.main(run)
    expected = FLIPPING.path(run.directory).read_bytes()
    shutil.rmtree(run.directory / "parts")
    FLIPPING.path(run.directory).unlink()
    neuron_flipping.EXPERIMENT.main(run)
    assert FLIPPING.path(run.directory).read_bytes() == expected
    found = [row["neurons_ids"].split()[:1] for row in results(run)]
    assert sum(a == b for a, b in zip(first, found)) >= 6, "of 8, by three quarters of the batch"


def test_an_exact_search_is_the_one_whose_keys_name_no_estimate(run_of, monkeypatch):
    """So that the tables of earlier versions, which had no such flag, are finished."""
    keys = ("reference_copies", "reference_rows", "remaining_rows")
    run = run_of(*SMALL, *(f"flipping.{key}=null" for key in keys))
    neuron_flipping.EXPERIMENT.main(run)
    settings = files.read_json(run.directory / "neuron_flipping.json")["settings"]
    assert "remaining_rows" not in settings, "which earlier versions did not know"
    monkeypatch.setattr(neuron_flipping, "compute_flipping", None)
    again = run_of(*SMALL, "flipping.exact=true", "flipping.refresh_reference=3")
    assert again.directory == run.directory
    assert neuron_flipping.search_measurement(again).finished
    assert not neuron_flipping.search_measurement(run_of(*SMALL)).finished
    (family,) = find_families([run.directory])
    assert family.measured_with["flipping.exact"] is True
    assert "exact" not in family.having(FLIPPING.name).title


def test_tables_of_another_precision_are_kept_and_come_back_together(run_of):
    sampled = (*SMALL, "flipping.reference_rows=15", "flipping.remaining_rows=30")
    run = run_of(*sampled)
    neuron_flipping.EXPERIMENT.main(run)
    neuron_flipping.EXPERIMENT.main(run_of(*sampled, "measure_precision=bf16"))
    neuron_flipping.EXPERIMENT.main(run)
    for table in (FLIPPING, DETECTION):
        source = files.read_json(table.path(run.directory).with_suffix(".json"))
        assert "measure_precision" not in source["settings"], table.name


def test_an_unsampled_table_beside_a_sampled_one_is_named(run_of):
    run = run_of(*SMALL, "flipping.remaining_rows=null")
    neuron_flipping.EXPERIMENT.main(run)
    (family,) = find_families([run.directory])
    assert "flipping.remaining_rows" in family.measured_with
    neuron_flipping.EXPERIMENT.main(run_of(*SMALL))
    (family,) = find_families([run.directory])
    assert "flipping.remaining_rows" not in family.measured_with
    lines = [line for line in name_other_settings([family]) if FLIPPING.name in line]
    assert len(lines) == 1
    assert "shown with remaining_rows=1000; also measured, with remaining_rows=None" in lines[0]


def test_the_reference_is_estimated_only_where_it_is_larger_than_the_sample(run_of, monkeypatch):
    made = []
    for name in ("ReferenceGradient", "SampledGradient"):
        whole = getattr(estimates, name)
        monkeypatch.setattr(
            estimates, name, lambda *given, whole=whole, name=name: (
                made.append((name, given[2].images.shape[:2])), whole(*given),
            )[1],
        )  # fmt: skip
    for rows in (19, 20, 128):
        neuron_flipping.EXPERIMENT.main(run_of(*SMALL, f"flipping.reference_rows={rows}"))
    neuron_flipping.EXPERIMENT.main(run_of(*SMALL, "flipping.exact=true"))
    of_one_copy = ("ReferenceGradient", (20, 1))
    assert made == [
        ("SampledGradient", (20, 1)), of_one_copy, of_one_copy, ("ReferenceGradient", (20, 2))
    ]  # fmt: skip


def test_another_draw_of_the_reference_batch(run_of, monkeypatch):
    """It changes nothing else that is drawn."""
    run = run_of(*SMALL)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu")).eval().requires_grad_(False)
    drawn, whole = [], neuron_flipping.draw_rows
    monkeypatch.setattr(
        neuron_flipping, "draw_rows", lambda *given: drawn.append(given[2:]) or whole(*given)
    )
    for seed in (None, 1000):
        list(compute_flipping(run, split, model, [0], seed))
    own = [(f"flipping {name}", run.config.seed) for name in ("reference", "remaining", "test")]
    assert drawn == [*own, ("flipping reference", 1000), *own[1:]]


def test_noise_that_flips_an_example_is_said(run_of):
    line = neuron_flipping.EXPERIMENT.main(run_of(*SMALL, "flipping.noise_ratio=5"))
    assert "misclassified under noise alone" in line


def test_without_memorized_examples(run_of):
    run = run_of(*SMALL, "data.noise_rate=0")
    assert "memorized: none" in neuron_flipping.EXPERIMENT.main(run)
    rows = DETECTION.read(run.directory)
    assert all(math.isnan(row["auc"]) for row in rows)


def test_without_checkpoints_or_without_a_run(run_of, tiny, tiny_file, capsys):
    run = run_of(*SMALL)
    run.checkpoint_path(20).unlink()
    with pytest.raises(UserError, match="is missing from a finished run"):
        neuron_flipping.EXPERIMENT.main(run)
    status = run_script(neuron_flipping.EXPERIMENT, "", [str(tiny_file), "seed=9"])
    assert status == 2
    assert "no such run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model",
    [
        "vit_small",
        pytest.param("resnet50", marks=pytest.mark.slow(reason="half a minute for a big model")),
    ],
)
def test_other_models(tiny, model):
    options = {"resnet50": ("model.width=1.0", "data.train_size=48"), "vit_small": VIT}[model]
    run = Run.of(
        tiny(f"model.name={model}", "train.epochs=1", *options, *SMALL[1:3],
             "flipping.examples=1", "flipping.max_neurons=2")
    )  # fmt: skip
    gradient_accounting.EXPERIMENT.main(run)
    neuron_flipping.EXPERIMENT.main(run)
    assert all(0 <= row["neurons"] <= 2 for row in results(run))


def test_many_runs_are_averaged(tiny_file, tiny, capsys):
    arguments = [str(tiny_file), "train.epochs=2", "seed=[0,1]", *SMALL]
    assert run_script(gradient_accounting.EXPERIMENT, "", arguments) == 0
    capsys.readouterr()
    status = run_script(neuron_flipping.EXPERIMENT, "", arguments)
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert len(lines) == 3
    assert "mean of 2 runs" in lines[-1]
    runs = [Run.of(tiny("train.epochs=2", f"seed={seed}", *SMALL)) for seed in (0, 1)]
    folder = runs[0].directory.parent
    means = MEANS.read(folder)
    first, second = ({row["example"]: row for row in results(run)} for run in runs)
    assert {row["example"] for row in means} == first.keys() & second.keys()
    for row in means:
        pair = first[row["example"]], second[row["example"]]
        expected = np.mean([r["neurons"] if r["flipped"] else 9 for r in pair])
        assert row["neurons"] == expected
        assert row["acc_remaining_after"] == pytest.approx(
            np.mean([r["acc_remaining_after"] for r in pair])
        )


def test_detection_of_a_run(run_of):
    run = run_of(*SMALL, "flipping.second_split=true")
    neuron_flipping.EXPERIMENT.main(run)
    path = run.directory / "mislabel_detection.csv"
    rows = DETECTION.read(path.parent)
    found = {(row["method"], row["on"]): row for row in rows}
    methods = {"neurons", "learning time", "summed loss", "forgetting time"}
    assert found.keys() == {(m, "searched") for m in methods} | {
        (m, "all") for m in methods - {"neurons"}
    }
    split = files.read_arrays(run.split_path, "memorized")["memorized"]
    loss = files.read_arrays(run.examples_path, "loss")["loss"].astype(float).sum(0)
    pairs = [(a > b) + (a == b) / 2 for a in loss[split] for b in loss[~split]]
    row = found["summed loss", "all"]
    assert row["auc"] == pytest.approx(np.mean(pairs))
    assert row["low"] <= row["auc"] <= row["high"]
    counts = [(r["memorized"], r["neurons"] if r["flipped"] else math.inf) for r in results(run)]
    memorized, clean = ([n for m, n in counts if m == kind] for kind in (1, 0))
    area = compute_area(-np.array(memorized), -np.array(clean), 0)
    assert found["neurons", "searched"]["auc"] == pytest.approx(area.auc)


def test_a_deleted_forgetting_time_is_measured_again(run_of):
    run = run_of(*SMALL, "flipping.second_split=true")
    neuron_flipping.EXPERIMENT.main(run)
    table = run.directory / "second_split.csv"
    before = table.read_bytes()
    table.unlink()
    assert not neuron_flipping.EXPERIMENT.is_done(run)
    neuron_flipping.EXPERIMENT.main(run)
    assert table.read_bytes() == before


def test_a_dry_run_searches_nothing(run_of):
    run = run_of(*SMALL)
    assert ": to do, " in neuron_flipping.EXPERIMENT.plan(run)
    neuron_flipping.EXPERIMENT.main(run)
    assert ": finished, " in neuron_flipping.EXPERIMENT.plan(run)


def test_compute_flipping_leaves_the_model_as_it_was(run_of):
    run = run_of(*SMALL)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu")).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    next(compute_flipping(run, split, model, [0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_example_keeps_its_own_mask_in_a_run_with_dropout(tiny):
    overrides = ["dropout.kind=example_tied", "model.width=0.1", "train.epochs=8"]
    overrides += ["flipping.examples=2", "flipping.noise_copies=2", "flipping.reference_batch=20"]
    run = Run.of(example_tied_dropout.without_accounting(tiny(*overrides)))
    example_tied_dropout.train(run, torch.device("cpu"))
    neuron_flipping.EXPERIMENT.main(run)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu"))
    correct = evaluate(model, split.images, split.label, index=split.index).correct
    assert not torch.equal(correct, evaluate(model, split.images, split.label).correct)
    found = neuron_flipping.read_results(run)
    assert len(found) > 2
    for example, row in found.items():
        others = correct[split.index != example].double().mean().item()
        assert row["acc_remaining_before"] == pytest.approx(others)
