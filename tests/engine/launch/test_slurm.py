"""Jobs of a cluster give what one process gives, whatever stops them on their way.

By submitit's local executor, and by a real Slurm where it is installed.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reproduce
from engine.config.load import load_configs
from engine.launch import slurm
from engine.runs import files
from tests.conftest import TINY, complaints
from tests.slurm_cluster import slurm_cluster, why_not

REPOSITORY = Path(__file__).resolve().parents[3]
EPOCHS = 10
SMALL = [f"train.epochs={EPOCHS}", "experiments=[rewinding]", "rewinding.epochs=[0]"]


def wait_for(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def results(output_dir: Path) -> dict[str, object]:
    """Every table of every run, and its final weights."""
    found = {
        str(path.relative_to(output_dir)): path.read_bytes()
        for path in output_dir.glob("*/seed*/*.csv")
    }
    for run in output_dir.glob("*/seed*/"):
        last = max(run.glob("checkpoints/*.pt"))
        weights = files.read_tensors(last)["model"]
        found[str(last.relative_to(output_dir))] = {k: v.tolist() for k, v in weights.items()}
    return found


def in_training(output_dir: Path, *seeds: int) -> bool:
    return all(list(output_dir.glob(f"*/seed{seed}/resume/epoch_*[1-9].pt")) for seed in seeds)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> tuple[Path, dict]:
    """A sweep of four runs, and what it gives when one process does it all."""
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "sweep.yaml"
    path.write_text(TINY + "seed: [0, 1, 2, 3]\n")
    assert reproduce.main([str(path), *SMALL, f"output_dir={folder}/serial"]) == 0
    serial = results(folder / "serial")
    assert len(serial) == 4 * 5  # four tables, and the weights
    return path, serial


@pytest.mark.slow(reason="two jobs and a sweep to compare them with: half a minute")
def test_a_job_that_was_pre_empted_goes_on(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    path, serial = sweep
    arguments = [str(path), *SMALL, f"output_dir={tmp_path}/runs"]
    runs = reproduce.by_run(reproduce.make_jobs(load_configs(path, arguments[1:])))
    (settings,) = {config.slurm for config in load_configs(path)}
    script = [sys.executable, str(REPOSITORY / "reproduce.py"), *arguments]
    (job,) = slurm.submit(
        [[*script, "--only", str(next(iter(runs)))]], tmp_path / "jobs", settings, cluster="local"
    )
    wait_for(lambda: in_training(tmp_path / "runs", 0))
    (task,) = children(job._process.pid)
    os.kill(task, signal.SIGUSR2)  # as Slurm warns of pre-emption, and of a time limit
    job.result()
    log = job.paths.stdout.read_text()
    assert "Calling checkpoint method" in log
    assert log.count("Starting with") == 2
    assert "Interrupted." in job.paths.stderr.read_text()
    found = results(tmp_path / "runs")
    assert found == {name: content for name, content in serial.items() if "seed0" in name}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_command_that_fails_is_a_job_that_fails(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        slurm.Work((sys.executable, "-c", "raise SystemExit(3)"))()


# ---------------------------------------------------------------- a real cluster


def shell(command: str) -> str:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with slurm_cluster() as folder:
        yield folder


def submit(capsys, path: Path, *overrides: str) -> list[str]:
    """The ids of the jobs that a sweep becomes."""
    capsys.readouterr()
    arguments = [str(path), *overrides, "--slurm", "slurm.gpus=0", "slurm.cpus=1"]
    assert reproduce.main(arguments) == 0
    return re.findall(r"^job ([\d_]+)", capsys.readouterr().out, re.MULTILINE)


def wait_for_the_cluster() -> None:
    wait_for(lambda: not shell("squeue --noheader"), seconds=3000)


@pytest.mark.slow(reason="starts a cluster for a minute and a half, mostly waiting")
def test_a_sweep_goes_through_the_array(cluster, sweep, tmp_path, capsys):
    path, serial = sweep
    runs, arguments = tmp_path / "runs", [*SMALL, f"output_dir={tmp_path}/runs"]
    first, second, _, _, last = submit(capsys, path, *arguments)
    wait_for(lambda: in_training(runs, 0))
    shell(f"scontrol requeue {first}")  # what pre-emption does
    wait_for_the_cluster()
    assert results(runs) == serial
    logs = runs / "slurm-sweep"
    assert "DUE TO JOB REQUEUE" in (logs / f"{first}_0_log.err").read_text()
    assert "DUE TO JOB REQUEUE" not in (logs / f"{second}_0_log.err").read_text()
    assert (logs / f"{last}_0_log.out").read_text().count("layer rewinding: ") == 4
    assert list(runs.glob("*/figures/rewinding.pdf"))
    assert submit(capsys, path, *arguments) == []
    assert reproduce.main([str(path), "--slurm", "slurm.gpus=0", "slurm.partition=none"]) == 2
    (said,) = complaints(capsys.readouterr().err)
    assert said.endswith("--slurm: sbatch: error: invalid partition specified: none")


@pytest.mark.slow(reason="eight trainings of quickstart's size: ten minutes")
@pytest.mark.timeout(3600)
def test_a_sweep_of_quickstarts_goes_through_the_array(cluster, tmp_path, capsys):
    """One job is stopped as by pre-emption, another as by its time limit."""
    path = REPOSITORY / "configs" / "quickstart.yaml"
    settings = ["seed=[0,1,2,3]", "dropout.kind=none", "experiments=[rewinding]", "device=cpu"]
    assert reproduce.main([str(path), *settings, f"output_dir={tmp_path}/serial"]) == 0
    runs = tmp_path / "runs"
    first, second, *_ = submit(capsys, path, *settings, f"output_dir={runs}")
    wait_for(lambda: in_training(runs, 0))
    shell(f"scontrol requeue {first}")
    wait_for(lambda: in_training(runs, 1), seconds=600)
    shell(f"scancel --signal=USR2 {second}.0")
    wait_for_the_cluster()
    assert results(runs) == results(tmp_path / "serial")
    for job in (first, second):
        log = (runs / "slurm-quickstart" / f"{job}_0_log.out").read_text()
        assert log.count("Starting with") == 2
