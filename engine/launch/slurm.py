"""The runs of a sweep as a Slurm job array, through submitit; a last job collects the results."""

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
    """A command as a job. Submitit calls it, and puts it into the queue again when it has to stop.

    What the command has done lies on disk, and the same command goes on from there.
    """

    command: tuple[str, ...]

    def __call__(self) -> None:
        # The cluster's warning goes to every process of a job, and is submitit's to answer: it puts
        # the job into the queue and leaves. The command is then ended with a signal that it knows.
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
    """An array with a job for each command; submitit's handles of them, and its files in `folder`.

    `cluster` 'local' starts them all on this machine.
    """
    executor = _make_executor(folder, settings, cluster, settings.gpus)
    with _complaints_of_slurm():
        return executor.submit_array([Work(tuple(command)) for command in commands])


def submit_after(jobs: Sequence, command: Sequence[str], folder: Path, settings: SlurmConfig):
    """A job without a GPU that begins when all others have ended, whatever came of them."""
    executor = _make_executor(folder, settings, "slurm", gpus=0)
    array = jobs[0].job_id.partition("_")[0]
    executor.update_parameters(slurm_dependency=f"afterany:{array}")
    with _complaints_of_slurm():
        return executor.submit(Work(tuple(command)))


@contextmanager
def _complaints_of_slurm() -> Iterator[None]:
    """What it does not accept, such as a partition that it does not have, is the user's to mend."""
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except _submitit().core.utils.FailedJobError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"command line: --slurm: {lines[0] if lines else error}") from None


def _make_executor(folder: Path, settings: SlurmConfig, cluster: str, gpus: int):
    if not str(folder.absolute()).isprintable():  # it would end a line of the job's script
        raise UserError(f"command line: --slurm: {folder}: its name must be text on one line")
    try:
        executor = _submitit().AutoExecutor(
            folder, cluster=cluster, **{f"{cluster}_max_num_timeout": settings.restarts}
        )
    except RuntimeError:
        raise UserError("command line: --slurm: there is no Slurm here (no srun)") from None
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    setup = {
        "PYTHONPATH": shlex.quote(path),  # for Python to find the class above
        "OMP_NUM_THREADS": f"${{OMP_NUM_THREADS:-{settings.cpus}}}",
        "TQDM_MININTERVAL": "30",  # a log is no terminal
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
        # Since Slurm 22.05, srun takes no notice of what its job asked for.
        slurm_srun_args=[f"--cpus-per-task={settings.cpus}"],
        slurm_additional_parameters={"requeue": True},  # some clusters do so only when asked
        slurm_setup=[f"export {name}={value}" for name, value in setup.items()],
    )
    return executor
