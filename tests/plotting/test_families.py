"""Runs and tables that are shown: unusable ones are named, other settings are kept."""

from collections.abc import Callable

import pytest

import gradient_accounting
import layer_rewinding
import plot_results
from engine.errors import UserError
from engine.runs import files
from engine.runs.run import Run
from plotting.families import Family, find_families, name_models, shown_value


def make_unusable(run: Run) -> dict[str, Callable[[], object]]:
    """Ways to make a finished run one that cannot be drawn, by the reason that is to be said."""
    directory = run.directory

    def change(name: str, key: str, value: object) -> None:
        files.write_json(directory / name, files.read_json(directory / name) | {key: value})

    return {
        "its training is": lambda: change("provenance.json", "finished", False),
        "history.csv: damaged": lambda: run.history_path.write_text("epoch\n"),
        "config.yaml: colour": lambda: run.config_path.write_text("colour: red\n"),
        "it has no identity": lambda: run.provenance_path.write_text("{}"),
        "layer_rewinding.csv: is not what": lambda: (
            files.write_text(directory / "layer_rewinding.csv", "group\n"),
            files.write_json(directory / "layer_rewinding.json", {"sha256": "0"}),
        ),
        "its first line is not": lambda: files.write_text(directory / "layer_rewinding.csv", "a"),
    }


@pytest.mark.parametrize("number", range(6))
def test_runs_that_cannot_be_drawn_are_named_and_do_not_stop_the_others(family, capsys, number):
    bad = family.runs[0]
    reason, damage = list(make_unusable(bad).items())[number]
    damage()
    capsys.readouterr()
    places = [str(family.folder), "--format", "png", "--figure", "1"]
    assert plot_results.main(places) == 0
    said = capsys.readouterr()
    assert said.out.endswith("gradient_norms.png\n")
    assert said.err.startswith(f"left out: {bad.directory}")
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert plot_results.main([str(bad.directory), *places[1:]]) == 2, "named itself, it is refused"
    assert reason in capsys.readouterr().err


def test_a_table_of_other_settings_is_kept_and_the_plot_says_which_it_shows(
    tiny, tmp_path, capsys, monkeypatch
):
    config = tiny("rewinding.epochs=[0]")
    gradient_accounting.EXPERIMENT.main(Run.of(config))
    layer_rewinding.EXPERIMENT.main(run := Run.of(config))
    before = (run.directory / "layer_rewinding.csv").read_bytes()
    other = Run.of(tiny("rewinding.epochs=[0]", "rewinding.batchnorm=checkpoint"))
    layer_rewinding.EXPERIMENT.main(other)
    (kept,) = run.directory.glob("other_settings/layer_rewinding-*/layer_rewinding.csv")
    assert kept.read_bytes() == before != (run.directory / "layer_rewinding.csv").read_bytes()

    capsys.readouterr()
    assert plot_results.main([str(tmp_path / "runs"), "--figure", "3", "--format", "png"]) == 0
    said, drawn = capsys.readouterr().out.splitlines()
    assert said == (
        f"{run.directory / 'layer_rewinding.csv'}: shown with batchnorm=checkpoint; "
        f"also measured, with batchnorm=final: {kept}"
    )
    assert drawn.endswith("rewinding.png")

    monkeypatch.setattr(layer_rewinding, "compute_counts", None)  # nothing is measured again
    layer_rewinding.EXPERIMENT.main(run)
    assert (run.directory / "layer_rewinding.csv").read_bytes() == before


def test_a_mistake_on_the_command_line_is_said_once(family, capsys):
    with pytest.raises(UserError, match=r"plotting\.window"):
        find_families([family.folder], ("plotting.window=[20,10]",))
    assert not capsys.readouterr().err


def test_options_that_begin_alike_are_told_apart(tiny_file, tiny):
    """Only digests are cut."""
    path = tiny_file.with_name("own.py")
    path.write_text("")
    model = (f"model.name={path}:make", "model.width=1.0")
    runs = [Run.of(tiny(*model, f"model.options={{groups: {n}}}")) for n in (1, 16)]
    names = name_models([Family(run.directory.parent, (run,)) for run in runs])
    assert names == [f"make, options {{'groups': {n}}}" for n in (1, 16)]
    assert shown_value("data.path.sha256", "0123456789abcdef") == "0123456789ab"


def test_kept_figures_carry_no_name_of_a_run_where_there_is_one_kind(family, tiny, tmp_path):
    kept = tmp_path / "kept"
    arguments = ["--output", str(kept), "--figure", "examples"]
    assert plot_results.main([str(family.folder), *arguments]) == 0
    assert [path.name for path in (kept / "figures").iterdir()] == ["examples.png"]
    for overrides in (["data.noise_rate=0.4"], ["model.width=0.1"]):
        gradient_accounting.EXPERIMENT.main(Run.of(tiny(*overrides)))
    arguments[1] = str(tmp_path / "both")
    assert plot_results.main([str(tmp_path / "runs"), *arguments, "--format", "pdf"]) == 0
    found = {path.parent.name for path in (tmp_path / "both").rglob("examples.pdf")}
    names = {f.name for f in find_families([tmp_path / "runs"])}
    assert len(found) == 2, "the images of two of the three are the same"
    assert found < names
