"""Slots, and the commands that share them: how many at once, which first, what stays behind."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import reproduce
from engine.errors import UserError
from engine.launch import processes
from engine.launch.processes import Slot, log_path, make_slots, side_by_side, why
from engine.runs.stopping import time_budget
from engine.training import devices

CPU = Slot(None, 1)


def commands(tmp_path: Path, *scripts: str) -> dict[Path, list[str]]:
    return {tmp_path / str(k): ["sh", "-c", script] for k, script in enumerate(scripts)}


def gpus(monkeypatch, count: int, visible: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_a_cpus_threads_are_shared_out(monkeypatch):
    gpus(monkeypatch, 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert make_slots(3, None) == [Slot(None, 2, sharing=3)] * 3
    assert make_slots(20, None) == [Slot(None, 1, sharing=20)] * 20
    assert make_slots(None, None) == [Slot(None, 8)]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert make_slots(3, None) == [Slot(None, 8, sharing=3)] * 3


def test_gpus_are_taken_in_turn(monkeypatch):
    gpus(monkeypatch, 4)
    assert [slot.gpu for slot in make_slots(None, None)] == ["0", "1", "2", "3"]
    assert [slot.gpu for slot in make_slots(None, ["2", "0"])] == ["2", "0"]
    assert [slot.gpu for slot in make_slots(5, ["1", "3"])] == ["1", "3", "1", "3", "1"]
    assert make_slots(2, ["1"])[1].environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_memory_is_shared_with_those_on_the_same_device(monkeypatch):
    gpus(monkeypatch, 2)
    slots = make_slots(3, None)
    assert [(slot.gpu, slot.sharing) for slot in slots] == [("0", 2), ("1", 1), ("0", 2)]
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "_free_memory", lambda device: 1001)
    monkeypatch.setenv(*next(item for item in slots[0].environment.items() if "MEMORY" in item[0]))
    assert devices.free_memory(cpu) == 500
    monkeypatch.delenv(devices.SHARED_BY)
    assert devices.free_memory(cpu) == 1001


def test_gpus_are_counted_among_those_that_are_visible(monkeypatch):
    gpus(monkeypatch, 2, visible="5,7")
    assert [slot.gpu for slot in make_slots(None, ["1"])] == ["7"]
    with pytest.raises(UserError, match="--gpus: 2 is not allowed: this machine has 2, counted"):
        make_slots(None, ["0", "2"])
    gpus(monkeypatch, 0)
    with pytest.raises(UserError, match="--gpus: 0 is not allowed: this machine has no usable GPU"):
        make_slots(None, ["0"])


def test_as_many_at_once_as_there_are_slots(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WATCH", 0.0)
    seen = []
    work = commands(tmp_path, *["sleep 0.3"] * 5)
    ended = dict(side_by_side(work, [CPU] * 2, lambda running: seen.append(len(running))))
    assert ended == dict.fromkeys(work, 0)
    assert max(seen) == 2


def test_each_has_its_slots_environment_its_log_and_its_status(tmp_path):
    script = "echo $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES; echo oops >&2; exit 3"
    work = commands(tmp_path, script, "kill -9 $$")
    ended = dict(side_by_side(work, [Slot("6", 2)]))
    assert list(ended.values()) == [3, -signal.SIGKILL]
    first, second = work
    begun, *said = log_path(first).read_text().splitlines()
    assert re.fullmatch(r"# started 20\S+: sh -c '.*'", begun)
    assert said == ["2 6", "oops"]
    assert why(first, 3) == f"{first}: failed (status 3): oops; log: {first}.log"
    assert why(second, -9) == (f"{second}: failed (SIGKILL): no output; log: {second}.log")


def test_what_is_put_off_comes_once_more_at_the_end(tmp_path):
    work = commands(tmp_path, "true", "true", "true")
    first, second, third = work
    ended = [directory for directory, _ in side_by_side(work, [CPU], put_off=first.__eq__)]
    assert ended == [second, third, first]


def test_what_is_put_off_waits_while_others_run(tmp_path, monkeypatch):
    """A free slot is no reason to start it: its lock may be free in a moment."""
    monkeypatch.setattr(processes, "WATCH", 0.05)
    held = tmp_path / "held"
    held.touch()
    work = commands(tmp_path, "true", f"sleep 0.5; rm {held}; sleep 0.5")
    first, second = work
    seen = []

    def put_off(directory: Path) -> bool:
        seen.append((directory, held.exists()))
        return directory == first and held.exists()

    ended = [directory for directory, _ in side_by_side(work, [CPU] * 2, put_off=put_off)]
    assert ended == [first, second], "as soon as it was free"
    assert (first, True) in seen
    assert seen[-1] == (first, False)


def test_the_reason_is_that_of_the_last_start(tmp_path):
    directory = tmp_path / "run"
    for said in (f"{directory}: the first reason", "the second reason"):
        (status,) = dict(
            side_by_side({directory: ["sh", "-c", f"echo '{said}'; exit 2"]}, [CPU])
        ).values()
    assert "the first reason" in log_path(directory).read_text()
    assert why(directory, status).startswith(f"{directory}: failed (status 2): the second reason")


def test_nothing_is_started_when_the_time_is_over(tmp_path):
    with time_budget(0.3):
        work = commands(tmp_path, "sleep 1", "sleep 0.5", "true")
        ended = list(side_by_side(work, [CPU] * 2))
    assert len(ended) == 2
    assert not log_path(tmp_path / "2").exists()


def test_a_process_is_told_how_much_time_is_left(tmp_path):
    work = {tmp_path / "run": ["sh", "-c", 'echo "$*"', "sh"]}
    with time_budget(100):
        assert list(side_by_side(work, [CPU])) == [(tmp_path / "run", 0)]
    option, seconds = log_path(tmp_path / "run").read_text().splitlines()[1].split()
    assert option == "--time-budget"
    assert 90 < float(seconds) <= 100


def test_no_process_stays_behind(tmp_path, monkeypatch):
    """Whatever ends us: one listens to SIGTERM, the other has to be killed."""
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    polite = "trap 'echo bye; exit' TERM; echo $$; while true; do sleep 0.05; done"
    deaf = "trap '' TERM; echo $$; while true; do sleep 0.05; done"
    work = commands(tmp_path, polite, deaf)
    logs = [log_path(directory) for directory in work]

    def interrupt(running: list[Path]) -> None:
        if all(log.exists() and len(log.read_text().splitlines()) > 1 for log in logs):
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "WATCH", 0.0)
    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(work, [CPU] * 2, interrupt))
    assert logs[0].read_text().endswith("bye\n")
    time.sleep(0.1)
    for log in logs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text().splitlines()[1]), 0)


def test_names_of_gpus_and_of_mig_instances_are_passed_on(monkeypatch):
    """torch counts a single MIG instance, however many are named."""
    names = ["MIG-1a2b", "MIG-3c4d"]
    gpus(monkeypatch, 1, visible=",".join(names))
    assert reproduce.parse(["--gpus", ",".join(names)]).gpus == names
    slots = make_slots(3, names)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == [*names, names[0]]
    assert [slot.sharing for slot in slots] == [2, 1, 2]
    with pytest.raises(UserError, match="'0,x' is not a list of numbers or names"):
        reproduce.parse(["--gpus", "0,x"])
