"""Measurements: parts that stay, tables that are known by their settings."""

import math
import time

import pytest
import torch

from engine.runs import files
from engine.runs.measurement import KeptTable, Measurement, keep_aside
from engine.runs.run import Run
from engine.runs.stopping import OutOfTime, time_budget
from engine.runs.tables import ResultTable

TABLE = ResultTable("made_up.csv", ("group", "acc"))
CPU = torch.device("cpu")


@pytest.fixture
def make(tiny):
    """A measurement of a run whose directory is still empty; its parts need no more."""
    run = Run.of(tiny())
    files.write_json(run.provenance_path, {"identity": run.identity})
    return lambda settings, **more: Measurement(run, TABLE, settings, **more)


def test_parts_come_back_as_they_were(make):
    content = {"rows": [{"group": 1, "acc": 0.1 + 0.2}], "mask": torch.tensor([True, False])}
    make({"rate": 0.1}).save("group1", content)
    found = make({"rate": 0.1}).part("group1")
    assert found["rows"] == content["rows"]
    assert torch.equal(found["mask"], content["mask"])
    assert make({"rate": 0.1}).part("group2") is None


def test_a_part_is_made_once(make):
    assert [make({}).once("a", lambda value=value: value) for value in (1, 2)] == [1, 1]
    assert make({}).part("a") == 1


def test_parts_of_other_settings_are_not_mixed(make):
    make({"rate": 0.1}).save("a", 1)
    assert make({"rate": 0.2}).part("a") is None
    assert make({"rate": 0.1}, selection={"epochs": (0, 5)}).part("a") == 1


def test_a_damaged_or_misplaced_part_is_measured_again(make, capsys):
    measurement = make({})
    for key in ("a", "b"):
        measurement.save(key, key)
    path = measurement.folder / "b.pt"
    (measurement.folder / "a.pt").replace(path)
    assert measurement.part("b") is None
    path.write_bytes(path.read_bytes()[:50])
    assert measurement.part("b") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "belongs to another measurement; measuring it again" in lines[0]
    assert "damaged" in lines[1]


def test_finished_means_this_table_from_these_settings(make):
    rows = [{"group": 0, "acc": 0.5}, {"group": 1, "acc": math.nan}]
    first = make({"rate": 0.1}, selection={"epochs": (0, 5)})
    assert not first.finished
    first.finish(rows, CPU)
    assert first.finished
    assert make({"rate": 0.1}, selection={"epochs": [0, 5]}).finished
    assert not make({"rate": 0.1}, selection={"epochs": [0]}).finished
    assert not make({"rate": 0.2}, selection={"epochs": [0, 5]}).finished
    assert TABLE.read(first.path.parent)[0] == {"group": 0, "acc": 0.5}
    source = files.read_json(first.source_path)
    assert source["settings"] == {"rate": 0.1, "epochs": [0, 5]}
    assert {"git_commit", "versions", "command"} <= source.keys()


@pytest.mark.parametrize("damage", ["no table", "other table", "no source", "cut source"])
def test_a_table_without_its_own_source_is_not_finished(make, damage):
    measurement = make({})
    measurement.finish([{"group": 0, "acc": 0.5}], CPU)
    if damage == "no table":
        measurement.path.unlink()
    elif damage == "other table":
        TABLE.write(measurement.path.parent, [{"group": 0, "acc": 0.6}])
    elif damage == "no source":
        measurement.source_path.unlink()
    else:
        measurement.source_path.write_text('{"identity": ')
    assert not measurement.finished


# ---------------------------------------------------------------- other settings


def contents(measurement: Measurement) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (measurement.path, measurement.source_path)}


def test_a_table_of_other_settings_is_kept_and_comes_back(make):
    first, second = make({"rate": 0.1}), make({"rate": 0.2})
    first.finish([{"group": 0, "acc": 0.5}], CPU)
    of_first = contents(first)
    second.finish([{"group": 0, "acc": 0.6}], CPU)
    of_second = contents(second)
    (kept,) = KeptTable.below(first.run.directory)
    assert kept.settings == {"rate": 0.1}
    assert {p.name: p.read_bytes() for p in kept.path.parent.iterdir()} == of_first
    assert TABLE.read(kept.path.parent) == [{"group": 0, "acc": 0.5}]

    assert (first.finished, second.finished) == (False, True)
    first.restore()
    assert (first.finished, second.finished) == (True, False)
    assert contents(first) == of_first
    second.restore()
    assert contents(second) == of_second
    make({"rate": 0.3}).restore()  # never measured
    assert contents(second) == of_second


def test_a_table_measured_again_with_equal_settings_is_kept_once(make):
    for value in (0.5, 0.5):
        make({"rate": 0.1}).finish([{"group": 0, "acc": value}], CPU)
    assert list(KeptTable.below(make({}).run.directory)) == []


