"""Runs of strangers are data: what is in them is never executed, printed raw, copied or believed.

Each test takes a finished run, changes one file as a stranger might, and asks for one line.
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import gradient_accounting
import layer_rewinding
import neuron_flipping
import plot_results
from engine.errors import UserError
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.commands import printable, shell_command
from engine.runs.run import Run
from plotting.families import find_families
from plotting.report.html import write_report
from plotting.report.tables import Table
from tests.conftest import complaints

CONFIG = """
device: cpu
data: {name: glyphs, train_size: 60, test_size: 20, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 2, batch_size: 32, peak_epoch: 1}
rewinding: {epochs: all}
flipping: {examples: 2, noise_copies: 1, reference_batch: 20, remaining: 40, max_neurons: 2}
"""
ESCAPE = "\x1b[31m"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A run with all its tables, for tests to copy."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "config.yaml").write_text(CONFIG)
    arguments = [str(folder / "config.yaml"), f"output_dir={folder / 'runs'}"]
    for script in (gradient_accounting, layer_rewinding, neuron_flipping):
        assert run_script(script.EXPERIMENT, "", arguments) == 0
    (run,) = folder.glob("runs/*/seed0")
    return run


@pytest.fixture
def run(measured, tmp_path) -> Path:
    copy = tmp_path / "runs" / measured.parent.name / "seed0"
    shutil.copytree(measured, copy)
    return copy


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def one_line(capsys, script, *arguments: object) -> str:
    """The line of a script that exits with 2 or 1."""
    words = [str(argument) for argument in arguments]
    if script is plot_results:
        status = plot_results.main(words)
    else:
        status = run_script(script.EXPERIMENT, "", words)
    error = "\n".join(complaints(capsys.readouterr().err))
    assert status in (1, 2), error
    assert error.rstrip("\n").isprintable(), error
    assert "Traceback" not in error
    return error


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "word", ["plain", "two words", "$(reboot)", "a'b\"c", "a\nb", f"{ESCAPE}red", "\udcff.yaml"]
)
def test_commands_are_words_that_a_shell_reads_back(word):
    """A control character stands in $'...', which bash reads."""
    command = shell_command(["echo", word])
    assert command.isprintable()
    if word.isprintable():
        assert shlex.split(command) == ["echo", word]
    else:
        shell = ["bash", "-c", command.replace("echo", "printf %s")]
        assert subprocess.run(shell, capture_output=True).stdout == os.fsencode(word)


def test_messages_hold_no_control_characters():
    assert printable(f"a{ESCAPE}b\nc") == "a\\x1b[31mb\\nc"
    assert printable("名 ü") == "名 ü"


def test_the_command_that_finishes_a_run_is_ours_and_not_the_files(run, capsys):
    change(run / "provenance.json", finished=False, command=f"x; rm -rf / #{ESCAPE}")
    line = one_line(capsys, layer_rewinding, run)
    assert "rm -rf" not in line
    assert f"`python gradient_accounting.py {run}` finishes it" in line


@pytest.mark.parametrize("name", ["/etc/passwd", "../../config.yaml", ".", "a\nb"])
def test_no_command_advises_to_delete_what_is_not_in_the_run(run, capsys, name):
    change(run / "provenance.json", files={name: "0" * 64})
    line = one_line(capsys, layer_rewinding, run)
    assert "/etc/passwd" not in line
    assert line.startswith(f"{run / 'provenance.json'}: damaged")


def test_a_list_of_files_that_is_no_list_is_one_line(run, capsys):
    change(run / "provenance.json", files=["history.csv"])
    assert "provenance.json: damaged" in one_line(capsys, layer_rewinding, run)


def test_the_report_quotes_the_commands_that_run_it_again(measured, tmp_path):
    run = tmp_path / "runs $(touch gone)" / "a b" / "seed0"
    shutil.copytree(measured, run)
    families = find_families([run])
    page = write_report("title", families, [], [], [], tmp_path).read_text()
    assert f"python layer_rewinding.py '{run}'".replace("'", "&#x27;") in page


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("copy", ["epoch_002 (copy).pt", "epoch_x.pt", "epoch_2.pt.pt"])
def test_copies_of_files_are_no_epochs(run, copy):
    (run / "resume").mkdir(exist_ok=True)
    for folder in ("resume", "checkpoints"):
        shutil.copy(run / "checkpoints" / "epoch_002.pt", run / folder / copy)
    assert Run.at(run).resumable_epochs() == []
    assert Run.at(run).epochs_in("checkpoints") == [0, 1, 2]


@pytest.mark.parametrize("name", ["layer_rewinding.csv", "secret.csv"])
def test_links_are_not_copied_into_what_is_published(run, tmp_path, capsys, no_figures, name):
    secret = tmp_path / "secret"
    secret.write_text("not for others\n")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    line = one_line(capsys, plot_results, run, "--output", tmp_path / "out")
    assert str(run / name) in line
    published = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any("not for others" in path.read_text() for path in published)


@pytest.mark.parametrize("name", ["history.csv", "provenance.json", "checkpoints/epoch_002.pt"])
def test_a_named_pipe_in_a_run_is_one_line(run, capsys, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    shutil.rmtree(run / "parts")
    (run / "layer_rewinding.csv").unlink()
    assert "is not a regular file" in one_line(capsys, layer_rewinding, run)


def test_a_compressed_array_file_is_refused_before_it_is_unpacked(tmp_path):
    """100 MB of zeros in 0.1 MB; this program compresses nothing."""
    path = tmp_path / "split.npz"
    np.savez_compressed(path, label=np.zeros(10**8, np.int8))
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match="damaged"):
        files.read_arrays(path, "label")


# ---------------------------------------------------------------- numbers

TABLES = ("history.csv", "gradient_accounting.csv", "layer_rewinding.csv", "neuron_flipping.csv")


def put(path: Path, line: int, column: int, value: str) -> None:
    rows = [row.split(",") for row in path.read_text().splitlines()]
    rows[line][column] = value
    path.write_text("\n".join(map(",".join, rows)) + "\n")


MALFORMED = {
    "header only": lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"),
    "a row missing": lambda path: path.write_text(
        "\n".join(path.read_text().splitlines()[:-1]) + "\n"
    ),
    **{
        f"{value} in column {column}": lambda path, value=value, column=column: put(
            path, 1, column, value
        )
        for value in ("inf", "-1", "1e18", "nan", "0.5")
        for column in (0, 1, 2)
    },
}


@pytest.mark.parametrize("table", TABLES)
def test_malformed_tables_are_one_line_or_are_shown(run, capsys, no_figures, table):
    """Consistent with their digests, as a stranger may write them; never a traceback."""
    good, refused = (run / table).read_bytes(), 0
    for name, damage in MALFORMED.items():
        (run / table).write_bytes(good)
        damage(run / table)
        digest = files.file_digest(run / table)
        if (source := (run / table).with_suffix(".json")).exists():
            change(source, sha256=digest)
        known = files.read_json(run / "provenance.json")["files"]
        change(run / "provenance.json", files=known | ({table: digest} if table in known else {}))
        status = plot_results.main([str(run)])
        error = capsys.readouterr().err
        assert status in (0, 2), name
        if status:
            refused += 1
            assert error.count("\n") == 1, (name, error)
            assert str(run.parent) in error, (name, error)
    assert refused >= 5


@pytest.mark.parametrize("key", ["seconds", "versions", "device", "settings", "finished", "starts"])
@pytest.mark.parametrize("value", ["text", None, [1], {"a": 1}, -1, 1e18])
def test_malformed_fields_of_provenance_are_one_line_or_shown(run, capsys, no_figures, key, value):
    change(run / "provenance.json", **{key: value})
    status = plot_results.main([str(run)])
    error = capsys.readouterr().err
    assert status in (0, 2)
    assert error.count("\n") == (1 if status else 0), error


# ---------------------------------------------------------------- tables


def test_cells_do_no_harm_in_any_form():
    cells = ("=1+1", "a|b", "5% $x^2$ _&#{}~\\ ±", "-0.85 ± 0.02%", "-", "+x", "@sum")
    table = Table("name", "caption", ("h",) * len(cells), (cells,))
    row = table.csv().splitlines()[1]
    assert row == "'=1+1,a|b,5% $x^2$ _&#{}~\\ ±,-0.85 ± 0.02%,-,'+x,'@sum"
    assert table.markdown().splitlines()[2].count(" | ") == len(cells) - 1
    assert r"a\|b" in table.markdown()
    escaped = r"5\% \$x\textasciicircum{}2\$ \_\&\#\{\}\textasciitilde{}\textbackslash{} $\pm$"
    assert escaped in table.latex()
