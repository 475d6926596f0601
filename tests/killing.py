"""The death of a process at a chosen moment: without a process, and of a real one."""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from engine.runs import files
from engine.runs.locking import Holder
from engine.training import resume


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@contextmanager
def _dying(module: ModuleType, name: str, work: Callable) -> Iterator[None]:
    """Replace a function of a module by `work`, which raises Killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, work)
        with pytest.raises(Killed):
            yield


@contextmanager
def killed_at_write(moment: int, before: bool = False) -> Iterator[None]:
    """Raise Killed just after the file of this number, from 0, got its name, or just before."""
    write, count = files.write_atomically, iter(range(10_000))

    def write_or_die(path, content):
        number = next(count)
        if number == moment and before:
            raise Killed
        write(path, content)
        if number == moment:
            raise Killed

    with _dying(files, "write_atomically", write_or_die):
        yield


@contextmanager
def killed_after_epoch(epoch: int) -> Iterator[None]:
    """A training inside dies when it has saved this epoch."""
    save = resume.save_epoch

    def save_and_die(run, number, *rest):
        save(run, number, *rest)
        if number == epoch:
            raise Killed

    with _dying(resume, "save_epoch", save_and_die):
        yield


# ---------------------------------------------------------------- real processes

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST = 280.0  # seconds that a command of a tiny configuration may take


def run_command(folder: str, script: str, arguments: list[str], errors: str) -> None:
    """Run a script in a folder, as `python SCRIPT.py ARGUMENTS` does; stderr goes to a file."""
    os.chdir(folder)
    for name, descriptor in ((os.devnull, 1), (errors, 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.argv = [str(REPOSITORY / script), *arguments]
    sys.path[:0] = [str(REPOSITORY)]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Command:
    """A script as a process of its own, which has its libraries imported when it starts.

    The process is forked from a server that imported them and did nothing else. Its imports would
    otherwise take longer than its work.
    """

    def __init__(self, folder: Path, script: str, *arguments: str) -> None:
        self.errors = folder.with_name(f"{folder.name}.stderr")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision", "matplotlib.pyplot", "yaml"])
        self.process = context.Process(
            target=run_command, args=(str(folder), script, list(arguments), str(self.errors))
        )
        self.process.start()
        self.began = time.monotonic()

    def wait_for_lock(self, folder: Path) -> None:
        """Wait until a run below a folder is locked, or the process has ended; time from there."""
        while self.process.is_alive() and not any(folder.rglob("claim.json")):
            time.sleep(0.005)
        self.began = time.monotonic()

    def finish(self) -> tuple[int, str]:
        """Return its exit status and what it wrote on stderr."""
        self.process.join(LONGEST)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"{self.process}: still running after {LONGEST:.0f} seconds")
        return self.process.exitcode, self.errors.read_text()

    def kill_after(self, seconds: float) -> bool:
        """Kill it some seconds after it started; return whether it still ran."""
        time.sleep(max(0.0, self.began + seconds - time.monotonic()))
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


def kill_holders(folder: Path) -> int:
    """Kill every process of this machine that holds a run below a folder; return their number."""
    killed = 0
    for path in folder.rglob("claim.json"):
        holder = Holder.of(path)
        if holder and holder.pid and holder.alive(path.parent):
            os.kill(holder.pid, signal.SIGKILL)
            killed += 1
    return killed
