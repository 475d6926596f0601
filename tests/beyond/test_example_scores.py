"""Scores of a run's examples against its checkpoints, and tables that compare the scores."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import example_tied_dropout
import gradient_accounting
import neuron_flipping
from beyond import example_scores
from beyond.example_scores import (
    EXAMPLES,
    SCORES,
    compute_depth,
    make_areas,
    make_correlations,
    make_with_neurons,
)
from data import load_dataset, normalize
from engine.errors import UserError
from engine.runs import files
from engine.runs.identity import without_dropout
from engine.runs.run import Run, load_weights
from engine.stats import rank_correlation
from engine.training.build import load_final_model, load_split, make_model
from engine.training.evaluation import evaluate
from engine.training.record import read_examples
from models.any_network import as_chain, example_images
from models.dropout import dropout_mode, examples
from plotting.beyond.scores import FIGURES, plot_roc, read_scores, roc_curve
from plotting.families import Family
from plotting.figures import draw_figure
from tests.beyond.test_scores import slow_depth, slow_votes
from tests.killing import killed_after_epoch
from tests.models import networks

CPU = torch.device("cpu")
FLIPPING = (
    "flipping.examples=4", "flipping.reference_batch=16", "flipping.noise_copies=1",
    "flipping.remaining=20", "flipping.max_neurons=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """A trained run with searched neurons; tests change no file in it."""
    from engine.config.load import load_configs
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("scores")
    path = folder / "tiny.yaml"
    path.write_text(TINY + f"output_dir: {folder / 'runs'}\n")
    (config,) = load_configs(path, FLIPPING)
    run = Run.of(config)
    gradient_accounting.EXPERIMENT.main(run)
    neuron_flipping.EXPERIMENT.main(run)
    example_scores.EXPERIMENT.main(run)
    return run


# ---------------------------------------------------------------- the columns


def test_recorded_scores_against_the_checkpoints(trained):
    """Every epoch's weights say, one example at a time, what the training recorded."""
    split, table = load_split(trained.config), read_scores(trained)
    model = make_model(trained.config, split).eval()
    correct, loss, margin, norm = [], [], [], []
    for epoch in (1, 2, 3):
        load_weights(model, trained.read_checkpoint(epoch), trained.checkpoint_path(epoch))
        with torch.no_grad():
            logits = model(normalize(split.images)).double().numpy()
        for numbers in (correct, loss, margin, norm):
            numbers.append([])
        for row, label in zip(logits, split.label.tolist()):
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            others = [value for k, value in enumerate(row) if k != label]
            correct[-1].append(row[label] > max(others))
            loss[-1].append(-math.log(p[label]))
            margin[-1].append(row[label] - max(others))
            norm[-1].append(math.sqrt(sum((p[k] - (k == label)) ** 2 for k in range(len(p)))))
    probability = np.exp(-np.array(loss))
    close = {"rtol": 3e-3, "atol": 3e-3}  # float16
    np.testing.assert_allclose(table["summed_loss"], np.sum(loss, axis=0), **close)
    np.testing.assert_allclose(table["aum"], -np.mean(margin, axis=0), **close)
    np.testing.assert_allclose(table["el2n"], norm[0], **close)
    np.testing.assert_allclose(table["confidence"], -probability.mean(axis=0), **close)
    np.testing.assert_allclose(table["variability"], probability.std(axis=0), **close)
    times = [next((t for t in (1, 2, 3) if all(s[t - 1 :])), 4) for s in zip(*correct)]
    assert table["learning_time"].tolist() == times
    assert np.ptp(table["aum"]) > 0.1


def test_another_file_of_c_scores_makes_another_column(tiny, tmp_path):
    label, found = load_dataset("glyphs", train_size=150, test_size=40).label.numpy(), []
    gradient_accounting.EXPERIMENT.main(Run.of(tiny()))
    for seed in (0, 1):
        scores = np.random.default_rng(seed).random(150)
        np.savez(tmp_path / "own.npz", labels=label, scores=scores)
        run = Run.of(tiny(f"data.c_scores={tmp_path / 'own.npz'}"))
        example_scores.EXPERIMENT.main(run)
        table = read_scores(run)
        np.testing.assert_allclose(table["c_score"], -scores[table["index"].astype(int)])
        found.append(table["c_score"])
    assert not np.array_equal(*found)


