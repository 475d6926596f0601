"""Run commands in parallel: each in its own process, on a GPU or on a share of the CPU."""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from engine.errors import UserError
from engine.runs.commands import shell_command
from engine.runs.stopping import time_left
from engine.training.devices import SHARED_BY

POLL = 0.1  # seconds between checks of the processes
WATCH = 2.0  # seconds between checks of their finished jobs
PARENT = "REPRODUCE_PARENT"  # environment variable: the process that starts and ends others
PATIENCE = 60.0  # seconds between SIGTERM and SIGKILL
STARTED = "# started "  # begins the line of a log that says when which command was started


@dataclass(frozen=True)
class Slot:
    """Place for one process at a time: a GPU or the CPU, and a number of threads."""

    gpu: str | None
    threads: int
    sharing: int = 1  # processes that share the device's memory, including this one

    @property
    def environment(self) -> dict[str, str]:
        found = {"OMP_NUM_THREADS": str(self.threads), SHARED_BY: str(self.sharing)}
        return found if self.gpu is None else found | {"CUDA_VISIBLE_DEVICES": self.gpu}


def make_slots(jobs: int | None, gpus: Sequence[str] | None) -> list[Slot]:
    """Make `jobs` slots (default: one per GPU) over `gpus` (default: all) in turn.

    Without a GPU the slots divide the CPU's threads, unless OMP_NUM_THREADS is set.
    """
    present = _visible_gpus()
    chosen = present if gpus is None else [_named(gpu, present) for gpu in gpus]
    count = jobs or len(chosen) or 1
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, threads // count)
    if not chosen:
        return [Slot(None, threads, sharing=count)] * count
    turns = [chosen[k % len(chosen)] for k in range(count)]
    return [Slot(gpu, threads, sharing=turns.count(gpu)) for gpu in turns]


def _named(gpu: str, present: Sequence[str]) -> str:
    """Return the name of a GPU by its number; names stay, torch counts one MIG instance only."""
    if not gpu.isdecimal():
        return gpu
    if int(gpu) >= len(present):
        there = f"has {len(present)}, counted from 0" if present else "has no usable GPU"
        raise UserError(f"command line: --gpus: {gpu} is not allowed: this machine {there}")
    return present[int(gpu)]


def _visible_gpus() -> list[str]:
    """Return the visible GPUs under the names that CUDA_VISIBLE_DEVICES uses."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def log_path(directory: Path) -> Path:
    """Return the log of the command for a run: a file beside its directory."""
    return directory.with_name(f"{directory.name}.log")


def side_by_side(
    commands: Mapping[Path, Sequence[str]],
    slots: Sequence[Slot],
    watch: Callable[[Sequence[Path]], object] = lambda running: None,
    put_off: Callable[[Path], object] = lambda directory: False,
) -> Iterator[tuple[Path, int]]:
    """Run each directory's command, one at a time per slot; yield it with its exit status.

    A directory for which `put_off` is true is tried again from time to time, and started at the end
    all the same. `watch` is called periodically with the running directories. No command starts
    after the time budget is spent, and every process is ended on exit.
    """
    waiting, later, free = deque(commands), deque(), deque(slots)
    running: dict[Path, tuple[subprocess.Popen, Slot]] = {}
    looked = time.monotonic()

    def begin(directory: Path) -> None:
        slot = free.popleft()
        running[directory] = start(commands[directory], directory, slot), slot

    try:
        while running or ((waiting or later) and time_left() > 0):
            while waiting and free and time_left() > 0:
                directory = waiting.popleft()
                if put_off(directory):
                    later.append(directory)
                else:
                    begin(directory)
            if later and not (running or waiting) and time_left() > 0:
                begin(later.popleft())
            for directory, (process, slot) in list(running.items()):
                if process.poll() is not None:
                    del running[directory]
                    free.append(slot)
                    yield directory, process.returncode
            if time.monotonic() > looked + WATCH:
                watch(list(running))
                waiting.extend(later)
                later.clear()
                looked = time.monotonic()
            time.sleep(POLL)
    finally:
        end([process for process, _ in running.values()])


def start(command: Sequence[str], directory: Path, slot: Slot) -> subprocess.Popen:
    """Start a command in its own session, so that Ctrl-C reaches this process only."""
    budget = [] if time_left() == float("inf") else ["--time-budget", f"{time_left():.3f}"]
    path = log_path(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        log.write(f"{STARTED}{when}: {shell_command(command)}\n".encode(errors="replace"))
        log.flush()
        return subprocess.Popen(
            [*command, *budget],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ
            | slot.environment
            | {"TQDM_MININTERVAL": "30", PARENT: str(os.getpid())},  # a log, not a terminal
            start_new_session=True,
        )


def end_with_parent() -> None:
    """End by SIGTERM when the process that started this one is gone, even if it was killed."""
    parent = int(os.environ.pop(PARENT, 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Terminate all processes, and kill those that do not end in time."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                return
            time.sleep(POLL)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def why(directory: Path, status: int) -> str:
    """Say why a run failed, in one line that ends with its log."""
    log = log_path(directory)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    begun = max((i for i, line in enumerate(lines) if line.startswith(STARTED)), default=-1)
    lines = [line.strip() for line in lines[begun + 1 :] if line.strip()] or ["no output"]
    said = next((line for line in reversed(lines) if line.startswith(f"{directory}: ")), lines[-1])
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{directory}: failed ({how}): {said.removeprefix(f'{directory}: ')}; log: {log}"
