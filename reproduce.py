"""The main job: everything that a configuration asks for, in order, for every run of its sweep.

    python reproduce.py                              # configs/quickstart.yaml, on embedded images
    python reproduce.py configs/small/mnist.yaml
    python reproduce.py CONFIG --time-budget 540     # stop cleanly after nine minutes; call again
    python reproduce.py CONFIG --jobs 8 --gpus 0,1,2,3   # runs side by side, two on a GPU
    python reproduce.py CONFIG --slurm slurm.time=60     # each run a job of the cluster

Trains and accounts gradients, rewinds, retrains, flips neurons, trains with dropout (where
`dropout.kind` names one), and draws the figures. `experiments: [rewinding, flipping]` does less;
`experiments: [dropout]` is what example_tied_dropout.py does, and nothing else.
What is done is skipped, what was interrupted goes on: the same command, called again and again,
ends with the same results. Called on several machines with a common file system, it shares the runs
among them, and whoever ends last draws the figures.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import plot_results
from data import expanded
from engine.config.load import load_configs
from engine.config.schema import OF_THE_PAPER, Config
from engine.errors import UserError
from engine.launch import slurm
from engine.launch.cli import Ending, announce, make_parser, reporting_ends
from engine.launch.experiments import load_experiments
from engine.launch.jobs import Job, are_done, by_run
from engine.launch.local import LeftToOthers, at_once, collect, foresee, one_after_another
from engine.launch.processes import Slot, end_with_parent, make_slots
from engine.runs import provenance
from engine.runs.experiment import Experiment
from engine.runs.run import Run, each_once
from engine.runs.stopping import OutOfTime, ending_on_signals, time_budget
from engine.training.build import load_split
from plotting.families import find_families

QUICKSTART = Path(__file__).resolve().parent / "configs" / "quickstart.yaml"


def make_jobs(configs: Sequence[Config]) -> list[Job]:
    """Run by run, each experiment once; configurations that ask for the same work share it."""
    known = load_experiments()

    def wanted(config: Config) -> Iterator[Experiment]:
        asked = OF_THE_PAPER if config.experiments == "all" else config.experiments
        if set(asked) != {"dropout"}:
            yield known["gradients"]
        elif config.dropout.kind == "none":
            yield known["dropout"]
        for name in asked:
            if name != "dropout" or config.dropout.kind != "none":
                yield known[name]

    jobs, runs = {}, []
    for config in configs:
        for experiment in wanted(config):
            runs.append(run := Run.of(experiment.training(config)))
            require_weights(experiment, run)
            jobs.setdefault((experiment.key, run.directory), Job(experiment, run))
    each_once(runs)
    return list(jobs.values())


def require_weights(experiment: Experiment, run: Run) -> None:
    """Refuse, before anything is trained, to measure on epochs that the training will not keep."""
    missing = [epoch for epoch in experiment.epochs_read(run.config) if not run.kept(epoch)]
    if missing and not run.finished:
        kept = list(run.config.checkpoints.keep)
        script = experiment.name.replace(" ", "_")
        raise UserError(
            f"checkpoints.keep: {kept} is not enough: {script} reads the weights of "
            f"epochs {missing}; keep them, or name in `experiments` what is to be done without it"
        )


def only(jobs: Sequence[Job], directory: Path) -> list[Job]:
    chosen = [job for job in jobs if job.run.directory.resolve() == directory.resolve()]
    if not chosen:
        raise UserError(f"command line: --only: {directory} is not a run of this configuration")
    return chosen


def command(given: argparse.Namespace, *more: str) -> list[str]:
    """Return this command without the options that spread its work."""
    options = [f"--{name}" for name in ("wait", "strict") if getattr(given, name)]
    return [sys.executable, str(Path(__file__)), given.config, *given.overrides, *options, *more]


def command_for(run: Path, jobs: Sequence[Job], given: argparse.Namespace) -> list[str]:
    """Return the command for one run, which resolves `auto` there as it was resolved here."""
    config = next(job.run.config for job in jobs if job.run.directory == run)
    settled = {"precision": config.precision, "train.compile": str(config.train.compile).lower()}
    keys = tuple(f"{prefix}{key}=" for key in settled for prefix in ("", "sweep."))
    kept = [override for override in given.overrides if not override.startswith(keys)]
    own = argparse.Namespace(**vars(given) | {"overrides": kept})
    own.overrides = [*kept, *(f"{key}={value}" for key, value in settled.items())]
    return command(own, "--only", str(run))


def work(
    jobs: Sequence[Job], configs: Sequence[Config], given: argparse.Namespace, ending: Ending
) -> Iterator[Job]:
    """Do every job, one after another or side by side; yield what is done."""
    if given.collect:
        return collect(jobs, ending)
    if not given.jobs and not given.gpus:
        return one_after_another(jobs, ending, given.wait)
    fetch_data(configs)
    slots = places(jobs, configs, given)
    return at_once(jobs, slots, lambda run: command_for(run, jobs, given), ending)


def places(jobs: Sequence[Job], configs: Sequence[Config], given: argparse.Namespace) -> list[Slot]:
    """Where runs would be worked on at the same time."""
    if given.slurm:
        settings = configs[0].slurm
        return [Slot(None, settings.cpus)] * min(settings.parallel, len(by_run(jobs)))
    return make_slots(given.jobs, given.gpus)


def fetch_data(configs: Sequence[Config]) -> None:
    """Before many processes need them: no two download the same, and what is missing shows now."""
    for config in {config.data: config for config in configs}.values():
        load_split(config)


def submit(jobs: Sequence[Job], configs: Sequence[Config], given: argparse.Namespace) -> None:
    """Give each run that is not done to the cluster, and the collecting of all of them."""
    runs = [run for run, share in by_run(jobs).items() if not are_done(share)]
    if not runs:
        print("nothing to submit: all is done; --collect shows it")
        return
    fetch_data(configs)
    given.wait = True  # a job that went on elsewhere may meet the claim that it left behind
    settings = configs[0].slurm
    folder = folder_of("slurm", configs, given.config)
    commands = [command_for(run, jobs, given) for run in runs]
    handles = slurm.submit(commands, folder, settings)
    for handle, run in zip(handles, runs):
        print(f"job {handle.job_id}  {run}")
    last = slurm.submit_after(handles, command(given, "--collect"), folder, settings)
    print(f"job {last.job_id}, when these have ended, collects the results; logs  {folder}")


def conclude(jobs: Sequence[Job], folder: Path, title: str) -> None:
    """What several runs show together: means over seeds, figures, tables, and the report."""
    for experiment in dict.fromkeys(job.experiment for job in jobs):
        runs = [job.run for job in jobs if job.experiment is experiment]
        for result, place in experiment.conclude(runs):
            print(f"{result}  {place}")
    directories = list(dict.fromkeys(job.run.directory for job in jobs))
    if directories:
        *_, summary, report = plot_results.present(find_families(directories), folder, title=title)
        print(summary, report, sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    with reporting_ends() as ending, ending_on_signals():
        given = parse(arguments)
        configs = load_configs(given.config, given.overrides)
        jobs = make_jobs(configs)
        if given.only:
            end_with_parent()
            jobs = only(jobs, given.only)
        announce([job.run for job in jobs])
        if given.dry_run:
            for line in foresee(jobs, places(jobs, configs, given)):
                print(line, flush=True)
            return 0
        if given.slurm:
            submit(jobs, configs, given)
            return 0
        done = []
        try:
            with time_budget(given.time_budget), provenance.strict(given.strict):
                for job in work(jobs, configs, given, ending):
                    done.append(job)
        except OutOfTime:
            print(f"out of time: {len(jobs) - len(done)} of {len(jobs)} jobs left; ", end="")
            print("the same command goes on")
            return ending.status
        except LeftToOthers:
            print("other processes work on what is left; whoever ends last draws the figures")
            return ending.status
        if not given.only:
            folder = folder_of("report", configs, given.config)
            conclude(sorted(done, key=jobs.index), folder, configs[0].name)
    return ending.status


def folder_of(what: str, configs: Sequence[Config], config_file: str) -> Path:
    """What is about all runs of a configuration lies in a folder with its name."""
    name = os.fsencode(f"{what}-{Path(config_file).stem}")[:200].decode(errors="ignore")
    name = "".join(char if char.isprintable() else "_" for char in name)
    return expanded(configs[0].output_dir) / name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, [""], default_config=str(QUICKSTART))
    parser.add_argument(
        "--time-budget", type=_seconds, metavar="SECONDS", help="stop cleanly after so long"
    )
    parser.add_argument("--gpus", type=_gpus, metavar="0,1,...", help="where --jobs compute")
    spread = parser.add_mutually_exclusive_group()
    spread.add_argument("--jobs", type=_count, metavar="N", help="so many runs side by side")
    spread.add_argument("--slurm", action="store_true", help="each run as a job of the cluster")
    spread.add_argument("--collect", action="store_true", help="only gather what is done")
    spread.add_argument("--only", type=Path, metavar="RUN", help="only the run of this directory")
    given = parser.parse_intermixed_args(arguments)
    if "=" in given.config and not Path(given.config).exists():  # the first override came first
        given.config, given.overrides = str(QUICKSTART), [given.config, *given.overrides]
    if Path(given.config).is_dir():
        raise UserError(f"{given.config}: is a folder; reproduce.py takes a configuration's file")
    if given.device:
        given.overrides = [*given.overrides, f"device={given.device}"]
    return given


def _seconds(written: str) -> float:
    try:
        seconds = float(written)
    except ValueError:
        seconds = math.nan
    if math.isnan(seconds):
        raise argparse.ArgumentTypeError(f"{written!r} is not a number of seconds, such as 540")
    return seconds


def _count(written: str) -> int:
    if not written.isdecimal() or int(written) < 1:
        raise argparse.ArgumentTypeError(f"{written!r} is not a whole number, 1 or more")
    return int(written)


def _gpus(written: str) -> list[str]:
    """Numbers, or names as `nvidia-smi -L` gives them; a MIG instance has no number."""
    if not re.fullmatch(r"(\d+|(GPU|MIG)-[\w/-]+)(,(\d+|(GPU|MIG)-[\w/-]+))*", written):
        raise argparse.ArgumentTypeError(
            f"{written!r} is not a list of numbers or names, such as 0,1 or MIG-1a2b,MIG-3c4d"
        )
    return written.split(",")


if __name__ == "__main__":
    sys.exit(main())
