"""Measurements: parts that stay, tables that are known by their settings."""

import math

import pytest
import torch

from engine.runs import files
from engine.runs.measurement import Measurement
from engine.runs.run import Run
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