def test_depth_of_a_network_against_brute_force(trained):
    split = load_split(trained.config).subset(torch.arange(50))
    model = load_final_model(trained, load_split(trained.config), CPU).eval()
    found = compute_depth(model, split, 5)
    with torch.no_grad():
        state = normalize(split.images)
        votes = [slow_votes(state.flatten(1), split.label, 5, 10)]
        for _, _, forward in model.stages():
            state = forward(state)
            parts = state if isinstance(state, tuple) else (state,)
            features = torch.cat([part.flatten(1) for part in parts], 1)
            votes.append(slow_votes(features, split.label, 5, 10))
        prediction = model(normalize(split.images)).argmax(1)
    assert found.tolist() == slow_depth(votes, prediction)
    assert len(set(found.tolist())) > 2


def test_votes_of_a_stage_that_are_kept_are_not_made_again(trained):
    split = load_split(trained.config).subset(torch.arange(50))
    model = load_final_model(trained, load_split(trained.config), CPU).eval()
    kept = {}

    def once(key, make):
        if key not in kept:
            kept[key] = make()
            if len(kept) == 4:
                raise KeyboardInterrupt
        return kept[key]

    with pytest.raises(KeyboardInterrupt):
        compute_depth(model, split, 5, once)
    before = dict(kept)
    assert (compute_depth(model, split, 5, once) == compute_depth(model, split, 5)).all()
    assert all(kept[key] is votes for key, votes in before.items())
    assert len(kept) == len(model.stages()) + 1


def test_depth_of_tokens_and_of_masks_of_their_own(tiny):
    """ViT's states are tokens; with example-tied dropout every example has its own neurons."""
    tied = ("dropout.kind=example_tied", "model.width=0.2")
    vit = (
        "model.name=vit_small", "model.width=1.0", "model.patch=4", "model.dim=16",
        "model.depth=1", "model.heads=2", "model.dim_head=8", "model.mlp_dim=16",
    )  # fmt: skip
    for overrides in (tied, vit):
        config = tiny(*overrides)
        split = load_split(config)
        model = make_model(config, split).eval()
        *stages, logits = example_scores.stage_features(model, split)
        with torch.no_grad(), examples(model, split.index):
            assert torch.equal(logits, model(normalize(split.images)))
        assert len(stages) == len(model.stages())
        assert all(len(features) == split.n for features in stages)


def test_tensors_that_are_handed_on_for_their_size_are_no_features(tiny):
    class Sized(networks.Shortcut):
        def forward(self, x):
            batch = x.shape[0]
            return super().forward(x).view(batch, -1)

    split = load_split(tiny()).subset(torch.arange(20))
    plain, sized = networks.Shortcut(), Sized()
    sized.load_state_dict(plain.state_dict())
    images = example_images(split.shape[0], split.shape[1:])
    expected, found = (
        [*example_scores.stage_features(as_chain(network, images, 3), split)]
        for network in (plain, sized)
    )
    assert len(expected) == 5
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_neurons_stand_where_they_were_searched_and_fewer_are_higher(trained):
    table = read_scores(trained)
    rows = neuron_flipping.read_results(trained)
    assert len(rows) == 8
    for index, neurons in zip(table["index"].tolist(), table["neurons"]):
        if index in rows:
            row = rows[index]
            assert neurons == -(row["neurons"] if row["flipped"] else 4)
        else:
            assert math.isnan(neurons)


def test_cells_without_a_number_are_empty_and_examples_are_in_order(trained):
    with open(trained.directory / "example_scores.csv") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == EXAMPLES.columns
    split = load_split(trained.config)
    assert [int(row[0]) for row in rows] == split.index.tolist()
    assert [int(row[3]) for row in rows] == split.memorized.int().tolist()
    assert {row[header.index("dropped")] for row in rows} == {""}
    assert {row[header.index("forgetting_time")] for row in rows} == {""}
    assert all(row[header.index(name)] for row in rows for name in SCORES[:8])


