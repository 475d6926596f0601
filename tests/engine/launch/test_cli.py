"""The command line as its user meets it: real processes, exit statuses, one line a run."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gradient_accounting
from engine.errors import UserError
from engine.launch.cli import Ending, reporting_ends, run_script
from engine.runs.locking import Holder
from engine.runs.run import Run
from engine.runs.stopping import Terminated, ending_on_signals
from tests.killing import killed_after_epoch

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "gradient_accounting.py"


def call(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


def test_a_run_prints_one_line_that_ends_with_its_directory(tiny_file, tmp_path):
    done = call(tiny_file, "seed=[0,1]", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for seed, line in enumerate(lines):
        assert line.startswith(f"glyphs 150 resnet9 width 0.05 noise 0.2 seed {seed}: clean ")
        directory = Path(line.split()[-1])
        assert (directory / "history.csv").exists()
        assert directory.name == f"seed{seed}"
    again = call(tiny_file, "seed=[0,1]", "train.epochs=1", "--dry-run")
    assert again.returncode == 0
    assert all(": finished, " in line for line in again.stdout.splitlines())
    by_directory = call(lines[0].split()[-1])
    assert by_directory.stdout == lines[0] + "\n"


def test_dry_run_writes_nothing_and_imports_no_torchvision(tiny_file, tmp_path):
    """Importing torchvision takes seconds, at the start of every process."""
    before = sorted(tmp_path.rglob("*"))
    timed = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = call(tiny_file, "--dry-run", "--device", "cpu", env=timed)
    assert done.returncode == 0, done.stderr
    assert " torch\n" in done.stderr
    assert "torchvision" not in done.stderr
    assert ": to do, " in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["cifar10", "mnist", "svhn"])
def test_a_dry_run_needs_no_data(tmp_path, capsys, name):
    config = tmp_path / "a.yaml"
    config.write_text(f"data: {{name: {name}, root: {tmp_path / 'empty'}}}\n")
    arguments = [str(config), "--dry-run"]
    assert run_script(gradient_accounting.EXPERIMENT, "", arguments) == 0
    assert re.search(r"seed 0: to do, 5\d\d\.\d MB  runs/", capsys.readouterr().out)
    assert not (tmp_path / "empty").exists()


OUT_OF_MEMORY = [
    (MemoryError(), "no size is known"),
    (MemoryError("Unable to allocate 2.5 GiB for an array"), "Unable to allocate 2.5 GiB"),
    (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 "
            "GiB of which 1.12 GiB is free. Including non-PyTorch memory, this process has 3 GiB."
            "\nSee docs"
        ),
        "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.12 GiB is",
    ),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 99 bytes. Error code 12"
        ),
        "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes",
    ),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "CUDNN_STATUS_ALLOC_FAILED"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUBLAS_STATUS_ALLOC"),
]


@pytest.mark.parametrize(("error", "sizes"), OUT_OF_MEMORY)
def test_no_memory_is_one_line_with_its_sizes(capsys, error, sizes):
    with reporting_ends() as ending:
        raise error
    assert ending.status == 1
    line = capsys.readouterr().err
    assert line.startswith("out of memory: ")
    assert sizes in line
    assert "a lower train.batch_size" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(("error", "sizes"), OUT_OF_MEMORY)
def test_no_memory_is_the_failure_of_one_run(tiny_file, capsys, error, sizes):
    """The next run is done, and what the failed one held is released before."""
    held = []

    def work(run):
        if run.config.seed == 0:
            tensor = torch.zeros(3)
            held.append(weakref.ref(tensor))
            raise error
        assert held[0]() is None
        return "done"

    experiment = replace(gradient_accounting.EXPERIMENT, measure=work, summarize=lambda run: "done")
    assert run_script(experiment, "", [str(tiny_file), "seed=[0,1]"]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("/seed1\n")
    assert sizes in printed.err.splitlines()[-1]
    assert "/seed0: out of memory: " in printed.err


def test_what_nobody_expected_is_not_hidden():
    with pytest.raises(RuntimeError, match="mat1"), reporting_ends():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_gpu_that_is_not_there(tiny_file):
    done = call(tiny_file, "--device", "cuda", env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr == (
        "device: 'cuda' is not allowed: this machine has no usable GPU; use cpu\n"
    )


def test_a_run_that_fails_is_status_1(tiny_file):
    done = call(tiny_file, "train.peak_lr=1e30")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "/seed0: the loss became" in done.stderr.splitlines()[-1]


def test_two_processes_on_the_same_runs(tiny_file, tmp_path, capsys):
    """The second one leaves alone what the first one works on, and does the rest."""
    arguments = [str(tiny_file), "seed=[0,1]"]
    script = (gradient_accounting.EXPERIMENT, "", arguments)
    command = [sys.executable, str(SCRIPT), str(tiny_file), "seed=0"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        claims = []
        while not (claims and claims[0].stat().st_size):  # there, and written
            assert first.poll() is None
            time.sleep(0.002)
            claims = list(tmp_path.glob("runs/*/seed0/claim.json"))
        first.send_signal(signal.SIGSTOP)  # alive, and not done before the second one is
        seed0 = claims[0].parent
        before = {path: path.stat().st_mtime_ns for path in seed0.rglob("*") if path.is_file()}
        assert run_script(*script) == 1
        printed = capsys.readouterr()
        assert re.search(
            rf"^{seed0}: held by process {first.pid} on \S+ since 20\S+; wait for it \(--wait\)",
            printed.err, re.M,
        )  # fmt: skip
        line = r"^glyphs 150 resnet9 width 0.05 noise 0.2 seed 1: clean .*/seed1$"
        assert re.search(line, printed.out)
        assert {p: p.stat().st_mtime_ns for p in seed0.rglob("*") if p.is_file()} == before
        assert run_script(*script[:2], [*arguments, "--dry-run"]) == 0
        state = f"locked by process {first.pid} on "
        assert f"noise 0.2 seed 0: {state}" in capsys.readouterr().out
    finally:
        first.kill()
        first.wait()
    assert run_script(*script) == 0, "a dead process holds nothing"
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_run_that_another_process_trains_is_waited_for(tiny, monkeypatch):
    run = Run.of(tiny())
    with killed_after_epoch(1):
        gradient_accounting.EXPERIMENT.main(run)
    monkeypatch.setattr("engine.runs.locking.holder_of", lambda directory: Holder.me())
    state = rf"locked by process {os.getpid()} on \S+ since \S+, after epoch 1"
    assert re.fullmatch(state, run.state)
    with pytest.raises(UserError, match=f"its training is {state}; rerun when that has ended"):
        run.require_finished()


def test_a_lock_that_cannot_be_judged_ends_no_command(tiny, monkeypatch):
    def refuse(directory):
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr("engine.runs.locking.holder_of", refuse)
    assert Run.of(tiny()).state == "to do"


def test_a_second_process_waits_if_asked_to(tiny_file, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tiny_file), "--wait"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    lines = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(lines) == 1
    assert lines.pop().endswith("/seed0\n")


def test_an_output_folder_that_cannot_be_made_is_one_line(tiny_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = [str(tiny_file), f"output_dir={tmp_path / 'file' / 'runs'}"]
    assert run_script(gradient_accounting.EXPERIMENT, "", arguments) == 2
    expected = f"output_dir: {tmp_path}/file/runs cannot be made: {tmp_path}/file is a file"
    assert capsys.readouterr().err == f"{expected}; choose another\n"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("data.noise=0.1", "; did you mean data.noise_rate?"),
        ("train.lr=0.1", "; did you mean train.peak_lr?"),
        ("seed=0,1,2", "; for several seeds, write seed='[0,1,2]'"),
        ("model.name=vit_small", "only resnet9 takes it, not vit_small; remove it"),
    ],
)
def test_usual_mistakes_have_a_hint(tiny_file, capsys, override, hint):
    assert run_script(gradient_accounting.EXPERIMENT, "", [str(tiny_file), override]) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"{hint}\n")
    assert said.count("\n") == 1


def use(ending: Ending, run: Path, mistake: str) -> None:
    with ending.one_of_several(run):
        raise UserError(mistake)


def test_a_run_that_the_user_must_mend_stops_no_other(tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    with reporting_ends() as ending:
        ending.several = True
        for run in (first, second):
            use(ending, run, f"{run}/history.csv: damaged")
            assert capsys.readouterr().err == f"{run}/history.csv: damaged\n", "at once"
            use(ending, run, f"{run}/history.csv: damaged")  # another script on the same run
        use(ending, first, "nowhere: no such file")
        assert capsys.readouterr().err == "", "it may be a mistake of all runs"
    assert capsys.readouterr().err == f"{first}: nowhere: no such file\n"
    assert ending.status == 2


def test_a_mistake_of_one_run_is_said_however_the_command_ends(tmp_path, capsys):
    with reporting_ends() as ending:
        ending.several = True
        use(ending, tmp_path, "nowhere: no such file")
        raise Terminated(signal.SIGTERM)
    mistake, *_, last = capsys.readouterr().err.splitlines()
    assert mistake == f"{tmp_path}: nowhere: no such file"
    assert last.startswith("Interrupted.")
    assert ending.status == 143


def test_a_mistake_of_all_runs_is_one_line(tmp_path, capsys):
    for several in (False, True):
        with reporting_ends() as ending:
            ending.several = several
            use(ending, tmp_path / "a", "nowhere: no such file")
            use(ending, tmp_path / "b", "nowhere: no such file")
            raise AssertionError("nothing of the command is left to do")
        assert capsys.readouterr().err == "nowhere: no such file\n"
        assert ending.status == 2


def test_a_terminal_that_is_gone_ends_a_command_with_its_status(monkeypatch):
    class Gone(io.StringIO):
        def write(self, _):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    moved = []
    monkeypatch.setattr(os, "dup2", lambda source, target: moved.append(target))
    with reporting_ends() as ending:
        monkeypatch.setattr(sys, "stderr", Gone())
        raise Terminated(signal.SIGHUP)
    assert ending.status == 129
    assert moved == [1, 2], "or Python's last flush would change the status"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_command_unless_nohup_started_it(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with reporting_ends() as ending, ending_on_signals():
            signal.raise_signal(signal.SIGHUP)
        assert ending.status == (0 if ignored else 129)
        expected = signal.SIG_IGN if ignored else signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == expected
    finally:
        signal.signal(signal.SIGHUP, before)
