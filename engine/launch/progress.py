"""The one line that shows how far all jobs are."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

import torch
from tqdm import tqdm

from engine.launch.estimates import Speeds, duration
from engine.launch.jobs import Job


class Progress:
    """One line for all jobs: what is going on, how many are done, how long the rest will take."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.bar = tqdm(
            total=len(jobs),
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt} of {total_fmt} jobs done, {elapsed} passed{postfix}",
        )
        self.work = {job: job.experiment.passes(job.run) for job in jobs}
        self.open = [job for job in jobs if not job.done]
        self.to_do = self._open_work()
        self.began = time.monotonic()
        self.speeds = Speeds(torch.get_num_threads())  # finds out once what a pass takes

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def write(self, line: str, file: TextIO) -> None:
        self.bar.write(line, file=file)

    def passed(self, *jobs: Job) -> None:
        """These need no more time, whatever came of them."""
        self.open = [job for job in self.open if job not in jobs]

    def _open_work(self) -> float:
        return sum(self.work[job] for job in self.open)

    def show(self, now: str) -> None:
        self.bar.n = len(self.work) - len(self.open)
        self.bar.set_description_str(f"all, now {now}" if now else "all", refresh=False)
        left = self._open_work() * self._seconds_of_a_pass()
        self.bar.set_postfix_str(f"about {duration(left)} left" if left else "", refresh=True)

    def _seconds_of_a_pass(self) -> float:
        """From what was done since the beginning; before that a guess, for a person who waits."""
        done = self.to_do - self._open_work()
        if done > 0:
            return (time.monotonic() - self.began) / done
        if self.open and sys.stderr.isatty():
            return self.speeds.of(self.open[0].run.config)
        return 0.0
