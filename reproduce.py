"""Run everything that a configuration asks for, in order, for every run of its sweep.

    python reproduce.py                              # configs/quickstart.yaml, on embedded images
    python reproduce.py configs/small/mnist.yaml
    python reproduce.py CONFIG --time-budget 540     # stop after nine minutes; rerun to resume
    python reproduce.py CONFIG --jobs 8 --gpus 0,1,2,3   # runs in parallel, two per GPU
    python reproduce.py CONFIG --slurm slurm.time=60     # each run as a job of the cluster

Trains and accounts gradients, rewinds, retrains, flips neurons, trains with dropout (where
`dropout.kind` names one), and draws the figures. `experiments: [rewinding, flipping]` does less;
`experiments: [dropout]` does only what example_tied_dropout.py does.
Skips finished work and resumes interrupted work; the results are the same as without interruption.
Started on several machines with a common file system, it distributes the runs among them, and the
last process to finish draws the figures.

The report lies in OUTPUT_DIR/report-CONFIG[-OVERRIDES]; a report of other runs is never replaced.
Exit status: 0 all done, 1 a run failed, 2 the input is wrong, 75 work remains (the time budget is
spent, or other processes work on the remaining runs): rerun the same command to resume.
"""

import argparse
import hashlib
import itertools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import plot_results
from data import expanded
from engine.config.load import load_configs
from engine.config.schema import OF_THE_PAPER, Config
from engine.errors import UserError
from engine.launch import slurm
from engine.launch.cli import (
    UNFINISHED,
    Ending,
    announce,
    make_parser,
    reporting_ends,
    require_output,
)
from engine.launch.experiments import load_experiments
from engine.launch.jobs import Job, are_done, by_run
from engine.launch.local import LeftToOthers, at_once, collect, foresee, one_after_another
from engine.launch.processes import Slot, end_with_parent, make_slots
from engine.runs import files, provenance
from engine.runs.experiment import Experiment
from engine.runs.identity import without_accounting
from engine.runs.locking import known_holder
from engine.runs.run import Run, each_once
from engine.runs.stopping import OutOfTime, ending_on_signals, time_budget
from engine.training.build import load_split
from plotting.families import find_families, plotting_overrides

QUICKSTART = Path(__file__).resolve().parent / "configs" / "quickstart.yaml"
REPORTED = "report.json"  # in a report's folder: the runs that it is about
WITHOUT_RESULT = re.compile(r"(output_dir|device|data\.root|slurm\.\w+)=")
LONGEST_NAME = 150  # bytes


def make_jobs(configs: Sequence[Config]) -> list[Job]:
    """List the jobs by run, each once, however many configurations ask for it."""
    known = load_experiments()

    def wanted(config: Config) -> Iterator[Experiment]:
        asked = OF_THE_PAPER if config.experiments == "all" else config.experiments
        own = [name for name in asked if known[name].training is without_accounting]
        if others := len(own) < len(asked) or not asked:
            yield known["gradients"]
        for name in asked:
            if name == "dropout" and config.dropout.kind == "none" and others:
                continue
            if name in own:
                yield known["dropout"]  # which trains their run
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
    """Refuse, before any training, measurements of epochs whose weights will not be kept."""
    missing = [epoch for epoch in experiment.epochs_read(run.config) if not run.kept(epoch)]
    if missing and not run.finished:
        kept = list(run.config.checkpoints.keep)
        script = experiment.name.replace(" ", "_")
        raise UserError(
            f"checkpoints.keep: {kept} is not enough: {script} reads the weights of "
            f"epochs {missing}; keep them, or leave this measurement out of `experiments`"
        )


def only(jobs: Sequence[Job], directory: Path) -> list[Job]:
    """Return the jobs of the run in one directory."""
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
    keys = ("precision=", "sweep.precision=")
    kept = [override for override in given.overrides if not override.startswith(keys)]
    kept.append(f"precision={config.precision}")
    own = argparse.Namespace(**vars(given) | {"overrides": kept})
    return command(own, "--only", str(run))


