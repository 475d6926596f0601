"""Jobs of a sweep: one script's work on one run each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import RunFailed, UserError
from engine.runs.experiment import Experiment
from engine.runs.run import Run


@dataclass(frozen=True)
class Job:
    """One script's work on one run."""

    experiment: Experiment
    run: Run

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def done(self) -> bool:
        try:
            return self.experiment.is_done(self.run)
        except UserError:  # a damaged file; the job that reads it reports it
            return False

    def do(self) -> str:
        """Do the work that is not done yet; return a line that ends with the run's directory."""
        if not self.experiment.trains and not self.run.finished:
            raise RunFailed(f"{self.name} skipped: the training did not finish")
        return f"{self.name}: {self.experiment.main(self.run)}  {self.run.directory}"


def by_run(jobs: Sequence[Job]) -> dict[Path, list[Job]]:
    """Group the jobs by their run's directory, in order."""
    shares: dict[Path, list[Job]] = {}
    for job in jobs:
        shares.setdefault(job.run.directory, []).append(job)
    return shares


def are_done(jobs: Sequence[Job]) -> bool:
    return all(job.done for job in jobs)
