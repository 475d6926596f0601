"""Names of files and folders: any that a file system allows, none that leads out of its place."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import gradient_accounting
import layer_rewinding
import plot_results
import reproduce
from engine.config.load import load_configs
from engine.launch.cli import run_script
from engine.runs.identity import run_directory
from tests.conftest import complaints

NAMES = [
    "with space", "ünïcödé 名前 🙂", "quote's \"double\" $HOME `x` ;&|", "-dash", "a=b",
    "#hash %s {x}",    "x" * 200, "名" * 60, "*?[a].",
]  # fmt: skip
TINY = """
device: cpu
data: {name: npz, path: own.npz}
model: {width: 0.05}
train: {epochs: 1, peak_epoch: 0, batch_size: 8}
experiments: []
"""


def call(script, *arguments: str) -> int:
    return run_script(script.EXPERIMENT, "", list(arguments))


@pytest.fixture
def own_data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    x, y = rng.integers(0, 256, (30, 12, 12), dtype=np.uint8), np.arange(30) % 3
    np.savez(path, x_train=x[:24], y_train=y[:24], x_test=x[24:], y_test=y[24:])
    return path


def place(own_data: Path, name: str) -> list[str]:
    """Folder, configuration, data and output of this name; the arguments that say so."""
    folder = own_data.parent / name
    folder.mkdir()
    data, config = folder / f"{name}.npz", folder / f"{name}.yaml"
    own_data.rename(data)
    written = TINY.replace("own.npz", json.dumps(str(data), ensure_ascii=False))
    config.write_text(written, encoding="utf-8")
    output = str(folder / "runs").replace("'", "''")
    return [str(config), f"output_dir='{output}'"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_will_do(own_data, name, capsys):
    assert call(gradient_accounting, *place(own_data, name)) == 0
    run = Path(capsys.readouterr().out.rstrip("\n").rpartition("  ")[2])
    assert (run / "history.csv").exists()
    assert call(layer_rewinding, str(run), "rewinding.epochs=[0, 1]") == 0


def test_figures_of_any_name(own_data):
    name = "ünï 'q' \"$\\x$\" #%s <b>&"
    arguments = place(own_data, name)
    assert call(gradient_accounting, *arguments) == 0
    runs = own_data.parent / name / "runs"
    assert plot_results.main([str(runs), "--figure", "1", "--format", "png"]) == 0
    assert list(runs.rglob("*.png"))


@pytest.mark.slow(reason="the whole report")
def test_a_report_of_any_name(own_data):
    assert reproduce.main(place(own_data, "ünï 'q' \"$\\x$\" #%s <b>&")) == 0


def test_a_name_that_is_too_long_is_one_line(own_data, capsys):
    Path("a.yaml").write_text(TINY)
    assert call(gradient_accounting, "a.yaml", f"output_dir={'x' * 300}") == 1
    printed = capsys.readouterr()
    assert "File name too long" in printed.err
    assert len(complaints(printed.err)) == 1


def test_a_moved_run_with_moved_data_still_loads(own_data, capsys):
    Path("a.yaml").write_text(TINY)
    assert call(gradient_accounting, "a.yaml") == 0
    (run,) = Path("runs").glob("*/seed0")
    moved = Path("elsewhere", "machine 2")
    shutil.copytree(run, moved)
    shutil.rmtree("runs")
    own_data.rename("moved.npz")
    assert call(gradient_accounting, str(moved)) == 0, "it is finished: no data are needed"
    assert call(layer_rewinding, str(moved)) == 2
    assert "own.npz" in capsys.readouterr().err
    assert call(layer_rewinding, str(moved), "data.path=moved.npz") == 0
    assert (moved / "layer_rewinding.csv").exists()


def test_other_data_in_the_place_of_a_moved_runs_are_refused(own_data, capsys):
    Path("a.yaml").write_text(TINY)
    assert call(gradient_accounting, "a.yaml") == 0
    (run,) = Path("runs").glob("*/seed0")
    with np.load(own_data) as file:
        arrays = dict(file)
    arrays["x_train"] = 255 - arrays["x_train"]
    np.savez("other.npz", **arrays)
    assert call(layer_rewinding, str(run), "data.path=other.npz") == 2
    assert "other.npz: is not the file that the run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("evil", ["../../evil", "/evil", "..", "a/../../../evil", "~/evil"])
def test_no_name_leads_out_of_the_output_folder(own_data, evil):
    """Names become parts of a run's folder; only output_dir, extends and data are paths."""
    data = Path("in", "..." + Path(evil).name + ".npz")
    data.parent.mkdir()
    own_data.rename(data)
    Path("a.yaml").write_text(TINY)
    (config,) = load_configs("a.yaml", [f"name={evil}", f"data.path={data}", "output_dir=out"])
    directory = run_directory(config)
    assert len(directory.parts) == 3
    assert directory.resolve().parent.parent == Path("out").resolve()


def test_names_that_a_terminal_cannot_write(own_data, monkeypatch):
    Path("a.yaml").write_text(TINY)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert call(gradient_accounting, "a.yaml", "output_dir=名") == 0
    out.flush()
    assert b"\\u540d/" in out.buffer.getvalue()


def test_names_that_are_no_text(own_data, monkeypatch):
    name = os.fsdecode(b"a\xff.yaml")
    Path(name).write_text(TINY)
    monkeypatch.setattr(sys, "argv", ["gradient_accounting.py", name])
    assert call(gradient_accounting, name) == 0
    (run,) = Path("runs").glob("*/seed0")
    moved = run.rename(os.fsdecode(b"moved\xff"))
    assert call(layer_rewinding, str(moved)) == 0
