"""The command writes three whole tables, measures each part once, and draws them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import example_tied_dropout
from beyond import channel_control, planted_memorization
from beyond.bench import choose_rows, make_bench
from beyond.channel_control import CHANNEL_RANKS, plant_and_localize, relabel
from beyond.localizers import LOCALIZERS
from beyond.planted_memorization import DELETIONS, EXPERIMENT, TRUTHS
from engine.config.load import load_configs
from engine.errors import UserError
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split
from engine.training.evaluation import evaluate
from plotting.beyond.planted_memorization import FIGURES, name_settings
from plotting.families import Family
from plotting.figures import draw_figure
from tests.conftest import TINY

CPU = torch.device("cpu")
SETTINGS = (
    "model.width=0.1", "train.epochs=12", "train.peak_epoch=3", "train.account_gradients=false",
    "planted.examples=4", "planted.reference=6", "planted.others=10", "planted.channels=1",
    "planted.chosen=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    text = TINY + f"output_dir: {folder / 'runs'}\n"
    (folder / "tiny.yaml").write_text(text + "sweep: {dropout.kind: [example_tied]}\n")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A measured run."""
    (config,) = load_configs(folder / "tiny.yaml", SETTINGS)
    run = Run.of(config)
    example_tied_dropout.train(run, CPU)
    EXPERIMENT.main(run)
    return run


def test_the_table_has_a_row_for_every_localizer_truth_layer_and_subset(run):
    rows = TRUTHS.read(run.directory)
    truths = 3 * len(LOCALIZERS) - 1  # flipping is not asked under other masks
    assert len(rows) == truths * 2 * 7
    for row in rows:
        assert np.isnan(row["flips_at_1"]) == ((row["truth"], row["layer"]) != ("own", "all"))
        if row["examples"]:
            assert row["low"] <= row["auc"] <= row["high"]
            assert 0 < row["expected_by_chance"] < 1


def test_own_masks_make_selectivity_read_the_mask(run):
    """The control that shows a leak: it finds another example's neurons as well."""
    rows = TRUTHS.read(run.directory)
    auc = {
        (row["localizer"], row["truth"]): row["auc"]
        for row in rows
        if (row["layer"], row["subset"]) == ("all", "noisy")
    }
    assert auc["unitmem_own_masks", "own"] > auc["unitmem", "own"]
    assert auc["unitmem_own_masks", "other_mask"] > auc["unitmem", "own"]


def test_deletion_begins_with_everything_right_and_agrees_with_flips(run):
    rows = DELETIONS.read(run.directory)
    held = {(row["localizer"], row["subset"], row["closed"]): row["acc_trained"] for row in rows}
    assert all(value == 1 for (_, _, closed), value in held.items() if closed == 0)
    for row in TRUTHS.read(run.directory):
        if (row["truth"], row["layer"]) == ("own", "all"):
            for count in (1, 5, 10):
                survived = held[row["localizer"], row["subset"], count]
                assert row[f"flips_at_{count}"] == pytest.approx(1 - survived)


def test_the_channel_table_counts_planted_channels(run):
    rows = CHANNEL_RANKS.read(run.directory)
    assert len(rows) == 2 * len(LOCALIZERS) * 3
    for row in rows:
        assert row["examples"] in (0, 1)  # nothing where the channel could not learn the label
        assert row["channels"] == row["examples"]


def test_without_channels_there_is_no_channel_table(run):
    without = Run.at(run.directory, ("planted.channels=0",))
    assert [table.table for table in EXPERIMENT.measurements(without)] == [TRUTHS, DELETIONS]


def test_nothing_is_measured_twice(run, monkeypatch):
    def fail(*_):
        raise AssertionError("measured again")

    before = TRUTHS.path(run.directory).read_bytes()
    monkeypatch.setattr(channel_control, "plant_channel", fail)
    monkeypatch.setattr(planted_memorization, "LOCALIZERS", dict.fromkeys(LOCALIZERS, fail))
    EXPERIMENT.main(run)
    TRUTHS.path(run.directory).unlink()
    EXPERIMENT.main(run)
    assert TRUTHS.path(run.directory).read_bytes() == before


