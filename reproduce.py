"""The main job: everything that a configuration asks for, in order, for every run of its sweep.

    python reproduce.py                              # configs/quickstart.yaml, on embedded images
    python reproduce.py configs/small/mnist.yaml
    python reproduce.py CONFIG --time-budget 540     # stop cleanly after nine minutes; call again

Trains and accounts gradients, rewinds, retrains, flips neurons, trains with dropout (where
`dropout.kind` names one), and draws the figures. `experiments: [rewinding, flipping]` does less.
What is done is skipped, what was interrupted goes on: the same command, called again and again,
ends with the same results.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

import example_tied_dropout
import gradient_accounting
import layer_retraining
import layer_rewinding
import neuron_flipping
import plot_results
from engine.claims import claim
from engine.cli import Ending, make_parser, reporting_ends
from engine.config import load_configs
from engine.errors import RunFailed
from engine.runs import Run, without_dropout
from engine.settings import EXPERIMENTS, Config
from engine.stopping import OutOfTime, ending_on_signals, time_budget
from plotting.runs import find_families

QUICKSTART = Path(__file__).resolve().parent / "configs" / "quickstart.yaml"
ON_PLAIN_RUNS = {
    "rewinding": layer_rewinding,
    "retraining": layer_retraining,
    "flipping": neuron_flipping,
}


@dataclass(frozen=True)
class Job:
    """One script's work on one run."""

    script: ModuleType
    run: Run

    @property
    def name(self) -> str:
        return self.script.__name__.replace("_", " ")


def make_jobs(configs: Sequence[Config]) -> list[Job]:
    """Run by run, each script once; configurations that ask for the same work share it."""

    def wanted(config: Config) -> Iterator[tuple[ModuleType, Config]]:
        asked = EXPERIMENTS if config.experiments == "all" else config.experiments
        plain = without_dropout(config)
        yield gradient_accounting, plain
        for name in asked:
            if name in ON_PLAIN_RUNS:
                yield ON_PLAIN_RUNS[name], plain
        if "dropout" in asked and config.dropout.kind != "none":
            yield example_tied_dropout, example_tied_dropout.without_accounting(config)

    jobs = {}
    for config in configs:
        for script, own in wanted(config):
            run = Run.of(own)
            jobs.setdefault((script.__name__, run.directory), Job(script, run))
    return list(jobs.values())


def work(jobs: Sequence[Job], ending: Ending, wait: bool) -> Iterator[Job]:
    """Do every job, a line of results each, under one line of progress; yield what is done."""
    with tqdm(total=len(jobs), unit="job", dynamic_ncols=True) as bar:
        for job in jobs:
            bar.set_description(f"all, now {job.name}")
            trained = job.run.finished or job.script not in ON_PLAIN_RUNS.values()
            with ending.one_of_several(job.run.directory):
                if not trained:
                    raise RunFailed(f"no {job.name}, as the training did not come to its end")
                with claim(job.run.directory, wait):
                    result = job.script.main(job.run)
                bar.write(f"{job.name}: {result}  {job.run.directory}", file=sys.stdout)
                yield job
            bar.update()


def conclude(jobs: Sequence[Job], folder: Path, title: str) -> None:
    """What several runs show together: means over seeds, figures, tables, and the report."""
    flipped = [job.run for job in jobs if job.script is neuron_flipping]
    for result, place in neuron_flipping.conclude(flipped):
        print(f"{result}  {place}")
    directories = list(dict.fromkeys(job.run.directory for job in jobs))
    if directories:
        *_, summary, report = plot_results.present(find_families(directories), folder, title=title)
        print(summary, report, sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    with reporting_ends() as ending, ending_on_signals():
        given = _parse(arguments)
        device = [f"device={given.device}"] if given.device else []
        configs = load_configs(given.config, [*given.overrides, *device])
        jobs = make_jobs(configs)
        if given.dry_run:
            for job in jobs:
                print(f"{job.name}: {job.script.plan(job.run)}  {job.run.directory}")
            return 0
        done = []
        try:
            with time_budget(given.time_budget):
                for job in work(jobs, ending, given.wait):
                    done.append(job)
        except OutOfTime:
            print(f"out of time: {len(jobs) - len(done)} of {len(jobs)} jobs left; ", end="")
            print("the same command goes on")
            return ending.status
        conclude(done, report_folder(configs, given.config), configs[0].name)
    return ending.status


def report_folder(configs: Sequence[Config], config_file: str) -> Path:
    """A report is about all runs of a configuration: it lies in a folder with its name."""
    name = f"report-{Path(config_file).stem}".encode()[:200].decode(errors="ignore")
    return Path(configs[0].output_dir) / name


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, default_config=str(QUICKSTART))
    parser.add_argument(
        "--time-budget", type=float, metavar="SECONDS", help="stop cleanly after so long"
    )
    given = parser.parse_intermixed_args(arguments)
    if "=" in given.config and not Path(given.config).exists():  # the first override came first
        given.config, given.overrides = str(QUICKSTART), [given.config, *given.overrides]
    return given


if __name__ == "__main__":
    sys.exit(main())