def work(
    jobs: Sequence[Job], configs: Sequence[Config], given: argparse.Namespace, ending: Ending
) -> Iterator[Job]:
    """Do every job, in turn or in parallel; yield the finished ones."""
    if given.collect:
        return collect(jobs, ending)
    if not given.jobs and not given.gpus:
        return one_after_another(jobs, ending, given.wait)
    fetch_data(configs)
    slots = places(jobs, configs, given)
    return at_once(jobs, slots, lambda run: command_for(run, jobs, given), ending)


def places(jobs: Sequence[Job], configs: Sequence[Config], given: argparse.Namespace) -> list[Slot]:
    """Return the places where runs are worked on in parallel."""
    if given.slurm:
        settings = configs[0].slurm
        return [Slot(None, settings.cpus)] * min(settings.parallel, len(by_run(jobs)))
    return make_slots(given.jobs, given.gpus)


def fetch_data(configs: Sequence[Config]) -> None:
    """Load all data once, so that parallel processes download nothing and mistakes show early."""
    for config in {config.data: config for config in configs}.values():
        load_split(config)


def submit(jobs: Sequence[Job], configs: Sequence[Config], given: argparse.Namespace) -> None:
    """Submit each unfinished run to the cluster, and a last job that collects all results."""
    runs = [run for run, share in by_run(jobs).items() if not are_done(share)]
    if not runs:
        print("nothing to submit: all runs are finished; --collect prints the results")
        return
    for run, holder in [(run, known_holder(run)) for run in runs]:
        if holder:
            runs.remove(run)
            print(f"not submitted: locked by {holder}  {run}")
    if not runs:
        return
    fetch_data(configs)
    given.wait = True  # a requeued job may meet its own lock from another machine
    settings = configs[0].slurm
    folder = folder_of(configs[0], ["slurm", Path(given.config).stem])
    commands = [command_for(run, jobs, given) for run in runs]
    handles = slurm.submit(commands, folder, settings)
    for handle, run in zip(handles, runs):
        print(f"job {handle.job_id}  {run}")
    last = slurm.submit_after(handles, command(given, "--collect"), folder, settings)
    print(f"job {last.job_id}: collects the results after all others; logs  {folder}")


def require_settled_precision(configs: Sequence[Config]) -> None:
    """Refuse to decide here in what jobs with a GPU compute, if this machine has none."""
    elsewhere = configs[0].slurm.gpus and not torch.cuda.is_available()
    if elsewhere and any(c.precision == "auto" and c.device != "cpu" for c in configs):
        raise UserError(
            "precision: auto is not allowed: it is decided on the machine that submits, and this "
            "one has no GPU, unlike the jobs; name tf32, bf16 or fp32, or slurm.gpus=0"
        )