@pytest.mark.parametrize("change", ["table", "identity"])
def test_a_kept_table_that_is_damaged_or_another_run_s_does_not_come_back(make, change):
    first, second = make({"rate": 0.1}), make({"rate": 0.2})
    first.finish([{"group": 0, "acc": 0.5}], CPU)
    second.finish([{"group": 0, "acc": 0.6}], CPU)
    (kept,) = KeptTable.below(first.run.directory)
    if change == "table":
        TABLE.write(kept.path.parent, [{"group": 0, "acc": 0.7}])
    else:
        source = kept.path.with_suffix(".json")
        files.write_json(source, files.read_json(source) | {"identity": "another"})
    first.restore()
    assert second.finished
    assert TABLE.read(second.run.directory) == [{"group": 0, "acc": 0.6}]


def test_tables_over_seeds_are_kept_with_their_source(tmp_path):
    source, tables = tmp_path / "mean.json", [tmp_path / "mean.csv", tmp_path / "areas.csv"]
    keep_aside(source, {"rate": 1}, *tables)  # there is nothing yet
    for path in tables:
        path.write_text(path.name)
    files.write_json(source, {"settings": {"rate": 1}})
    keep_aside(source, {"rate": 1}, *tables)
    assert not (tmp_path / "other_settings").exists()
    keep_aside(source, {"rate": 2}, *tables)
    (folder,) = (tmp_path / "other_settings").iterdir()
    assert {p.name for p in folder.iterdir()} == {"mean.json", "mean.csv", "areas.csv"}
    assert (folder / "areas.csv").read_text() == "areas.csv"


def test_an_interruption_at_any_write_loses_no_finished_table(make, monkeypatch):
    """A kill before each of the four writes; then the table is measured again."""
    original = files.write_atomically
    for allowed in range(4):
        first, second = make({"rate": allowed}), make({"rate": allowed + 0.5})
        first.finish([{"group": 0, "acc": 0.5}], CPU)
        of_first, written = contents(first), []

        def write(path, content, allowed=allowed, written=written):
            if len(written) == allowed:
                raise KeyboardInterrupt
            written.append(path)
            original(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomically", write)
            with pytest.raises(KeyboardInterrupt):
                second.finish([{"group": 0, "acc": 0.6}], CPU)
        assert len(written) == allowed
        second.finish([{"group": 0, "acc": 0.6}], CPU)
        assert second.finished
        first.restore()
        assert contents(first) == of_first


def test_an_update_writes_only_what_is_new(tmp_path, monkeypatch):
    written = []
    original = files.write_atomically
    monkeypatch.setattr(
        files, "write_atomically", lambda path, write: (written.append(path), original(path, write))
    )
    for value in (0.1 + 0.2, 0.1 + 0.2, 0.5):
        TABLE.update(tmp_path, [{"group": 0, "acc": value}])
        assert TABLE.read(tmp_path) == [{"group": 0, "acc": pytest.approx(value)}]
    assert written == [TABLE.path(tmp_path)] * 2


@pytest.mark.parametrize("damage", ["between two writes", "source"])
def test_tables_that_are_not_their_source_s_are_not_kept_as_its_own(tmp_path, capsys, damage):
    tables = [tmp_path / name for name in ("mean.csv", "area.csv")]
    source = tmp_path / "mean.json"
    for table in tables:
        table.write_text("of rate 1")
    files.write_json(source, {"settings": {"rate": 1}, "tables": files.digests_of(tables)})
    if damage == "source":
        source.write_text("{")
    else:
        tables[0].write_text("of rate 2: the process died before it wrote the source")
    keep_aside(source, {"rate": 2}, *tables)
    assert not (tmp_path / "other_settings").exists()
    assert ("mean.json: " in capsys.readouterr().err) == (damage == "source")


def test_a_damaged_source_of_a_kept_table_leaves_it_out(tmp_path, capsys):
    for name in ("whole", "damaged"):
        files.write_json(tmp_path / "other_settings" / name / "t.json", {"settings": {"rate": 1}})
    (tmp_path / "other_settings" / "damaged" / "t.json").write_text("{")
    (kept,) = KeptTable.below(tmp_path)
    assert kept.path.parent.name == "whole"
    assert "damaged/t.json: " in capsys.readouterr().err


def test_no_part_begins_that_the_time_budget_has_no_room_for(make, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    first, second = make({}), make({"rate": 2})  # a script makes all of its measurements at once

    def four_seconds() -> int:
        clock[0] += 4.0
        return 1

    with time_budget(10.0):
        assert first.once("a", four_seconds) == 1
        assert second.once("a", four_seconds) == 1, "it knows of no part of its own yet"
        assert first.once("a", four_seconds) == 1, "what is there needs no time"
        with pytest.raises(OutOfTime):
            first.once("b", four_seconds)
    assert clock[0] == 8.0
    assert make({}).part("b") is None
