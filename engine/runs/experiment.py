"""Experiments: one declaration of what a script measures, what that takes, and what it leaves."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.schema import Config
from engine.runs.files import megabytes
from engine.runs.identity import title, without_dropout
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import ResultTable


@dataclass(frozen=True)
class Experiment:
    """A script's measurement of one run, for the command line, sweeps, estimates and figures.

    `key` names it in `experiments:`; the configuration's section of that name holds its settings.
    """

    key: str
    command: str  # such as "python layer_rewinding.py"
    section: str  # of the paper; empty for what the paper does not have
    question: str  # that the measurement answers
    tables: tuple[ResultTable, ...]
    figures: tuple[str, ...]  # modules with a tuple FIGURES
    measure: Callable[[Run], None]  # everything that is not measured yet
    summarize: Callable[[Run], str]  # the results in one line
    passes: Callable[[Run], float]  # images that remain to go through the network
    disk: Callable[[Run], float] = lambda run: 1e6  # bytes
    measurements: Callable[[Run], Sequence[Measurement]] = lambda run: ()
    epochs_read: Callable[[Config], Sequence[int]] = lambda config: ()  # besides the last
    training: Callable[[Config], Config] = without_dropout  # what a configuration trains
    shared: bool = False  # several processes may measure one run at the same time
    trains: bool = False  # or reads runs that gradient_accounting.py trained
    accounts: Callable[[Config], str] = lambda config: ""  # a table that the training writes
    conclude: Callable[[Sequence[Run]], Iterable[tuple[str, Path]]] = lambda runs: ()

    @property
    def name(self) -> str:
        """The script's name in words."""
        script = self.command.split()[-1].removesuffix(".py")
        return script.rpartition(".")[2].replace("_", " ")

    @property
    def title(self) -> str:
        return self.name.capitalize()

    def main(self, run: Run) -> str:
        """Measure one run unless that is done; return its results in one line."""
        if not self.trains:
            run.require_finished()
        if run.finished and not self.shared:
            for measurement in self.measurements(run):
                measurement.restore()
        if self.trains or not self.is_done(run):
            self.measure(run)
        return self.summarize(run)

    def is_done(self, run: Run) -> bool:
        trained = run.finished
        if self.trains:
            trained = trained and not run.missing_results(self.accounts(run.config))
        return trained and all(measurement.finished for measurement in self.measurements(run))

    def plan(self, run: Run) -> str:
        """Return the state of a run's measurement and the disk that it takes."""
        if self.trains:
            state = run.state
            if self.measurements(run):
                state += ", measured" if self.is_done(run) else ", to measure"
        elif not run.finished:
            state = f"to do after its training, which is {run.state}"
        else:
            state = "finished" if self.is_done(run) else "to do"
        return f"{title(run.config)}: {state}, {megabytes(self.disk(run))}"
