"""Sweeps: runs side by side, shared with other processes, collected, and foreseen."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reproduce
from engine.config.load import load_configs
from engine.launch import local
from engine.launch.jobs import by_run
from engine.runs.locking import FILE_NAME as CLAIM
from engine.runs.locking import lock
from tests.conftest import complaints

pytestmark = pytest.mark.usefixtures("no_figures")
REPOSITORY = Path(__file__).resolve().parents[3]
TRAINING_ONLY = ["train.epochs=2", "experiments=[]"]


def directories(path: Path, *overrides: str) -> list[Path]:
    return list(by_run(reproduce.make_jobs(load_configs(path, overrides))))


def csv_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.csv")}


def test_side_by_side_is_as_one_after_another_and_a_failure_stops_no_other(tiny_file, capsys):
    settings = [*TRAINING_ONLY, "sweep.train.peak_lr=[1e30, 0.1]"]
    serial = [*settings, f"output_dir={tiny_file.parent / 'serial'}"]
    assert reproduce.main([str(tiny_file), *serial]) == 1
    expected = [csv_files(directory) for directory in directories(tiny_file, *serial)]
    of_serial = capsys.readouterr()

    assert reproduce.main([str(tiny_file), *settings, "--jobs", "2"]) == 1
    runs, printed = directories(tiny_file, *settings), capsys.readouterr()
    assert [csv_files(directory) for directory in runs] == expected
    assert printed.out.replace("/runs/", "/serial/") == of_serial.out
    (failure,) = [line for line in printed.err.splitlines() if "failed" in line]
    assert failure.startswith(f"{runs[0]}: failed (status 1): the loss became ")
    assert failure.endswith(f"; log: {runs[0]}.log")
    assert "the loss became" in Path(f"{runs[0]}.log").read_text()
    assert [path.name for path in tiny_file.parent.rglob(CLAIM)] == []

    log = Path(f"{runs[1]}.log").read_bytes()
    good = [*TRAINING_ONLY, "train.peak_lr=0.1"]
    assert reproduce.main([str(tiny_file), *good, "--jobs", "2"]) == 0
    assert Path(f"{runs[1]}.log").read_bytes() == log, "what is done needs no process"


def test_a_run_that_is_held_is_left_and_the_last_to_end_concludes(tiny_file, capsys):
    arguments = [str(tiny_file), *TRAINING_ONLY, "seed=[0,1]"]
    first, second = directories(*arguments)
    for more in ([], ["--jobs", "1"]):
        with lock(first):
            assert reproduce.main([*arguments, *more]) == 75
        printed = capsys.readouterr()
        assert printed.out.count("gradient accounting: ") == 1
        assert printed.out.splitlines()[-1].startswith("other processes work on the remaining runs")
        assert (second / "history.csv").exists()
        assert not (first / "history.csv").exists()
        assert not list(tiny_file.parent.glob("runs/report*"))
    assert f"skipped, locked by process {os.getpid()} on " in Path(f"{first}.log").read_text()
    assert reproduce.main(arguments) == 0
    assert capsys.readouterr().out.count("gradient accounting: ") == 2
    assert list(tiny_file.parent.glob("runs/report*/report.html"))


def test_a_run_that_others_finish_meanwhile_is_theirs_no_more(tiny_file, monkeypatch, capsys):
    """Its process found it locked, and left it; at the end it is done."""
    arguments = [str(tiny_file), *TRAINING_ONLY, "seed=[0,1]"]
    first, second = directories(*arguments)
    assert reproduce.main(arguments) == 0
    locked = [True]

    def processes(shares, *_):
        yield first, local.UNFINISHED
        locked.clear()
        yield second, 0

    def are_done(jobs):
        return not (locked and jobs[0].run.directory == first)

    monkeypatch.setattr(local, "_processes", processes)
    monkeypatch.setattr(local, "are_done", are_done)
    capsys.readouterr()
    assert reproduce.main([*arguments, "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count("gradient accounting: ") == 2


@pytest.mark.parametrize("more", [[], ["--jobs", "2"], ["--collect"]], ids=str)
def test_a_damaged_run_stops_no_other(tiny_file, capsys, more):
    arguments = [str(tiny_file), *TRAINING_ONLY, "sweep.seed=[0,1]"]
    first, second = directories(*arguments)
    good = [str(tiny_file), *TRAINING_ONLY]
    assert reproduce.main([*good, "seed=[0,1]" if "--collect" in more else "seed=0"]) == 0
    with open(first / "examples.npz", "ab") as file:
        file.write(b"!")
    reports = {p: p.read_bytes() for p in tiny_file.parent.glob("runs/report*/*") if p.is_file()}
    assert reports
    capsys.readouterr()
    assert reproduce.main([*arguments, *more]) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "examples.npz: damaged" in line]
    assert line.startswith(f"{first}")
    assert f"  {second}\n" in printed.out
    assert (second / "history.csv").exists()
    assert "no figures: mend the runs that are named above, then rerun\n" in printed.err
    assert reports == {p: p.read_bytes() for p in reports}


def test_only_the_second_look_waits(tiny_file, monkeypatch):
    looks = []

    def held(directory, wait):
        looks.append((directory.name, wait))
        raise local.Held("somebody")

    monkeypatch.setattr(local, "lock", held)
    arguments = [str(tiny_file), *TRAINING_ONLY, "seed=[0,1]"]
    assert reproduce.main([*arguments, "--wait"]) == 75
    assert looks == [("seed0", False), ("seed1", False), ("seed0", True), ("seed1", True)]


@pytest.mark.slow(reason="five processes over eight runs: a minute")
def test_the_same_command_started_often_shares_the_runs(tiny_file):
    overrides = ["train.epochs=10", "experiments=[rewinding]", f"seed={list(range(8))}"]
    command = [sys.executable, "reproduce.py", str(tiny_file), *overrides]
    started = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for _ in range(5)
    ]  # fmt: skip
    said = [process.communicate(timeout=280) for process in started]
    codes = [process.returncode for process in started]
    assert 0 in codes, "the last to end finds everything done"
    assert set(codes) <= {0, 75}, "others leave what is held"
    for seed in range(8):
        trained = [f" seed {seed}: training: 0%" in errors for _, errors in said]
        assert trained.count(True) == 1, "each run is trained by one process"
    assert max(out.count("layer rewinding: ") for out, _ in said) == 8
    whole = [*overrides, f"output_dir={tiny_file.parent / 'whole'}"]
    assert reproduce.main([str(tiny_file), *whole]) == 0
    for one, other in zip(directories(tiny_file, *overrides), directories(tiny_file, *whole)):
        assert csv_files(one) == csv_files(other)


def test_a_signal_ends_all_processes(tiny_file):
    overrides = ["train.epochs=2000", "seed=[0,1]"]
    command = [sys.executable, "reproduce.py", str(tiny_file), *overrides, "--jobs", "2"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    runs = directories(tiny_file, *overrides)
    deadline = time.monotonic() + 120
    while not all(list(run.glob("resume/epoch_*[1-9].pt")) for run in runs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Interrupted. Rerun the same command to resume."
    assert "Traceback" not in errors
    for run in runs:
        assert "Rerun the same command to resume." in Path(f"{run}.log").read_text()
        assert not (run / CLAIM).exists()


def test_nothing_to_collect_is_one_line(tiny_file, capsys):
    arguments = [str(tiny_file), "experiments=[rewinding]", "seed=[0,1]", "--collect"]
    assert reproduce.main(arguments) == 2
    assert complaints(capsys.readouterr().err) == [
        "none of 4 jobs is finished; the same command without --collect does them"
    ]


def test_only_one_run_and_what_is_there_is_collected(tiny_file, capsys):
    arguments = [str(tiny_file), "train.epochs=2", "experiments=[rewinding]", "seed=[0,1]"]
    first, second = directories(tiny_file, *arguments[1:])
    assert reproduce.main([*arguments, "--only", str(second)]) == 0
    assert not first.exists()
    assert not list(tiny_file.parent.glob("runs/report*"))
    capsys.readouterr()
    assert reproduce.main([*arguments, "--collect"]) == 1
    printed = capsys.readouterr()
    assert complaints(printed.err) == [
        f"{first}: no gradient accounting yet",
        f"{first}: no layer rewinding yet",
        "drawing figures",
    ]
    lines = printed.out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == [
        "gradient accounting", "layer rewinding",
    ]  # fmt: skip
    assert lines[-1].endswith("report.html")
    assert not first.exists()


def test_the_time_budget_is_for_all(tiny_file, capsys):
    arguments = [str(tiny_file), *TRAINING_ONLY, "seed=[0,1]", "--jobs", "2"]
    assert reproduce.main([*arguments, "--time-budget", "0"]) == 75
    assert capsys.readouterr().out.startswith("out of time: 2 of 2 jobs remain")
    assert not (tiny_file.parent / "runs").exists()


@pytest.mark.parametrize("held", [False, True])
def test_processes_that_stop_before_the_time_is_over_are_out_of_time(
    tiny_file, capsys, monkeypatch, held
):
    """They judge that the next piece of work would end too late, unless others hold their runs."""
    arguments = [str(tiny_file), *TRAINING_ONLY, "seed=[0,1]", "--jobs", "2"]

    def processes(shares, *_):
        yield from ((directory, local.UNFINISHED) for directory in shares)

    monkeypatch.setattr(local, "_processes", processes)
    monkeypatch.setattr(local, "known_holder", lambda directory: held)
    assert reproduce.main([*arguments, "--time-budget", "1000"]) == 75
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("other processes work on" if held else "out of time: 2 of 2 jobs remain")


def test_a_dry_run_adds_up(tiny_file, capsys, monkeypatch):
    monkeypatch.setattr(local.Speeds, "seconds", lambda self, script, run: 60.0 / self.threads)
    monkeypatch.setattr(local.torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS")
    arguments = [str(tiny_file), "train.epochs=2", "experiments=[rewinding]", "seed=[0,1,2]"]
    assert reproduce.main([*arguments, "--dry-run", "--jobs", "2"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(", about 15 s  " in line for line in lines)
    # Three runs of two jobs on two slots: two rounds of 2 x 30 s.
    assert total.startswith(
        "total: 6 of 6 jobs to do, about 1.5 min in turn, 2.0 min with 2 runs in parallel, "
    )
    assert reproduce.main([*arguments, "--dry-run", "--slurm", "slurm.parallel=9"]) == 0
    assert "with 3 runs in parallel" in capsys.readouterr().out
    assert not (tiny_file.parent / "runs").exists()


def test_a_dry_run_says_what_is_done(tiny_file, capsys):
    arguments = [str(tiny_file), *TRAINING_ONLY]
    assert reproduce.main(arguments) == 0
    capsys.readouterr()
    assert reproduce.main([*arguments, "--dry-run"]) == 0
    line, total = capsys.readouterr().out.splitlines()
    assert ": finished, " in line
    assert "about" not in line
    assert total == "total: 0 of 1 jobs to do, 0.0 MB"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--jobs", "0"], "argument --jobs: '0' is not a whole number, 1 or more"),
        (["--jobs", "2", "--slurm"], "argument --slurm: not allowed with argument --jobs"),
        (
            ["--gpus", "a,b"],
            "--gpus: 'a,b' is not a list of numbers or names, such as 0,1",
        ),
        (["--gpus", "0"], "--gpus: 0 is not allowed: this machine has no usable GPU"),
        (["--only", "elsewhere"], "--only: elsewhere is not a run of this configuration"),
        (["--jobs", "2", "data.name=npz", "data.path=no.npz"], "no.npz: cannot be read"),
        (["slurm.time=0"], "slurm.time: 0 is not allowed: a whole number, 1 or more"),
        (["--slurm"], "--slurm: srun not found; run this on a machine with Slurm"),
    ],
)
def test_mistakes_are_one_line_before_anything_begins(
    tiny_file, capsys, monkeypatch, arguments, expected
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert reproduce.main([str(tiny_file), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err
    assert len(complaints(printed.err)) == 1
    assert not (tiny_file.parent / "runs").exists()


def test_without_submitit_the_way_to_get_it_is_named(tiny_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert reproduce.main([str(tiny_file), "--slurm"]) == 2
    assert "pip install -r requirements-slurm.txt" in capsys.readouterr().err