def conclude(jobs: Sequence[Job], folder: Path, title: str) -> None:
    """Summarize all runs: means over seeds, figures, tables, and the report."""
    for experiment in dict.fromkeys(job.experiment for job in jobs):
        runs = [job.run for job in jobs if job.experiment is experiment]
        for result, place in experiment.conclude(runs):
            print(f"{result}  {place}")
    directories = list(dict.fromkeys(job.run.directory for job in jobs))
    if directories:
        families = find_families(directories, plotting_overrides(jobs[0].run.config))
        print("drawing figures", file=sys.stderr, flush=True)
        *_, summary, report = plot_results.present(families, folder, title=title)
        print(summary, report, sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    with reporting_ends() as ending, ending_on_signals():
        given = parse(arguments)
        configs = load_configs(given.config, given.overrides)
        jobs = make_jobs(configs)
        require_output(configs[0])
        if given.only:
            end_with_parent()
            jobs = only(jobs, given.only)
        announce([job.run for job in jobs])
        if given.slurm:
            require_settled_precision(configs)
        if given.dry_run:
            for line in foresee(jobs, places(jobs, configs, given)):
                print(line, flush=True)
            return 0
        if given.slurm:
            submit(jobs, configs, given)
            return 0
        done, ending.several = [], len(by_run(jobs)) > 1
        try:
            with time_budget(given.time_budget), provenance.strict(given.strict):
                for job in work(jobs, configs, given, ending):
                    done.append(job)
        except OutOfTime:
            print(
                f"out of time: {len(jobs) - len(done)} of {len(jobs)} jobs remain; rerun to resume"
            )
            return ending.status or UNFINISHED
        except LeftToOthers:
            print(
                "other processes work on the remaining runs; the last to finish draws the figures"
            )
            return ending.status or UNFINISHED
        if ending.refused:
            print("no figures: mend the runs that are named above, then rerun", file=sys.stderr)
        elif not given.only:
            overrides = describe_overrides(given.overrides)
            folder = folder_of(configs[0], ["report", Path(given.config).stem, *overrides])
            if done:
                folder = report_folder(folder, jobs)
            title = ", ".join([configs[0].name, *overrides])
            conclude(sorted(done, key=jobs.index), folder, title)
    return ending.status


def folder_of(config: Config, parts: Sequence[str]) -> Path:
    """Name a folder for all runs of a command, below the folder of the runs."""
    name = re.sub(r"[^\w.=-]+", "_", "-".join(parts))
    name = name.encode(errors="replace")[:LONGEST_NAME].decode(errors="ignore")
    return expanded(config.output_dir) / name


def describe_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides in one order, without those that change no result."""
    return sorted(o for o in overrides if not WITHOUT_RESULT.match(o))


def report_folder(folder: Path, jobs: Sequence[Job]) -> Path:
    """Return the folder, or one with a digest in its name if it holds a report of other runs.

    A report is replaced by one of the same runs, or of the same runs and more.
    """
    runs = sorted({"/".join(job.run.directory.parts[-2:]) for job in jobs})
    if not _holds_only(folder, runs):
        digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:8]
        folder = folder.with_name(f"{folder.name}-{digest}")
    files.update_json(folder / REPORTED, {"runs": runs})
    return folder


def _holds_only(folder: Path, runs: Sequence[str]) -> bool:
    if not (folder / REPORTED).exists():
        return not (folder / "summary.json").exists()
    try:
        before = files.read_json(folder / REPORTED).get("runs")
    except UserError:  # damaged
        return False
    return isinstance(before, list) and set(map(str, before)) <= set(runs)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; without a configuration, take the quickstart's."""
    parser = make_parser(__doc__, [""], default_config=str(QUICKSTART))
    parser.add_argument(
        "--time-budget", type=_seconds, metavar="SECONDS", help="stop cleanly after this time"
    )
    parser.add_argument("--gpus", type=_gpus, metavar="0,1,...", help="GPUs for --jobs")
    spread = parser.add_mutually_exclusive_group()
    spread.add_argument("--jobs", type=_count, metavar="N", help="number of runs in parallel")
    spread.add_argument("--slurm", action="store_true", help="each run as a job of the cluster")
    spread.add_argument(
        "--collect", action="store_true", help="only print and plot finished results"
    )
    spread.add_argument("--only", type=Path, metavar="RUN", help="only the run of this directory")
    given = parser.parse_intermixed_args(arguments)
    for way, option in itertools.product(("slurm", "collect"), ("gpus", "time-budget")):
        if getattr(given, way) and getattr(given, option.replace("-", "_")) is not None:
            parser.error(f"argument --{option}: not allowed with argument --{way}")
    if "=" in given.config and not Path(given.config).exists():  # the first override came first
        given.config, given.overrides = str(QUICKSTART), [given.config, *given.overrides]
    if Path(given.config).is_dir():
        raise UserError(f"{given.config}: is a folder; reproduce.py takes a configuration file")
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
