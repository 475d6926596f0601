"""Progress line over all jobs: the current work, finished jobs, elapsed and remaining time."""

import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

import torch
from tqdm import tqdm

from engine.launch.estimates import Speeds, duration
from engine.launch.jobs import Job
from engine.progress import LINE_INTERVAL

TICK = 1.0  # seconds between updates in a terminal


class Progress:
    """Progress of all jobs on stderr: one moving line in a terminal, else a line now and then."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.moving = sys.stderr.isatty()
        self.bar = tqdm(
            total=len(jobs),
            disable=not self.moving,
            dynamic_ncols=True,
            bar_format="{desc} [{n_fmt}/{total_fmt} jobs] {elapsed} elapsed{postfix}",
        )
        self.work = {job: job.experiment.passes(job.run) for job in jobs}
        self.open = [job for job in jobs if not job.done]
        self.to_do = self._open_work()
        self.began = time.monotonic()
        self.written = -LINE_INTERVAL  # when the last plain line was
        self.now = ""
        self.remaining, self.estimated = 0.0, self.began
        self.marked = self.began  # when the newest job ended
        self.speeds = Speeds(torch.get_num_threads())
        self.ended = threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Progress":
        if self.moving:
            self.clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.moving:
            self.clock.join()
            self._update()
        self.bar.close()

    def write(self, line: str, file: TextIO) -> None:
        tqdm.write(line, file=file)

    def mark_done(self, *jobs: Job) -> None:
        """Count these jobs as done, whether they succeeded or failed."""
        still_open = [job for job in self.open if job not in jobs]
        if len(still_open) < len(self.open):
            self.open, self.marked = still_open, time.monotonic()

    def show(self, now: str) -> None:
        """Name the current work and estimate the remaining time."""
        self.now, self.estimated = now, time.monotonic()
        rest = self._open_work() * self._seconds_per_pass()
        self.remaining = max(0.0, rest - (self.estimated - self.marked))
        if self.moving:
            self._update()
        elif now and self.estimated - self.written >= LINE_INTERVAL:
            print(self.line(), file=sys.stderr, flush=True)
            self.written = self.estimated

    def line(self) -> str:
        """Return the whole line, such as 'layer rewinding [1/5 jobs] 00:12 elapsed'."""
        elapsed = tqdm.format_interval(self.estimated - self.began)
        counts = f"[{len(self.work) - len(self.open)}/{len(self.work)} jobs]"
        rest = self._rest()
        return f"{self.now or 'all'} {counts} {elapsed} elapsed{', ' if rest else ''}{rest}"

    def _tick(self) -> None:
        while not self.ended.wait(TICK):
            self._update()

    def _update(self) -> None:
        self.bar.n = len(self.work) - len(self.open)
        self.bar.set_description_str(self.now or "all", refresh=False)
        self.bar.set_postfix_str(self._rest(), refresh=True)

    def _rest(self) -> str:
        """Return the remaining time, less what has passed since it was estimated."""
        if not self.remaining:
            return ""
        since = time.monotonic() - self.estimated if self.moving else 0.0
        return f"~{duration(self.remaining - since)} remaining"

    def _open_work(self) -> float:
        return sum(self.work[job] for job in self.open)

    def _seconds_per_pass(self) -> float:
        """Average over the work done since the start; before that, in a terminal, an estimate."""
        done = self.to_do - self._open_work()
        if done > 0:
            return (self.marked - self.began) / done
        if self.open and self.moving:
            return self.speeds.of(self.open[0].run.config)
        return 0.0
