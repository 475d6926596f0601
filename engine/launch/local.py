"""Do the jobs of a sweep: in turn, in parallel, or shared with other machines.

The unit of distribution is a run with all of its jobs in order. A process locks the run that it
works on, so the same command can run on several machines with a common file system.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from engine.errors import RunFailed, UserError
from engine.launch.cli import UNFINISHED, Ending
from engine.launch.estimates import Speeds, duration, makespan
from engine.launch.jobs import Job, are_done, by_run
from engine.launch.processes import Slot, side_by_side, why
from engine.launch.progress import Progress
from engine.runs import files
from engine.runs.locking import Held, known_holder, lock
from engine.runs.stopping import OutOfTime, time_left


class LeftToOthers(Exception):
    """Only runs that other processes have locked remain."""


# ---------------------------------------------------------------- in turn


def one_after_another(jobs: Sequence[Job], ending: Ending, wait: bool = False) -> Iterator[Job]:
    """Do every job under one progress line, print its result, and yield it.

    A run that another process has locked is retried at the end, then waited for or skipped.
    """
    with Progress(jobs) as bar:
        waiting = list(by_run(jobs).items())
        for last in (False, True):
            held = []
            for directory, share in waiting:
                if are_done(share):  # reading a finished run needs no lock
                    yield from _do(share, bar, ending)
                    continue
                with ending.one_of_several(directory):  # a lock can also be lost
                    try:
                        with lock(directory, wait=wait and last):
                            yield from _do(share, bar, ending)
                    except Held as error:
                        held.append((directory, share))
                        if last:
                            bar.write(
                                f"{directory}: skipped, locked by {error.by}", file=sys.stderr
                            )
            waiting = held
    if waiting:
        raise LeftToOthers


def _do(share: Sequence[Job], bar: Progress, ending: Ending) -> Iterator[Job]:
    for job in share:
        bar.show(job.name)
        with ending.one_of_several(job.run.directory):
            bar.write(job.do(), file=sys.stdout)
            yield job
        bar.mark_done(job)


# ---------------------------------------------------------------- in parallel


def at_once(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    command: Callable[[Path], Sequence[str]],
    ending: Ending,
) -> Iterator[Job]:
    """Run the command for each run, as many at a time as there are slots.

    Prints the results of each finished job and yields it; reports failed runs at the end.
    """
    shares, failures = by_run(jobs), []
    left = set(shares)
    with Progress(jobs) as bar:
        for directory, status in _processes(shares, slots, command, bar):
            if status not in (0, UNFINISHED):
                failures.append((why(directory, status), 2 if status == 2 else 1))
            elif not are_done(shares[directory]):
                continue
            left.remove(directory)
            for job in shares[directory]:
                if job.done:
                    with ending.one_of_several(directory):
                        bar.write(job.do(), file=sys.stdout)
                        yield job
        for directory in [d for d in left if are_done(shares[d])]:  # by other processes
            left.remove(directory)
            yield from _do(shares[directory], bar, ending)
    for failure, status in failures:
        print(failure, file=sys.stderr)
        ending.status = max(ending.status, status)
    if left:
        all_held = time_left() == math.inf or all(map(known_holder, left))
        raise LeftToOthers if all_held else OutOfTime


def _processes(
    shares: Mapping[Path, Sequence[Job]],
    slots: Sequence[Slot],
    command: Callable[[Path], Sequence[str]],
    bar: Progress,
) -> Iterator[tuple[Path, int]]:
    """Yield each run's directory as soon as its process has ended, with the exit status.

    A finished run needs no process.
    """
    to_do = [directory for directory, share in shares.items() if not are_done(share)]

    def watch(running: Sequence[Path]) -> None:
        names = Counter()
        for share in (shares[directory] for directory in running):
            bar.mark_done(*(job for job in share if job.done))
            names.update([job.name for job in share if not job.done][:1])
        bar.show(", ".join(f"{count} x {name}" for name, count in names.items()))

    for directory in shares:
        if directory not in to_do:
            yield directory, 0
    commands = {directory: command(directory) for directory in to_do}
    for directory, status in side_by_side(commands, slots, watch, put_off=known_holder):
        bar.mark_done(*shares[directory])
        yield directory, status
    watch(())


# ---------------------------------------------------------------- without work


def collect(jobs: Sequence[Job], ending: Ending) -> Iterator[Job]:
    """Print and yield every finished job, and name the unfinished ones; start nothing."""
    if not any(job.done for job in jobs):
        raise UserError(
            f"none of {len(jobs)} jobs is finished; the same command without --collect does them"
        )
    for job in jobs:
        with ending.one_of_several(job.run.directory):
            if not job.done:
                raise RunFailed(f"no {job.name} yet")
            print(job.do(), flush=True)
            yield job


def foresee(jobs: Sequence[Job], slots: Sequence[Slot]) -> Iterator[str]:
    """Describe every job, its time and its disk; then the total, in turn and in parallel."""
    alone = Speeds(torch.get_num_threads())
    shared = alone if slots[0].threads == alone.threads else Speeds(slots[0].threads)
    seconds, in_slots, disk, count = 0.0, [], 0.0, 0
    for share in by_run(jobs).values():
        in_slots.append(0.0)
        for job in share:
            line = f"{job.name}: {job.experiment.plan(job.run)}"
            if not job.done:
                own = alone.seconds(job.experiment, job.run)
                line += f", about {duration(own)}"
                seconds, count = seconds + own, count + 1
                in_slots[-1] += shared.seconds(job.experiment, job.run)
                disk += job.experiment.disk(job.run)
            yield f"{line}  {job.run.directory}"
    total = f"total: {count} of {len(jobs)} jobs to do"
    if count:
        total += f", about {duration(seconds)} in turn"
    if count and len(slots) > 1:
        # Assume that sharing a GPU makes processes no faster.
        lanes = len({slot.gpu for slot in slots}) if slots[0].gpu else len(slots)
        total += f", {duration(makespan(in_slots, lanes))} with {len(slots)} runs in parallel"
    yield f"{total}, {files.megabytes(disk)}"