def test_the_measured_network_is_left_as_it_was(run):
    split = load_split(run.config)
    model = load_final_model(run, split, CPU).eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    bench = make_bench(run, split, model)
    with bench.gates:
        plant_and_localize(bench, "conv8", 0, 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_other_masks_are_never_the_own_ones(run):
    split = load_split(run.config)
    bench = make_bench(run, split, load_final_model(run, split, CPU))
    for count in (1, 2, 3):
        few = replace(bench, rows=bench.rows | {"clean": bench.rows["clean"][:count]})
        own, other = few.batch("clean"), few.batch("clean", "other_mask")
        assert torch.equal(own.images, other.images)
        assert len(own) == len(other) == count
        assert (own.index != other.index).all()


def test_few_clean_examples_leave_none_to_compare_with_or_to_relabel(run):
    split = load_split(run.config)
    bench = make_bench(run, split, load_final_model(run, split, CPU).eval().requires_grad_(False))
    few = replace(bench, rows=bench.rows | {"clean": bench.rows["clean"][:1]})
    with few.gates:
        found = plant_and_localize(few, "conv8", 0, 3)
    assert len(found["flipping-planted"]) == 1
    assert found["flipping-others"] == []
    none = replace(bench, rows=bench.rows | {"clean": bench.rows["clean"][:0]})
    assert plant_and_localize(none, "conv8", 0, 3) == {"learned": False}


def test_chosen_rows_are_learned_and_of_their_subset(run):
    split = load_split(run.config)
    model = load_final_model(run, split, CPU)
    correct = evaluate(model, split.images, split.label, index=split.index).correct
    rows = choose_rows(split, correct, 5)
    assert split.memorized[rows["noisy"]].all()
    assert not split.memorized[rows["clean"]].any()
    assert all(correct[chosen].all() and len(chosen) == 5 for chosen in rows.values())
    relabelled = relabel(split, rows["clean"], 2, 0)
    place = torch.isin(split.index, relabelled.index)
    assert len(set(relabelled.label.tolist())) == 1
    assert (split.true_label[place] != relabelled.label[0]).all()


def test_a_run_without_tied_neurons_is_refused(folder):
    (config,) = load_configs(folder / "tiny.yaml", ("sweep.dropout.kind=[none]", *SETTINGS))
    run = Run.of(config)
    example_tied_dropout.train(run, CPU)
    with pytest.raises(UserError, match="example_tied"):
        EXPERIMENT.main(run)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (("data.noise_rate=0.1",), ["20% noise", "10% noise"]),
        (("dropout.p_gen=0.5",), ["0.4, 0.2", "0.5, 0.2"]),
        (("dropout.p_mem=0.3", "train.peak_lr=0.05"), ["0.4, 0.2", "0.4, 0.3"]),
        (("data.train_size=100",), ["glyphs 150", "glyphs 100"]),
        (("train.peak_lr=0.05",),
         ["resnet9 width 0.1, peak_lr 0.1", "resnet9 width 0.1, peak_lr 0.05"]),
    ],
)  # fmt: skip
def test_settings_are_named_by_what_differs(folder, overrides, names):
    configs = [
        load_configs(folder / "tiny.yaml", (*SETTINGS, *more))[0] for more in ((), overrides)
    ]
    families = [Family(run.directory.parent, (run,)) for run in map(Run.of, configs)]
    assert name_settings(families) == names


def test_the_figures_are_drawn(run, tmp_path):
    family = Family(run.directory.parent, (run,))
    for kind in FIGURES:
        assert kind.concerns(family)
        subject = [family, family] if kind.compares else family
        paths = draw_figure(kind.plot, subject, tmp_path / kind.name)
        assert all(path.stat().st_size > 1000 for path in paths)
