"""The one line that shows how far all jobs are."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from engine.estimates import PASSES, Speeds, duration
from engine.jobs import Job


class Progress:
    """One line for all jobs: what is going on, how many are done, how long the rest will take."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.bar = tqdm(
            total=len(jobs),
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt} of {total_fmt} jobs done, {elapsed} passed{postfix}",
        )
        self.work = {self._key(job): PASSES[job.script.__name__](job.run) for job in jobs}
        self.open = {self._key(job): job for job in jobs if not job.done}
        self.to_do = sum(self.work[key] for key in self.open)
        self.began = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @staticmethod
    def _key(job: Job) -> tuple[str, Path]:
        return job.script.__name__, job.run.directory

    def write(self, line: str, file: TextIO) -> None:
        self.bar.write(line, file=file)

    def passed(self, *jobs: Job) -> None:
        """These need no more time, whatever came of them."""
        for job in jobs:
            self.open.pop(self._key(job), None)

    def show(self, now: str) -> None:
        self.bar.n = len(self.work) - len(self.open)
        self.bar.set_description_str(f"all, now {now}" if now else "all", refresh=False)
        left = sum(self.work[key] for key in self.open) * self._seconds_of_a_pass()
        self.bar.set_postfix_str(f"about {duration(left)} left" if left else "", refresh=True)

    def _seconds_of_a_pass(self) -> float:
        """From what was done since the beginning; before that a guess, for a person who waits."""
        done = self.to_do - sum(self.work[key] for key in self.open)
        if done > 0:
            return (time.monotonic() - self.began) / done
        if self.open and sys.stderr.isatty():
            return Speeds(torch.get_num_threads()).of(next(iter(self.open.values())).run.config)
        return 0.0
