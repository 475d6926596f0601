"""benchmarks/gpu.py: its stages on a CPU, in tiny sizes, and what a failing stage leaves behind."""

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
STAGE = json.dumps({"provenance": {"device": "this"}, "results": {"a": 1}})


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


@pytest.fixture
def failures(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("failures")


def script(path: Path, ending: str) -> list[str]:
    """Return a command that writes one result, and then ends in some way."""
    write = f"import sys, time; open({str(path)!r}, 'w').write('{STAGE}');"
    return [sys.executable, "-c", write + ending]


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        ("", None),
        ("sys.exit('broken: by itself')", "broken: by itself"),
        ("sys.exit(3)", "status 3"),
        ("time.sleep(60)", "stopped after 3 s"),
    ],
)
def test_what_a_stage_measured_is_kept_however_it_ends(gpu, tmp_path, ending, error):
    path, began = tmp_path / "stage.json", time.monotonic()
    found = gpu.measure_stage(script(path, ending), path, timeout=3)
    assert {key: found[key] for key in json.loads(STAGE)} == json.loads(STAGE)
    assert found.get("error") == error
    assert time.monotonic() - began < 30


def test_the_report_is_whole_after_every_stage(gpu, tmp_path, monkeypatch):
    """And says of a stage that there was no time left for it."""
    output, seen = tmp_path / "gpu.json", []

    def stage(command, path, timeout):
        seen.append((command[command.index("--stage") + 1], timeout))
        if len(seen) > 1:
            assert list(json.loads(output.read_text())["stages"]) == [n for n, _ in seen[:-1]]
        if len(seen) == 3:
            monkeypatch.setattr(gpu, "LEAST", math.inf)
        return {"results": {"x": 2.5}, "seconds": 0.1}

    monkeypatch.setattr(gpu, "measure_stage", stage)
    given = argparse.Namespace(minutes=10, device="cpu", output=output, stages=None)
    report = gpu.measure(given)
    assert json.loads(output.read_text()) == report
    assert list(report["stages"]) == list(gpu.STAGES)
    assert [name for name, _ in seen] == list(gpu.STAGES)[:3]
    assert all(180 <= timeout <= 600 for _, timeout in seen)
    assert report["stages"]["configs"]["error"] == "no time left"
    table = list(gpu.write_table(report))
    assert "| parity | x | 2.5 |" in table
    assert "| configs | ended early | no time left |" in table


def test_a_report_is_completed_stage_by_stage(gpu, tmp_path, monkeypatch):
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "measure_stage", lambda *_: {"results": {"x": 1}, "seconds": 0.1})

    def stages_of(stages: list[str] | None, device: str = "cpu") -> list[str]:
        gpu.measure(argparse.Namespace(minutes=1, device=device, output=output, stages=stages))
        return list(json.loads(output.read_text())["stages"])

    assert stages_of(["parity"]) == ["parity"]
    assert stages_of(["rates", "steps"]) == ["parity", "rates", "steps"]
    with pytest.raises(SystemExit, match="is a report of cpu"):
        stages_of(["rates"], device="cuda")
    assert stages_of(None) == list(gpu.STAGES), "a whole run starts anew"


def test_a_way_that_fails_is_told_and_the_others_are_measured(gpu, monkeypatch):
    def fail(device, precision, way, *rest):
        if way == "tuned":
            raise RuntimeError("no such kernel\nat line 3")
        return {"seconds": 1.0}

    monkeypatch.setattr(gpu, "time_step", fail)
    found = dict(gpu.steps(CPU))
    assert found["plain fp32 eager"] == {"seconds": 1.0}
    assert found["plain fp32 tuned"] == {"error": "RuntimeError: no such kernel"}


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("name", ["environment", "parity", "steps", "flipping", "evaluation"])
def test_a_stage_measures_numbers(gpu, name):
    found = dict(gpu.STAGES[name][0](CPU))
    json.dumps(found)
    if name == "parity":
        assert len(found) == 5
        for ways in found.values():
            assert ways["from the CPU"] == 0, "a CPU agrees with itself"
        assert 0 < found["clean gradient"]["between two ways on the CPU"] < 0.1
    else:
        assert found
        for value in found.values():
            numbers = value.values() if isinstance(value, dict) else [value]
            assert all(v > 0 for v in numbers if v is not None), found


def test_every_stage_says_where_it_was_measured(gpu, tmp_path):
    path = tmp_path / "stage.json"
    gpu.work_on("environment", CPU, path)
    written = json.loads(path.read_text())
    assert written["provenance"]["precision"] == "fp32"
    assert written["provenance"]["device"]
    assert set(written["results"]) == {"threads", "free_memory"}


def test_each_test_of_a_gpu_is_reported(gpu, failures, capsys):
    line = "[gw1] [ 50%] FAILED tests/test_on_a_gpu.py::test_it[bf16-a, b] \n"
    assert list(gpu.tested(line)) == [("tests/test_on_a_gpu.py::test_it[bf16-a, b]", "failed")]
    name, _ = line.removeprefix("[gw1] [ 50%] FAILED ").rsplit(" ", 1)
    crash = SimpleNamespace(message="assert 1 == 2 - 3\nand more")
    report = {"nodeid": name, "longrepr": SimpleNamespace(reprcrash=crash)}
    for failed in (True, False):
        failures.pytest_runtest_logreport(SimpleNamespace(failed=failed, **report))
    said = capsys.readouterr().out.splitlines()
    assert [*gpu.tested(said[-1])] == [(name, "failed: assert 1 == 2 - 3")]
    assert not list(gpu.tested("FAILED elsewhere.py::test_it - AssertionError\n"))


def test_parity_sees_a_difference(gpu, monkeypatch):
    numbers = iter([{"a": torch.tensor(v)} for v in ([3.0, 4.0], [3.0, 4.2], [3.0, 4.0])])
    monkeypatch.setattr(gpu, "_numbers_of", lambda *_: next(numbers))
    found = dict(gpu.parity(CPU))["a"]
    assert found["from the CPU"] == pytest.approx(0.04)
    assert found["between two ways on the CPU"] == 0


@pytest.mark.slow(reason="nine processes, two of them train: minutes on a busy CPU")
@pytest.mark.timeout(900)
def test_the_whole_command_on_a_cpu(tmp_path):
    output = tmp_path / "cpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--minutes", "14"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages = json.loads(output.read_text())["stages"]
    assert not {name: s["error"] for name, s in stages.items() if "error" in s}
    resume = stages["resume"]["results"]
    assert resume["interrupted status"] == 143
    assert resume["uninterrupted status"] == resume["resumed status"] == 0
    assert resume["same history"] is True
    assert stages["configs"]["results"]["configs/quickstart.yaml"].startswith("total: ")
