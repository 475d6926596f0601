"""The jobs of a sweep: one after another, side by side, or shared with other machines.

What is handed out is a run with all of its jobs in order. Whoever works on a run claims it, so that
the same command, started anywhere on a common file system, goes on with what nobody works on.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from engine.errors import RunFailed
from engine.launch.cli import Ending
from engine.launch.estimates import Speeds, duration, makespan
from engine.launch.jobs import Job, are_done, by_run
from engine.launch.processes import Slot, side_by_side, why
from engine.launch.progress import Progress
from engine.runs import files
from engine.runs.locking import Held, holder_of, lock
from engine.runs.stopping import OutOfTime, time_left


class LeftToOthers(Exception):
    """All is done, but for runs that other processes work on."""


# ---------------------------------------------------------------- one after another


def one_after_another(jobs: Sequence[Job], ending: Ending, wait: bool = False) -> Iterator[Job]:
    """Do every job, a line of results each, under one line of progress; yield what is done.

    A run that is held by another process comes again at the end, and is then waited for or left.
    """
    with Progress(jobs) as bar:
        waiting = list(by_run(jobs).items())
        for last in (False, True):
            held = []
            for directory, share in waiting:
                if are_done(share):  # looking at it must not keep others from looking
                    yield from _do(share, bar, ending)
                    continue
                with ending.one_of_several(directory):  # a claim can also be lost
                    try:
                        with lock(directory, wait=wait and last):
                            yield from _do(share, bar, ending)
                    except Held as error:
                        held.append((directory, share))
                        if last:
                            bar.write(f"{directory}: left to {error.by}", file=sys.stderr)
            waiting = held
    if waiting:
        raise LeftToOthers


def _do(share: Sequence[Job], bar: Progress, ending: Ending) -> Iterator[Job]:
    for job in share:
        bar.show(job.name)
        with ending.one_of_several(job.run.directory):
            bar.write(job.do(), file=sys.stdout)
            yield job
        bar.passed(job)


# ---------------------------------------------------------------- side by side


def at_once(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    command: Callable[[Path], Sequence[str]],
    ending: Ending,
) -> Iterator[Job]:
    """Do each run's jobs by the command for it, as many runs at a time as there are slots.

    Yields what is done, with its line of results. What failed is reported at the end.
    """
    shares, failures = by_run(jobs), []
    left = set(shares)
    with Progress(jobs) as bar:
        for directory, status in _processes(shares, slots, command, bar):
            if status:
                failures.append(why(directory, status))
            elif not are_done(shares[directory]):
                continue
            left.remove(directory)
            for job in shares[directory]:
                if job.done:
                    with ending.one_of_several(directory):
                        bar.write(job.do(), file=sys.stdout)
                        yield job
    for failure in failures:
        print(failure, file=sys.stderr)
        ending.status = 1
    if left:
        raise LeftToOthers if time_left() == math.inf else OutOfTime


def _processes(
    shares: Mapping[Path, Sequence[Job]],
    slots: Sequence[Slot],
    command: Callable[[Path], Sequence[str]],
    bar: Progress,
) -> Iterator[tuple[Path, int]]:
    """Each run's directory as soon as its process has ended, with that one's exit status.

    A run that is done needs no process.
    """
    to_do = [directory for directory, share in shares.items() if not are_done(share)]

    def watch(running: Sequence[Path]) -> None:
        names = Counter()
        for share in (shares[directory] for directory in running):
            bar.passed(*(job for job in share if job.done))
            names.update([job.name for job in share if not job.done][:1])
        bar.show(", ".join(f"{count} x {name}" for name, count in names.items()))

    for directory in shares:
        if directory not in to_do:
            yield directory, 0
    commands = {directory: command(directory) for directory in to_do}
    for directory, status in side_by_side(commands, slots, watch, put_off=holder_of):
        bar.passed(*shares[directory])
        yield directory, status
    watch(())


# ---------------------------------------------------------------- only looking


def collect(jobs: Sequence[Job], ending: Ending) -> Iterator[Job]:
    """What is done, with its line of results; what is not is named, and nothing is begun."""
    for job in jobs:
        with ending.one_of_several(job.run.directory):
            if not job.done:
                raise RunFailed(f"no {job.name} yet")
            print(job.do(), flush=True)
            yield job


def foresee(jobs: Sequence[Job], slots: Sequence[Slot]) -> Iterator[str]:
    """What every job would do, its time and its disk; the total, one by one and side by side."""
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
        total += f", about {duration(seconds)} one after another"
    if count and len(slots) > 1:
        # Processes on one GPU are not counted on to be faster together.
        lanes = len({slot.gpu for slot in slots}) if slots[0].gpu else len(slots)
        total += f", {duration(makespan(in_slots, lanes))} with {len(slots)} runs at once"
    yield f"{total}, {files.megabytes(disk)}"
