"""The command line as its user meets it: real processes, exit statuses, one line a run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradient_accounting
from engine.cli import run_script

REPOSITORY = Path(__file__).resolve().parents[2]
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
        assert line.startswith(f"glyphs resnet9 noise 0.2 seed {seed}: clean ")
        directory = Path(line.split()[-1])
        assert (directory / "history.csv").exists()
        assert directory.name == f"seed{seed}"
    again = call(tiny_file, "seed=[0,1]", "train.epochs=1", "--dry-run")
    assert again.returncode == 0
    assert all(": finished, " in line for line in again.stdout.splitlines())
    by_directory = call(lines[0].split()[-1])
    assert by_directory.stdout == lines[0] + "\n"


def test_dry_run_writes_nothing(tiny_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = call(tiny_file, "--dry-run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert ": to do, " in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["cifar10", "mnist", "svhn"])
def test_a_dry_run_needs_no_data(tmp_path, capsys, name):
    config = tmp_path / "a.yaml"
    config.write_text(f"data: {{name: {name}, root: {tmp_path / 'empty'}}}\n")
    arguments = [str(config), "--dry-run"]
    assert run_script("", gradient_accounting.main, gradient_accounting.plan, arguments) == 0
    assert re.search(r"seed 0: to do, 5\d\d\.\d MB  runs/", capsys.readouterr().out)
    assert not (tmp_path / "empty").exists()


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


def test_killed_at_any_moment_and_started_again(tiny_file, tmp_path):
    """kill -9 while a real process trains; then the same command; the same bytes in every table."""
    arguments = ["train.epochs=12", "data.train_size=600"]
    whole = call(tiny_file, *arguments, f"output_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, str(SCRIPT), str(tiny_file), *arguments, f"output_dir={tmp_path}/k"]
    kills = 0
    for epoch in (2, 7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(f"k/*/*/*/epoch_{epoch:03d}.pt")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2, "the run ended before it could be killed; make it longer"
    again = call(tiny_file, *arguments, f"output_dir={tmp_path}/k")
    assert again.returncode == 0, again.stderr
    (first,), (second,) = (list(tmp_path.glob(f"{name}/*/seed0")) for name in ("whole", "k"))
    tables = sorted(path.name for path in first.glob("*.csv"))
    assert tables == ["gradient_accounting.csv", "history.csv"]
    for name in tables:
        assert (first / name).read_bytes() == (second / name).read_bytes()
