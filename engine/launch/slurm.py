"""Submit the runs of a sweep as a Slurm job array, and a last job that collects the results."""

import io
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from engine.config.schema import SlurmConfig
from engine.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Work:
    """Command as a job. Submitit calls it, and requeues it before its time is up.

    The command keeps its state on disk and resumes from there.
    """

    command: tuple[str, ...]

    def __call__(self) -> None:
        # Slurm warns every process of a job, and submitit answers by requeuing the job. The
        # command must ignore this warning; it is then ended with SIGTERM, which it handles.
        with subprocess.Popen(self.command, preexec_fn=_ignore_warning) as process:
            try:
                status = process.wait()
            except BaseException:
                process.terminate()
                raise
        if status:
            raise subprocess.CalledProcessError(status, self.command)

    def checkpoint(self) -> object:
        return _submitit().helpers.DelayedSubmission(self)


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _submitit() -> ModuleType:
    try:
        import submitit
    except ImportError:
        raise UserError(
            "command line: --slurm: submitit is missing; pip install -r requirements-slurm.txt"
        ) from None
    return submitit


def submit(
    commands: Sequence[Sequence[str]], folder: Path, settings: SlurmConfig, cluster: str = "slurm"
) -> list:
    """Submit an array with a job per command; return submitit's handles. Logs go to `folder`.

    `cluster` 'local' starts all commands on this machine.
    """
    executor = _make_executor(folder, settings, cluster, settings.gpus)
    with _refusals_of_slurm():
        return executor.submit_array([Work(tuple(command)) for command in commands])


def submit_after(jobs: Sequence, command: Sequence[str], folder: Path, settings: SlurmConfig):
    """Submit a job without a GPU that starts after all others have ended, failed or not."""
    executor = _make_executor(folder, settings, "slurm", gpus=0)
    array = jobs[0].job_id.partition("_")[0]
    executor.update_parameters(slurm_dependency=f"afterany:{array}")
    with _refusals_of_slurm():
        return executor.submit(Work(tuple(command)))


@contextmanager
def _refusals_of_slurm() -> Iterator[None]:
    """Report what Slurm refuses, such as an unknown partition, as the user's mistake."""
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except _submitit().core.utils.FailedJobError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"command line: --slurm: {lines[0] if lines else error}") from None


def _make_executor(folder: Path, settings: SlurmConfig, cluster: str, gpus: int):
    place = str(folder.absolute())
    # Slurm expands % in the names of logs, and a line break would end a line of the job's script.
    if "%" in place or not place.isprintable():
        raise UserError(
            f"command line: --slurm: {folder}: its name must be text on one line, without %"
        )
    try:
        executor = _submitit().AutoExecutor(
            folder, cluster=cluster, **{f"{cluster}_max_num_timeout": settings.restarts}
        )
    except RuntimeError:
        raise UserError(
            "command line: --slurm: srun not found; run this on a machine with Slurm"
        ) from None
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    setup = {
        "PYTHONPATH": shlex.quote(path),  # so that Python finds the class Work
        "OMP_NUM_THREADS": f"${{OMP_NUM_THREADS:-{settings.cpus}}}",
        "TQDM_MININTERVAL": "30",  # a log, not a terminal
    }
    executor.update_parameters(
        name=re.sub(r"[^A-Za-z0-9._-]", "_", folder.name),
        timeout_min=settings.time,
        cpus_per_task=settings.cpus,
        gpus_per_node=gpus or None,
        mem_gb=settings.memory,
        slurm_partition=settings.partition,
        slurm_account=settings.account,
        slurm_array_parallelism=settings.parallel,
        # Since Slurm 22.05, srun does not inherit the job's number of cores.
        slurm_srun_args=[f"--cpus-per-task={settings.cpus}"],
        slurm_additional_parameters={"requeue": True},  # off by default on some clusters
        slurm_setup=[f"export {name}={value}" for name, value in setup.items()],
    )
    return executor
