"""Commands side by side: each a process of its own, on a GPU or on its share of a CPU."""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import UserError
from engine.runs.stopping import time_left
from engine.training.devices import SHARED_BY

POLL = 0.1  # seconds between two looks at the processes
WATCH = 2.0  # seconds between two looks at what they have done
PARENT = "REPRODUCE_PARENT"  # environment variable: the process that starts and ends others
PATIENCE = 60.0  # seconds for a process to end itself before it is killed


@dataclass(frozen=True)
class Slot:
    """Where one process at a time computes, with how many threads, and beside how many others."""

    gpu: str | None
    threads: int
    sharing: int = 1  # processes that have the device's memory in common, this one included

    @property
    def environment(self) -> dict[str, str]:
        found = {"OMP_NUM_THREADS": str(self.threads), SHARED_BY: str(self.sharing)}
        return found if self.gpu is None else found | {"CUDA_VISIBLE_DEVICES": self.gpu}


def make_slots(jobs: int | None, gpus: Sequence[str] | None) -> list[Slot]:
    """So many slots (else one for each GPU), over the GPUs (else over all of them) in turn.

    A CPU's threads are shared out, unless OMP_NUM_THREADS says how many a process has.
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
    """The GPUs as CUDA_VISIBLE_DEVICES names them; what it hides from us is not ours to give."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def log_path(directory: Path) -> Path:
    """Where the command for a run's directory writes what it has to say: beside that."""
    return directory.with_name(f"{directory.name}.log")


def side_by_side(
    commands: Mapping[Path, Sequence[str]],
    slots: Sequence[Slot],
    watch: Callable[[Sequence[Path]], object] = lambda running: None,
    put_off: Callable[[Path], object] = lambda directory: False,
) -> Iterator[tuple[Path, int]]:
    """Run each directory's command, one at a time in a slot; yield it with its exit status.

    What is to be put off comes once more at the end. `watch` is told now and then what is running.
    When the time budget is spent, no more are started. However this ends, no process stays behind.
    """
    waiting, free = deque((directory, True) for directory in commands), deque(slots)
    running: dict[Path, tuple[subprocess.Popen, Slot]] = {}
    looked = time.monotonic()
    try:
        while running or (waiting and time_left() > 0):
            while waiting and free and time_left() > 0:
                directory, first = waiting.popleft()
                if first and put_off(directory):
                    waiting.append((directory, False))
                else:
                    slot = free.popleft()
                    running[directory] = start(commands[directory], directory, slot), slot
            for directory, (process, slot) in list(running.items()):
                if process.poll() is not None:
                    del running[directory]
                    free.append(slot)
                    yield directory, process.returncode
            if time.monotonic() > looked + WATCH:
                watch(list(running))
                looked = time.monotonic()
            time.sleep(POLL)
    finally:
        end([process for process, _ in running.values()])


def start(command: Sequence[str], directory: Path, slot: Slot) -> subprocess.Popen:
    """In a session of its own: Ctrl-C in the terminal is for us, who then end it."""
    budget = [] if time_left() == float("inf") else ["--time-budget", f"{time_left():.3f}"]
    path = log_path(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        return subprocess.Popen(
            [*command, *budget],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ
            | slot.environment
            | {"TQDM_MININTERVAL": "30", PARENT: str(os.getpid())},  # it is no terminal
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
    """Ask all to end, and kill who does not listen."""
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
    """Why a run failed, in one line that ends with its log."""
    log = log_path(directory)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()] or ["it said nothing"]
    said = next((line for line in reversed(lines) if line.startswith(f"{directory}: ")), lines[-1])
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{directory}: failed ({how}): {said.removeprefix(f'{directory}: ')}; its log: {log}"
