"""Headers of configuration files: what they say of disk and time, and what is known of both."""

import json
import re
import shlex
from collections import defaultdict
from functools import cache
from pathlib import Path

import reproduce
from engine.config.load import load_configs
from engine.config.schema import Config
from engine.launch.cli import find_runs
from engine.launch.experiments import load_experiments
from engine.launch.jobs import Job
from engine.runs.identity import deciding_settings

REPOSITORY = Path(__file__).resolve().parents[1]
BYTES = {"MB": 1e6, "GB": 1e9}
SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600}


def header_of(path: Path) -> str:
    """Return the comment that a configuration begins with, its lines joined."""
    head = path.read_text(encoding="utf-8").partition("\nname:")[0]
    return re.sub(r"\n# (?!  )", " ", head)


@cache
def jobs_of(path: Path) -> list[Job]:
    """Return the jobs of all commands in the header; a file of one's own is taken for CIFAR-10."""
    jobs = {}
    for line in re.findall(r"^#   (python .*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        words = shlex.split(line.partition("  #")[0])
        overrides = [w for w in words if "=" in w and not w.startswith("data.root=")]
        if load_configs(path, overrides)[0].data.name == "npz":
            overrides += ["data.name=cifar10", "data.path=null"]
        for job in _jobs(path, words, overrides):
            jobs.setdefault((job.experiment.key, job.run.directory), job)
    return list(jobs.values())


def _jobs(path: Path, words: list[str], overrides: list[str]) -> list[Job]:
    if words[1] == "reproduce.py":
        return reproduce.make_jobs(load_configs(path, overrides))
    script = " ".join(words[: 3 if words[1] == "-m" else 2])
    known = {experiment.command: experiment for experiment in load_experiments().values()}
    if (experiment := known.get(script)) is None:  # it only draws
        return []
    return [Job(experiment, r) for r in find_runs(str(path), overrides, experiment.training)]


def disk_of(jobs: list[Job]) -> list[float]:
    """Return the bytes of each run, as a dry run estimates them."""
    disk = defaultdict(float)
    for job in jobs:
        disk[job.run.directory] += job.experiment.disk(job.run)
    return list(disk.values())


@cache
def recorded_trainings() -> tuple[tuple[dict, float], ...]:
    """Return settings and seconds of the trainings whose results are kept."""
    found = {}
    for path in (REPOSITORY / "results").rglob("provenance.json"):
        for place, entry in json.loads(path.read_text(encoding="utf-8")).items():
            if "settings" in entry and entry.get("seconds"):
                found[place, entry["seconds"]] = entry["settings"], entry["seconds"]
    return tuple(found.values())


def recorded_seconds(jobs: list[Job]) -> list[float]:
    """Return the seconds of kept trainings that a configuration asks for, of any seed."""
    wanted = [_alike(settings_of(job.run.config)) for job in jobs]
    return sorted({s for settings, s in recorded_trainings() if _alike(settings) in wanted})


def settings_of(config: Config) -> dict:
    return deciding_settings(config, contents=False)


def _alike(settings: dict) -> dict:
    """Leave out the seed, tf32 (auto's choice on a GPU) and contents of files.

    CIFAR-10 is the file of the kept results.
    """
    everything = settings.get("data.train_size") == 50_000
    left_out = {"seed", *(["data.train_size"] if everything else [])}
    left_out |= {"precision"} if settings.get("precision") == "tf32" else set()
    kept = {k: v for k, v in settings.items() if k not in left_out and not k.endswith(".sha256")}
    return kept | {"data.name": {"npz": "cifar10"}.get(kept["data.name"], kept["data.name"])}


def numbers(text: str, units: dict[str, float]) -> list[float]:
    """Return the amounts in a text such as '2 to 3.5 minutes', in the smallest unit."""
    pattern = rf"([\d.]+)(?: to ([\d.]+))? ({'|'.join(units)})"
    found = re.findall(pattern, text)
    return [float(n) * units[unit] for *amounts, unit in found for n in amounts if n]