def test_what_is_done_is_not_done_again(trained):
    def times() -> dict:
        return {path: path.stat().st_mtime_ns for path in trained.directory.glob("example_*")}

    before, line = times(), example_scores.EXPERIMENT.main(trained)
    assert len(before) == 8
    assert example_scores.EXPERIMENT.is_done(trained)
    assert example_scores.EXPERIMENT.main(trained) == line
    assert times() == before


# ---------------------------------------------------------------- other sources


def test_dropped_is_measured_on_the_run_with_dropout(tiny):
    """The plain run finds it, once it is there; a run with dropout is its own."""
    config = tiny("dropout.kind=example_tied", "model.width=0.2", "scores.neighbours=null")
    plain = Run.of(without_dropout(config))
    tied = Run.of(example_tied_dropout.EXPERIMENT.training(config))
    gradient_accounting.EXPERIMENT.main(plain)
    example_scores.EXPERIMENT.main(plain)
    assert np.isnan(read_scores(plain)["dropped"]).all()
    assert np.isnan(read_scores(plain)["prediction_depth"]).all()
    example_tied_dropout.EXPERIMENT.main(tied)
    assert example_scores.EXPERIMENT.is_done(
        plain
    )  # as reproduce.py sees it: no reason to begin again
    list(example_scores.conclude([plain]))
    example_scores.EXPERIMENT.main(tied)
    split = load_split(config)
    model = load_final_model(tied, split, CPU)
    before = evaluate(model, split.images, split.label, split.index).correct
    with dropout_mode(model, "drop"):
        after = evaluate(model, split.images, split.label, split.index).correct
    for run in (plain, tied):
        for found, b, a in zip(read_scores(run)["dropped"], before.tolist(), after.tolist()):
            assert math.isnan(found) if not b else found == (not a)
    assert before.any()


def test_forgetting_time_is_taken_over_from_the_second_split(tiny):
    run = Run.of(tiny(*FLIPPING, "flipping.second_split=true", "scores.neighbours=1"))
    gradient_accounting.EXPERIMENT.main(run)
    neuron_flipping.EXPERIMENT.main(run)
    example_scores.EXPERIMENT.main(run)
    from engine.flipping.second_split import read_forgetting

    assert read_scores(run)["forgetting_time"].tolist() == (-read_forgetting(run)).tolist()


def test_a_run_of_an_earlier_version_has_empty_columns(tiny):
    run = Run.of(tiny())
    gradient_accounting.EXPERIMENT.main(run)
    content = files.read_tensors(run.record_path)
    for name in ("margin", "error_norm"):
        del content[name]
    files.write_tensors(run.record_path, content)
    run.examples_path.unlink()
    gradient_accounting.EXPERIMENT.main(run)  # makes examples.npz again, from the record
    assert set(np.load(run.examples_path)) == {"epoch", "correct", "loss"}
    example_scores.EXPERIMENT.main(run)
    table = read_scores(run)
    assert np.isnan(table["aum"]).all()
    assert np.isnan(table["el2n"]).all()
    assert np.isfinite(table["summed_loss"]).all()


def test_a_training_that_an_earlier_version_began_goes_on(tiny):
    run, whole = Run.of(tiny()), Run.of(replace(tiny(), output_dir=tiny().output_dir + "2"))
    gradient_accounting.EXPERIMENT.main(whole)
    with killed_after_epoch(2):
        gradient_accounting.EXPERIMENT.main(run)
    for epoch in run.resumable_epochs():
        content = files.read_tensors(run.resume_path(epoch))
        files.write_tensors(
            run.resume_path(epoch),
            {k: v for k, v in content.items() if k not in ("margin", "error_norm")},
        )
    gradient_accounting.EXPERIMENT.main(run)
    assert run.history_path.read_bytes() == whole.history_path.read_bytes()
    found, expected = read_examples(run), read_examples(whole)
    for name in ("margin", "error_norm"):
        assert np.isnan(found[name][:2]).all()
        assert np.array_equal(found[name][2], expected[name][2])
    assert np.array_equal(found["loss"], expected["loss"])


def test_an_untrained_run_is_refused_in_one_line(tiny):
    with pytest.raises(UserError, match="no such run"):
        example_scores.EXPERIMENT.main(Run.of(tiny()))


def test_an_epoch_that_does_not_exist_is_refused(tiny):
    with pytest.raises(UserError, match=r"scores\.el2n_epoch: 9 is not allowed: at most"):
        tiny("scores.el2n_epoch=9")


