"""Full, read-only and vanishing disks: one line, nothing half-written, and going on afterwards."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradient_accounting
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.run import Run

REPOSITORY = Path(__file__).resolve().parents[2]
OVERRIDES = ("model.width=0.1", "train.epochs=4")
MENDED = "; fix this, then rerun to resume"


@pytest.fixture
def call(tiny_file, capsys):
    """Run the script, with its runs below a folder; its status, and the last line on stderr."""

    def call(output: Path, *overrides: str) -> tuple[int, str]:
        arguments = [str(tiny_file), *(overrides or OVERRIDES), f"output_dir={output}"]
        status = run_script(gradient_accounting.EXPERIMENT, "", arguments)
        return status, capsys.readouterr().err.splitlines()[-1:]

    return call


def tables(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.rglob("*.csv")}


def check_whole(output: Path) -> None:
    """Every file that has a name can be read, and there is no other."""
    for path in filter(Path.is_file, output.rglob("*")):
        if path.suffix == ".pt":
            files.read_tensors(path)
        elif path.suffix == ".json":
            files.read_json(path)
        else:
            assert path.suffix in (".csv", ".npz", ".yaml"), path


@pytest.fixture
def whole(call, tmp_path) -> dict[str, bytes]:
    """The tables of a run that nothing happened to."""
    assert call(tmp_path / "whole")[0] == 0
    return tables(tmp_path / "whole")


@pytest.fixture
def disk(tmp_path):
    """A disk of 600 KB: far too small for a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this machine allows no mounting")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk(call, disk, whole):
    status, (line,) = call(disk / "runs")
    assert status == 1
    assert line.startswith(str(disk))
    assert line.endswith(": No space left on device" + MENDED)
    check_whole(disk)
    remount(disk, "size=50m")
    assert call(disk / "runs")[0] == 0
    assert tables(disk) == whole


def test_a_disk_that_becomes_read_only(call, disk, whole):
    call(disk / "runs")
    remount(disk, "ro")
    status, (line,) = call(disk / "runs")
    assert status == 1
    assert line.endswith(": Read-only file system" + MENDED)
    assert ".tmp" not in line
    remount(disk, "rw,size=50m")
    assert call(disk / "runs")[0] == 0
    remount(disk, "ro")
    assert call(disk / "runs")[0] == 0, "what is finished can be read from anywhere"
    assert tables(disk) == whole


def test_files_may_not_grow(call, tmp_path, whole):
    """A limit on the size of files, which every machine has, in place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        status, (line,) = call(tmp_path / "runs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert line.endswith("epoch_000.pt: File too large" + MENDED)
    check_whole(tmp_path / "runs")
    assert call(tmp_path / "runs")[0] == 0
    assert tables(tmp_path / "runs") == whole


@pytest.mark.parametrize("number", range(0, 20, 6))
def test_full_at_any_write(call, tmp_path, monkeypatch, number):
    """The disk is full from the k-th write on, then there is space again."""
    fsync, count = os.fsync, iter(range(1000))

    def full(file):
        if next(count) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, (line,) = call(tmp_path / "runs", "train.epochs=2")
    assert status == 1
    assert line.endswith("No space left on device" + MENDED)
    check_whole(tmp_path / "runs")
    assert call(tmp_path / "runs", "train.epochs=2")[0] == 0


def test_a_folder_that_vanishes(call, tmp_path, monkeypatch):
    """A deleted run folder ends the work on it, and no half of it is made again."""
    write = Run.write_checkpoint

    def vanish(run, epoch, state):
        if epoch == 2:
            shutil.rmtree(run.directory)
        write(run, epoch, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_checkpoint", vanish)
        status, (line,) = call(tmp_path / "runs")
    assert status == 1
    assert line.endswith("seed0 was deleted; rerun to start from scratch")
    assert not list(tmp_path.glob("runs/*/seed0/*"))
    assert call(tmp_path / "runs")[0] == 0


@pytest.mark.slow(reason="a process of its own")
def test_a_real_folder_vanishes_under_a_real_process(tiny_file, tmp_path):
    command = [sys.executable, str(REPOSITORY / "gradient_accounting.py"), str(tiny_file)]
    process = subprocess.Popen(
        [*command, "train.epochs=5000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not list(tmp_path.glob("runs/*/*/resume/epoch_002.pt")):
            assert process.poll() is None
            time.sleep(0.02)
        (tmp_path / "runs").rename(tmp_path / "moved")
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, signal.Signals(-process.returncode)
    assert "/seed0" in error.splitlines()[-1]
    assert "Traceback" not in error
