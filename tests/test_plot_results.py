"""Figures come from result files alone, show what is in them, and say what is missing."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import example_tied_dropout
import gradient_accounting
import layer_rewinding
import plot_results
from engine.runs import files
from engine.runs.run import Run
from engine.training import build
from engine.training.build import load_split
from plotting.examples import choose_shown
from plotting.families import by_numbers, find_families
from plotting.figures import draw_all, figure_kinds
from plotting.gradients import (
    plot_gradient_norms,
    plot_gradient_norms_compared,
    plot_learning_curves,
)
from plotting.layers import RETRAINING, by_group, plot_retraining
from plotting.report.headline_numbers import last_layer_comes_back, layers_that_come_back
from plotting.report.tables import KINDS as ACCURACIES
from plotting.report.tables import spread, table_2
from plotting.style import NOISY, paper_style


def test_every_figure_of_finished_runs(family, capsys):
    assert plot_results.main([str(family.folder)]) == 0
    *lines, claims, summary, report = capsys.readouterr().out.splitlines()
    assert claims == f"table: {family.folder / 'tables' / 'table_claims.md'}"
    path, _, lacking = summary.partition(" (")
    assert path == f"summary: {family.folder / 'summary.json'}"
    assert re.match(r"\d+ claims not applicable; first: seed 0: \d+% of the memorized", lacking)
    assert report == f"report: {family.folder / 'report.html'}"
    concerned = [kind for kind in figure_kinds() if kind.concerns(family) and not kind.compares]
    assert len(lines) == len(concerned)
    assert not any(kind.experiment == "dropout" for kind in concerned)
    measured = [kind for kind in concerned if family.having(kind.source)]
    assert len(measured) == sum("is missing" not in line for line in lines) >= 5
    for kind in measured:
        png = family.folder / "figures" / f"{kind.name}.png"
        assert np.asarray(Image.open(png).convert("L")).std() > 5, "an empty picture"
        assert png.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_the_same_results_are_the_same_files(family):
    found = []
    for _ in range(2):
        shutil.rmtree(family.folder / "figures", ignore_errors=True)
        plot_results.main([str(family.folder), "--figure", "1"])
        found.append([p.read_bytes() for p in sorted((family.folder / "figures").iterdir())])
    assert found[0] == found[1]


def test_runs_of_different_settings_do_not_share_a_figure(family, tiny, tmp_path):
    gradient_accounting.EXPERIMENT.main(Run.of(tiny("data.noise_rate=0.4")))
    families = find_families([tmp_path / "runs"])
    assert sorted(len(f.runs) for f in families) == [1, 2]


def test_noise_rates_are_compared_in_one_figure(family, tiny, tmp_path, capsys):
    gradient_accounting.EXPERIMENT.main(Run.of(tiny("data.noise_rate=0.4")))
    capsys.readouterr()
    assert plot_results.main([str(tmp_path / "runs"), "--figure", "11", "--format", "png"]) == 0
    *alone, together = capsys.readouterr().out.splitlines()
    assert len(alone) == 2
    path = tmp_path / "runs" / "figures" / "gradient_norms_compared_1.png"
    assert together == f"figure 11: {path}"
    assert path.exists()


def test_models_that_are_compared_are_told_apart(family, tiny, tmp_path):
    for overrides in (("model.width=0.1",), ("model.width=0.1", "train.peak_lr=0.05")):
        gradient_accounting.EXPERIMENT.main(Run.of(tiny(*overrides)))
    with paper_style():
        figure = plot_gradient_norms_compared(find_families([tmp_path / "runs"]))
    titles = {" ".join(axes.get_title().split()) for axes in figure.axes if axes.get_visible()}
    plt.close(figure)
    assert titles == {
        "resnet9 width 0.05, peak_lr 0.1, 20% noise",
        "resnet9 width 0.1, peak_lr 0.1, 20% noise",
        "resnet9 width 0.1, peak_lr 0.05, 20% noise",
    }


def test_a_figure_is_of_the_runs_that_have_its_data(family, capsys):
    (family.runs[0].directory / "gradient_accounting.csv").unlink()
    measured = family.having("gradient_accounting.csv")
    assert [run.config.seed for run in measured.runs] == [1]
    drawing, rest = draw_all([family], family.folder, [figure_kinds()[2]], ["png"])
    assert drawing.about.endswith("n = 1 seed")
    assert not rest.paths
    assert rest.command.count("gradient_accounting.py") == 1
    assert str(family.runs[0].directory) in rest.command


def test_gradient_norms_are_means_over_epochs_and_seeds(family):
    table = family.table(gradient_accounting.ACCOUNTS)
    expected = [table["norm_noisy"][table["group"] == group].mean() for group in range(9)]
    with paper_style():
        figure = plot_gradient_norms(family)
    (line,) = [line for line in figure.axes[1].lines if line.get_color() == NOISY]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-9)
    plt.close(figure)


def test_learning_curves_begin_with_the_initialization(family):
    with paper_style():
        figure = plot_learning_curves(family)
    assert all(line.get_xdata().tolist() == [0, 1, 2, 3] for line in figure.axes[0].lines)
    assert "n = 2 seeds" in " ".join(text.get_text() for text in figure.texts)
    plt.close(figure)


def test_several_figures_can_be_asked_for(family, capsys):
    command = [str(family.folder), "--figure", "1", "--figure", "2", "--format", "png"]
    assert plot_results.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["figure 1", "figure 2"]


def test_a_figure_without_data_is_named_with_its_command(family, capsys):
    for run in family.runs:
        (run.directory / "gradient_accounting.csv").unlink()
    assert plot_results.main([str(family.folder), "--figure", "2"]) == 0
    line = capsys.readouterr().out
    assert "gradient_accounting.csv is missing; python gradient_accounting.py" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{folder}", "--figure", "99"], "'99' is not a figure"),
        (["{folder}/nowhere"], "no such folder"),
        (["{folder}/empty"], "no finished run there"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, expected):
    (tmp_path / "empty").mkdir()
    assert plot_results.main([a.format(folder=tmp_path) for a in arguments]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.count("\n") == 1


def test_images_that_are_gone_cost_the_figures_of_images_alone(tiny, tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 255, (80, 12, 12), np.uint8)
    y = np.arange(80) % 4
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    own = ("data.name=npz", f"data.path={tmp_path / 'own.npz'}", "data.train_size=60")
    gradient_accounting.EXPERIMENT.main(Run.of(tiny(*own, "data.test_size=20")))
    (tmp_path / "own.npz").rename(tmp_path / "elsewhere.npz")
    build._load_dataset_once.cache_clear()
    capsys.readouterr()
    assert plot_results.main([str(tmp_path / "runs"), "--format", "png"]) == 0
    examples, *others, _claims, _summary, report = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"figure examples, of .*: not drawn: .*own\.npz.*", examples)
    assert sum(line.endswith(".png") for line in others) == 4
    assert "not drawn" in Path(report.partition(": ")[2]).read_text(encoding="utf-8")


def test_nothing_is_downloaded_for_a_figure(tiny, tmp_path, monkeypatch, capsys):
    gradient_accounting.EXPERIMENT.main(Run.of(tiny()))
    config_path = next((tmp_path / "runs").rglob("config.yaml"))
    monkeypatch.setattr(build, "at_hand", lambda name, root: False)
    monkeypatch.setattr(build, "load_split", None)
    assert plot_results.main([str(config_path.parent), "--figure", "examples"]) == 0
    assert "not drawn: glyphs does not lie below datasets" in capsys.readouterr().out


def test_layers_that_stop_early_do_not_mix(family):
    """Retraining with patience: groups, and seeds, of different length."""
    accuracies = {  # by seed and group: after just being reset, and after each epoch
        0: {0: [0.1, 0.2, 0.9], 1: [0.3, 0.4]},
        1: {0: [0.1, 0.6], 1: [0.5, 0.2, 0.1]},
    }
    for run in family.runs:
        rows = [
            {"group": group, "epoch": epoch, "acc_clean": a, "acc_noisy": a, "acc_train": a}
            for group, values in accuracies[run.config.seed].items()
            for epoch, a in enumerate(values)
        ]
        RETRAINING.write(run.directory, rows)
    table = by_group(family, RETRAINING)
    for seed, groups in accuracies.items():
        for group, values in groups.items():
            found = table["acc_noisy"][seed, group]
            np.testing.assert_array_equal(found[: len(values)], values)
            assert np.isnan(found[len(values) :]).all()
    assert layers_that_come_back(family).tolist() == [0.5, 0.0]
    assert last_layer_comes_back(family).tolist() == [0.4, 0.2]
    with paper_style():
        plt.close(plot_retraining(family))


def test_a_table_holds_ours_beside_the_papers(tiny, tmp_path, capsys):
    overrides = ["dropout.kind=example_tied", "model.width=0.1", "dropout.forget_draws=1"]
    config = example_tied_dropout.without_accounting(tiny(*overrides))
    example_tied_dropout.EXPERIMENT.main(Run.of(config))
    assert plot_results.main([str(tmp_path / "runs"), "--format", "png"]) == 0
    assert "figure 7" in capsys.readouterr().out
    rows = (tmp_path / "runs" / "tables" / "table_1.csv").read_text().splitlines()
    columns = example_tied_dropout.DROPOUT.columns
    path = Run.of(config).directory / "example_tied_dropout.csv"
    before, after = files.read_csv(path, columns, text=("dropout", "state"))
    found = [f"{100 * row[f'acc_{k}']:.1f}%" for row in (before, after) for k in ACCURACIES]
    assert rows[1].split(",")[-6:] == found
    assert rows[-3].startswith("paper: cifar10,-,99.9%,99.3%,79.3%,90.8%,3.1%,82.7%")


def test_rows_and_figures_of_a_sweep_follow_its_values(tiny, tmp_path):
    """And not the names of directories, which leave out what is as by default."""
    tied = ("dropout.kind=example_tied", "model.width=0.1", "dropout.forget_draws=1")
    for share, mem in ((0.4, 0.2), (0.2, 0.2), (0.4, 0.02)):
        config = tiny(*tied, f"dropout.p_gen={share}", f"dropout.p_mem={mem}", "train.epochs=1")
        example_tied_dropout.EXPERIMENT.main(
            Run.of(example_tied_dropout.without_accounting(config))
        )
    found = find_families([tmp_path / "runs"])
    assert [(of.config.dropout.p_gen, of.config.dropout.p_mem) for of in found] == [
        (0.2, 0.2), (0.4, 0.02), (0.4, 0.2),
    ]  # fmt: skip
    data = "glyphs 150 resnet9 width 0.1 noise 0.2"
    table = table_2(found)
    measured = {
        (row[1], column)
        for row in table.rows
        for column, cell in zip(table.header[2:], row[2:])
        if row[0] == data and cell != "-"
    }
    assert [row[:2] for row in table.rows] == [
        (data, "0.02"), (data, "0.2"), ("paper: cifar10", "0.1"), ("paper: cifar10", "0.2"),
    ]  # fmt: skip
    assert measured == {("0.02", "p_gen 0.4"), ("0.2", "p_gen 0.2"), ("0.2", "p_gen 0.4")}
    titles = ["mnist 20,000, width 0.25", "mnist 5,000, width 1", "mnist 5,000, width 0.125"]
    assert sorted(titles, key=by_numbers) == [titles[2], titles[1], titles[0]]


def test_spread_of_several_seeds():
    assert spread([0.5]) == "50.0%"
    assert spread([0.4, 0.6]) == "50.0 ± 14.1%"
    assert spread([float("nan")]) == "-"


def test_contact_sheets_show_the_ends_of_typicality(tiny):
    config = tiny("data.split=atypical")
    split = load_split(config)
    (_, least), (_, most) = choose_shown(split, "atypical")
    assert split.typicality[int(least[0])] == split.typicality.min()
    assert split.typicality[int(most[0])] == split.typicality.max()
    assert split.memorized[least.tolist()].sum() >= split.memorized.sum().clamp(max=len(least))


def test_contact_sheets_show_who_is_mislabeled(tiny):
    split = load_split(tiny())
    (_, wrong), (_, right) = choose_shown(split, "noise")
    assert (split.label != split.true_label)[wrong.tolist()].all()
    assert (split.label == split.true_label)[right.tolist()].all()


def test_runs_are_found_through_links_and_each_once(family, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(family.folder.parent, target_is_directory=True)
    (family.folder / "round").symlink_to(family.folder, target_is_directory=True)
    (found,) = find_families([tmp_path / "linked", family.folder, tmp_path])
    assert [run.config.seed for run in found.runs] == [0, 1]


def test_kept_results_among_the_runs_are_no_runs(family, capsys):
    runs = family.folder.parent
    assert plot_results.main([str(runs), "--format", "png", "--output", str(runs / "kept")]) == 0
    assert len(find_families([runs])) == 1


def test_seeds_that_were_measured_in_different_ways_are_not_pooled(family, capsys):
    for run, epochs in zip(family.runs, ("[0,1]", "[0,2]")):
        layer_rewinding.EXPERIMENT.main(Run.at(run.directory, (f"rewinding.epochs={epochs}",)))
    capsys.readouterr()
    (found,) = find_families([family.folder])
    said = capsys.readouterr().err
    assert "seed1/layer_rewinding.csv: left out: its settings are not those of seed0" in said
    assert said.count("\n") == 1
    assert [run.config.seed for run in found.having("layer_rewinding.csv").runs] == [0]
    assert len(found.having("history.csv").runs) == 2


def test_titles_tell_runs_apart(tiny, tmp_path):
    for decay in ("0.0", "0.001"):
        gradient_accounting.EXPERIMENT.main(Run.of(tiny(f"train.weight_decay={decay}")))
    titles = {found.title for found in find_families([tmp_path / "runs"])}
    plain = "glyphs 150 resnet9 width 0.05 noise 0.2"
    assert titles == {f"{plain}, train.weight_decay={decay}" for decay in ("0.0", "0.001")}


def test_no_command_is_named_that_would_not_help(tiny, tmp_path, capsys):
    gradient_accounting.EXPERIMENT.main(Run.of(tiny("train.account_gradients=false")))
    capsys.readouterr()
    assert plot_results.main([str(tmp_path / "runs"), "--figure", "2"]) == 0
    assert "such a run has no gradient_accounting.csv" in capsys.readouterr().out


def test_every_seed_that_lacks_a_measurement_is_named(family, tmp_path, capsys):
    moved = family.folder.rename(tmp_path / "a folder")
    assert plot_results.main([str(moved), "--figure", "3"]) == 0
    line = capsys.readouterr().out
    for seed in (0, 1):
        assert f"python layer_rewinding.py '{moved}/seed{seed}'" in line


@pytest.mark.parametrize("plot", [plot_learning_curves, plot_gradient_norms])
def test_long_titles_stay_inside_of_their_figure(family, plot):
    long = dataclasses.replace(family, apart=", train.weight_decay=0.001, dropout.sites=layers")
    with paper_style():
        figure = plot(long)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.texts]
    assert boxes
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    plt.close(figure)