# ---------------------------------------------------------------- how the scores compare


def made_up(n: int = 60) -> tuple[dict, np.ndarray]:
    """Scores of which few are measured, with ties; neurons of every second example."""
    draw = np.random.default_rng(0)
    memorized = np.arange(n) % 3 == 0
    found = {name: np.full(n, np.nan) for name in SCORES}
    found["summed_loss"] = draw.integers(0, 5, n) + 2.0 * memorized
    found["aum"] = draw.normal(size=n) + memorized
    found["neurons"] = np.where(np.arange(n) % 2 == 0, draw.integers(0, 4, n) + memorized, np.nan)
    return found, memorized


def test_areas_against_pairs():
    found, memorized = made_up()
    rows = {(row["score"], row["on"]): row for row in make_areas(found, memorized, 0)}
    assert set(rows) == {
        ("summed_loss", "all"), ("aum", "all"), ("summed_loss", "searched"), ("aum", "searched"),
        ("neurons", "searched"),
    }  # fmt: skip
    for (name, on), row in rows.items():
        use = np.isfinite(found["neurons"]) if on == "searched" else np.ones(60, bool)
        won, pairs = 0.0, 0
        for p in found[name][use & memorized]:
            for q in found[name][use & ~memorized]:
                won, pairs = won + (p > q) + (p == q) / 2, pairs + 1
        assert row["auc"] == pytest.approx(won / pairs)
        assert row["memorized"] * row["clean"] == pairs
        assert row["low"] <= row["auc"] <= row["high"]


def test_correlations_of_every_pair_over_all_and_over_clean():
    found, memorized = made_up()
    rows = {(r["score"], r["with"], r["on"]): r for r in make_correlations(found, memorized)}
    assert len(rows) == 2 * len(SCORES) * (len(SCORES) - 1) / 2
    for on, subset in (("all", np.ones(60, bool)), ("clean", ~memorized)):
        row = rows["summed_loss", "aum", on]
        expected = rank_correlation(found["summed_loss"][subset], found["aum"][subset])
        assert (row["n"], row["rho"]) == (subset.sum(), expected)
    empty = rows["learning_time", "aum", "all"]
    assert empty["n"] == 0
    assert math.isnan(empty["rho"])


def test_what_neurons_add():
    """Neurons that know what the score does not raise its AUC; a copy of it adds nothing."""
    found, memorized = made_up()
    half = np.arange(60) % 4 < 2
    found["neurons"] = (memorized & half).astype(float)
    found["aum"] = (memorized & ~half).astype(float)
    found["summed_loss"] = found["neurons"] * 2
    rows = {row["score"]: row for row in make_with_neurons(found, memorized, 0)}
    assert set(rows) == {"aum", "summed_loss"}
    assert rows["aum"]["auc"] == pytest.approx(0.75)
    assert rows["aum"]["auc_with_neurons"] == 1
    assert rows["aum"]["low"] > 0
    assert rows["aum"]["partial"] > 0.5
    assert rows["summed_loss"]["gain"] == 0
    assert math.isnan(rows["summed_loss"]["partial"])


def test_one_kind_of_examples_has_no_area(tiny):
    run = Run.of(tiny("data.noise_rate=0", "scores.neighbours=2"))
    gradient_accounting.EXPERIMENT.main(run)
    assert "nothing to tell apart" in example_scores.EXPERIMENT.main(run)


# ---------------------------------------------------------------- figures


def test_a_roc_curve_has_the_area_of_its_score():
    found, memorized = made_up()
    areas = {(row["score"], row["on"]): row["auc"] for row in make_areas(found, memorized, 0)}
    for name in ("aum", "summed_loss"):
        false, true = roc_curve(found[name], memorized)
        assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(true, false) == pytest.approx(areas[name, "all"])


def test_every_figure_of_scores_is_drawn(trained, tmp_path):
    family = Family(trained.directory.parent, (trained,))
    for kind in FIGURES:
        (path,) = draw_figure(kind.plot, family, tmp_path / kind.name, ["png"])
        assert path.stat().st_size > 5000
    assert plot_roc in [kind.plot for kind in FIGURES]
