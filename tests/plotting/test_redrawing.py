"""Figures are drawn again when their sources, code or files changed, and only then."""

import json
import shutil

import pytest

import layer_rewinding
import plot_results
from engine.runs import files, provenance
from engine.runs.run import Run
from plotting import redrawing
from plotting.families import find_families
from plotting.figures import figure_kinds
from plotting.redrawing import NAME


@pytest.fixture(scope="module")
def original(trained_family, tmp_path_factory):
    """A folder with two measured runs, and everything of them drawn as PNG."""
    folder = tmp_path_factory.mktemp("redrawing")
    shutil.copytree(trained_family, folder / "runs")
    (family,) = find_families([folder / "runs"])
    for run in family.runs:
        layer_rewinding.EXPERIMENT.main(Run.at(run.directory, ("rewinding.epochs=[0, 2]",)))
    assert plot_results.main([str(family.folder), "--format", "png"]) == 0
    return folder / "runs"


@pytest.fixture
def measured(original, tmp_path):
    """The family of the two runs, in a copy of that folder."""
    shutil.copytree(original, tmp_path / "runs")
    (family,) = find_families([tmp_path / "runs"])
    return family


@pytest.fixture
def redrawn(measured, monkeypatch):
    """Draw everything as PNG again; return the names of the figures drawn, and of files written."""

    def draw(*options: str) -> tuple[set[str], set[str]]:
        written = []
        original = files.write_atomically

        def write(path, content):
            written.append(path.name)
            original(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomically", write)
            options = options or ("--format", "png")
            assert plot_results.main([str(measured.folder), *options]) == 0
        pictures = {name for name in written if name.endswith((".png", ".pdf"))}
        return pictures, set(written)

    return draw


def test_nothing_is_written_when_nothing_changed(measured, redrawn, capsys):
    assert redrawn()[0] == set(), "the report names the folder of the copy"
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in measured.folder.rglob("*") if p.is_file()}
    assert redrawn() == (set(), set())
    assert {p: p.stat().st_mtime_ns for p in measured.folder.rglob("*") if p.is_file()} == before
    first = capsys.readouterr().out
    redrawn()
    assert capsys.readouterr().out == first, "the same lines either way"


def test_a_changed_table_redraws_exactly_its_figures(measured, redrawn):
    run = measured.runs[1]
    source = run.directory / "layer_rewinding.json"
    rows = layer_rewinding.REWINDING.read(run.directory)
    source.unlink()
    layer_rewinding.REWINDING.write(run.directory, [row | {"acc_noisy": 0.25} for row in rows])
    drawn, written = redrawn()
    of_table = {kind for kind in figure_kinds() if kind.source == "layer_rewinding.csv"}
    assert drawn == {f"{kind.name}.png" for kind in of_table if not kind.compares}
    assert {NAME, "summary.json", "report.html"} <= written
    assert redrawn() == (set(), set())


def test_a_table_that_a_figure_reads_besides_its_own_redraws_it(measured, redrawn):
    """Rewinding shows the learning curves too."""
    drawn_from = json.loads((measured.folder / "figures" / NAME).read_text())
    read = set(drawn_from["rewinding"]["read"])
    assert {f"../seed{k}/{n}.csv" for k in (0, 1) for n in ("layer_rewinding", "history")} <= read
    expected = {f"{n}.png" for n, e in drawn_from.items() if "../seed0/history.csv" in e["read"]}
    run = measured.runs[0]
    text = run.history_path.read_text().replace("1,", "1.0,", 1)
    origin = files.read_json(run.provenance_path)
    del origin["files"]["history.csv"]
    files.write_json(run.provenance_path, origin)
    files.write_text(run.history_path, text)
    drawn, _ = redrawn()
    assert "rewinding.png" in expected <= drawn
    assert drawn < {f"{name}.png" for name in drawn_from}


@pytest.mark.parametrize("damage", ["deleted", "changed", "record damaged", "record odd"])
def test_a_figure_that_is_missing_or_changed_is_drawn_again(measured, redrawn, damage):
    folder = measured.folder / "figures"
    path = folder / "learning_curves.png"
    whole = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(b"")
    elif damage == "record damaged":
        (folder / NAME).write_text("{")
    else:
        record = files.read_json(folder / NAME)
        files.write_json(folder / NAME, {key: {"of": [], "read": 3} for key in record})
    drawn, _ = redrawn()
    assert path.read_bytes() == whole
    assert (drawn == {"learning_curves.png"}) == (damage in ("deleted", "changed"))
    assert redrawn() == (set(), set())


def test_another_format_other_code_and_a_lost_seed_draw_again(measured, redrawn, monkeypatch):
    drawn, _ = redrawn("--figure", "3", "--format", "pdf")
    assert drawn == {"rewinding.pdf"}
    with monkeypatch.context() as patch:
        patch.setattr(redrawing, "_code_digest", lambda: "later")
        drawn, _ = redrawn("--figure", "3", "--format", "pdf")
        assert drawn == {"rewinding.pdf"}
    (measured.runs[1].directory / "layer_rewinding.csv").unlink()
    drawn, _ = redrawn("--figure", "3", "--format", "pdf")
    assert drawn == {"rewinding.pdf"}


def test_code_is_part_of_it(tmp_path, monkeypatch):
    """A change of any source file that figures come from changes the digest."""
    for name in (*redrawing.CODE, "tests"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(redrawing, "REPOSITORY", tmp_path)
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    digests = [redrawing._code_digest.__wrapped__()]
    for name in ("script.py", *(f"{folder}/a.py" for folder in redrawing.CODE)):
        for text in ("1", "2"):
            (tmp_path / name).write_text(text)
            digests.append(redrawing._code_digest.__wrapped__())
    (tmp_path / "tests" / "test.py").write_text("1")
    assert redrawing._code_digest.__wrapped__() == digests[-1]
    assert len(set(digests)) == len(digests) == 13
