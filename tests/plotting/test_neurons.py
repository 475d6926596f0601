"""Figures of neuron flipping count each search as it was measured."""

import json
from dataclasses import replace

import pytest
from matplotlib import pyplot as plt

import neuron_flipping
import plot_results
from engine.runs import files
from engine.runs.run import Run
from plotting.families import Family, find_families
from plotting.neurons import FLIPPING, plot_flipping, plot_flipping_compared, read_searched
from plotting.style import in_percent, paper_style


def test_a_search_counts_as_it_was_measured(family):
    """The limit of neurons is the measurement's, not the one that the run was started with."""
    for run in family.runs:
        few = ("flipping.max_neurons=1", "flipping.examples=4", "flipping.reference_batch=8")
        neuron_flipping.EXPERIMENT.main(Run.at(run.directory, few))
    rows = [row for run in family.runs for row in read_searched(run)]
    assert {row["neurons"] for row in rows if row["flipped"] == 0} == {2}


def plant_search(family: Family, rows: list[dict], **settings: object) -> None:
    for run in family.runs:
        source = {"settings": {"max_neurons": 9} | settings}
        files.write_json(run.directory / "neuron_flipping.json", source)
        FLIPPING.write(run.directory, rows)


def test_a_single_seed_has_no_spread(family):
    """An error bar of length 0 would say that there is none."""
    alone = replace(family, runs=family.runs[:1])
    row = dict.fromkeys(FLIPPING.columns, 1) | {"groups": "0", "neurons_ids": "conv1.conv:0"}
    plant_search(family, [row, row | {"memorized": 0}])
    for chosen, bars in ((alone, 0), (family, 1)):
        with paper_style():
            figure = plot_flipping_compared([chosen])
        (stems,) = figure.axes[0].containers[0].lines[2]
        drawn = [segment for segment in stems.get_segments() if len(segment)]
        assert len(drawn) == bars
        plt.close(figure)


def test_ticks_in_percent_are_not_rounded():
    said = [in_percent(value) for value in (0, 0.025, 3 * 0.1, 0.995, 1)]
    assert said == ["0%", "2.5%", "30%", "99.5%", "100%"]


def test_examples_that_flip_at_once_have_no_neurons_to_show(family):
    row = dict.fromkeys(FLIPPING.columns, 1) | {"neurons": 0, "groups": "", "neurons_ids": ""}
    plant_search(family, [row])
    with paper_style():
        figure = plot_flipping(family)
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert sum(bars) == pytest.approx(1), "and are counted"
    plt.close(figure)


def test_the_legend_covers_no_panel(family):
    """Neurons in all layers leave no room for it in the panel of layers."""
    row = dict.fromkeys(FLIPPING.columns, 1) | {"groups": "0 1 2 3 4 5 6 7 8", "neurons_ids": "x"}
    plant_search(family, [row, row | {"memorized": 0}])
    with paper_style():
        figure = plot_flipping(family)
        figure.canvas.draw()
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    (legend,) = (found.get_window_extent() for found in legends)
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)
    plt.close(figure)


def test_a_run_of_which_nothing_was_searched_ends_no_report(family, capsys):
    plant_search(family, [])
    assert plot_results.main([str(family.folder), "--format", "png"]) == 0
    said = capsys.readouterr().out
    assert "not drawn: no example was searched" in said
    assert "report:" in said


def test_how_a_table_was_measured_is_said_wherever_it_is_shown(family, tmp_path):
    row = dict.fromkeys(FLIPPING.columns, 1) | {"groups": "0", "neurons_ids": "x"}
    plant_search(family, [row], ablate="weight", noise_copies=5, examples=2)
    for name in ("neuron_flipping_mean.csv", "neuron_flipping_mean.json"):
        (family.folder / name).write_text("over seeds", encoding="utf-8")
    (found,) = find_families([family.folder])
    assert found.measured_with == {
        "flipping.max_neurons": 9, "flipping.ablate": "weight", "flipping.examples": 2,
        "flipping.remaining_rows": None,  # a key that the version of this table did not have
    }  # fmt: skip
    assert found.having("neuron_flipping.csv").title == f"{found.title}, flipping.ablate=weight"
    assert found.having("history.csv").title == found.title

    kept = tmp_path / "kept"
    arguments = [str(family.folder), "--format", "png", "--output", str(kept)]
    assert plot_results.main(arguments) == 0
    for name in ("neuron_flipping_mean.csv", "neuron_flipping_mean.json"):
        assert (kept / "tables" / found.name / name).read_text() == "over seeds"
    summary = json.loads((kept / "summary.json").read_text())
    assert summary["runs"][0]["measured_with"] == found.measured_with
    by_claim = {entry["claim"]: entry["about"] for entry in summary["claims"]}
    assert by_claim["flipping.neurons_noisy"].endswith("flipping.ablate=weight")
    assert not by_claim["gradients.cosine"].endswith("weight")
    for source in json.loads((kept / "provenance.json").read_text()).values():
        assert source["measured_with"]["neuron_flipping.csv"]["ablate"] == "weight"
    report = (kept / "report.html").read_text()
    assert "flipping.ablate=weight, flipping.examples=2" in report


def test_neurons_of_several_widths_are_compared(tiny):
    """Means over examples, then over seeds; a search that gave up counts as one more."""
    families = []
    for width, neurons in ((0.1, [(2, 4), (6, 8)]), (0.05, [(1, 1), (9, 3)])):
        runs = [Run.of(tiny(f"model.width={width}", f"seed={seed}")) for seed in (0, 1)]
        for run, (clean, noisy) in zip(runs, neurons):
            row = dict.fromkeys(FLIPPING.columns, 1) | {"groups": "0", "neurons_ids": "x"}
            rows = [
                row | {"memorized": 0, "neurons": clean},
                row | {"memorized": 1, "neurons": noisy},
                row | {"memorized": 1, "neurons": 9, "flipped": 0},
            ]
            source = {"settings": {"max_neurons": 9}}
            files.write_json(run.directory / "neuron_flipping.json", source)
            FLIPPING.write(run.directory, rows)
        families.append(Family(runs[0].directory.parent, tuple(runs)))
    with paper_style():
        figure = plot_flipping_compared(families)
    clean, noisy = (bars.lines[0].get_ydata() for bars in figure.axes[0].containers)
    assert clean.tolist() == [5, 4], "the narrower first"
    assert noisy.tolist() == [((1 + 10) / 2 + (3 + 10) / 2) / 2, ((4 + 10) / 2 + (8 + 10) / 2) / 2]
    assert "0.05" in figure.axes[0].get_xticklabels()[0].get_text()
    plt.close(figure)
