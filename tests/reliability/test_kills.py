"""SIGKILL at random moments: a rerun ends with the results of an uninterrupted command.

    python -m pytest -s -n 0 -m slow tests/reliability/test_kills.py     # 100 kills, or KILLS=n

The campaign kills every command of WORKS at seeded moments, reruns it, and compares all results
with those of an uninterrupted command, which a fresh interpreter made. It prints every kill.
"""

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.runs.run import Run
from tests.killing import LONGEST, REPOSITORY, Command, kill_holders

CONFIG = """
device: cpu
output_dir: runs
data: {name: glyphs, train_size: 200, test_size: 40, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 5, batch_size: 32, peak_epoch: 2}
rewinding: {epochs: all}
retraining: {epochs: 2, peak_epoch: 1}
flipping: {examples: 6, noise_copies: 2, reference_batch: 40, remaining: 100, max_neurons: 8}
dropout: {kind: example_tied, forget: [1, 3], forget_draws: 3}
gradient_distance: {epochs: [0, 3, 5], examples: 60}
planted: {examples: 2, reference: 6, others: 4, channels: 1, chosen: 1}
erasure: {examples: 4, reference: 20, ascent_steps: 10, fine_tuning_epochs: 1}
counterfactual: {trainings: 3}
"""
NUMBERS = {"FIRST_KILL": "0", "KILLS": "100"}  # environment variables: a part of the campaign
SETTLES = 20  # reruns until the children of a killed parent have ended


@dataclass(frozen=True)
class Work:
    """A command, the one whose results it reads, and the number of its kills among a hundred."""

    command: str
    after: str | None
    kills: int


WORKS = {
    "gradient accounting": Work("gradient_accounting.py config.yaml", None, 13),
    "layer rewinding": Work("layer_rewinding.py config.yaml", "gradient accounting", 10),
    "layer retraining": Work("layer_retraining.py config.yaml", "gradient accounting", 10),
    "neuron flipping": Work("neuron_flipping.py config.yaml", "gradient accounting", 10),
    "dropout": Work("example_tied_dropout.py config.yaml", None, 13),
    "gradient distance": Work("beyond/gradient_distance.py config.yaml", "gradient accounting", 6),
    "example scores": Work("beyond/example_scores.py config.yaml", "neuron flipping", 6),
    "erasure": Work("beyond/erasure.py config.yaml", "dropout", 6),
    "planted memorization": Work("beyond/planted_memorization.py config.yaml", "dropout", 4),
    "counterfactual": Work("beyond/counterfactual.py config.yaml", "gradient accounting", 6),
    "figures": Work("plot_results.py runs --format png", "neuron flipping", 8),
    "reproduce --jobs 2": Work(
        "reproduce.py config.yaml --jobs 2 seed=[0,1] experiments=[rewinding]", None, 8
    ),
}


# ---------------------------------------------------------------- results


def results(folder: Path) -> dict[str, object]:
    """Read all that a command left: the bytes of results, and the names of the other files."""
    found = {}
    for path in sorted(filter(Path.is_file, folder.glob("runs/**/*"))):
        name = str(path.relative_to(folder))
        if path.suffix == ".log":  # of a child process, appended to by each rerun
            continue
        found[name] = None
        if path.name == "erasure.csv":
            found[name] = without_seconds(path.read_text())
        elif path.suffix in (".csv", ".pdf", ".png", ".md", ".tex", ".yaml"):
            found[name] = path.read_bytes()
        elif path.name in ("summary.json", "report.json"):
            found[name] = without_origin(json.loads(path.read_text()))
        elif path.suffix == ".npz":
            with np.load(path) as file:
                found |= {f"{name}: {key}": file[key].tobytes() for key in file.files}
        elif path.parent.name == "checkpoints" and path.suffix == ".pt":
            state = torch.load(path, weights_only=True)["model"]
            found |= {f"{name}: {key}": value.numpy().tobytes() for key, value in state.items()}
    return found


def without_seconds(table: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(table)))
    assert all(row.pop("seconds") for row in rows)
    return rows


def without_origin(content: object) -> object:
    """Leave out when, for how long and with which commit a run was trained."""
    if isinstance(content, dict):
        origin = ("git_commit", "git_dirty", "started", "seconds")
        return {key: without_origin(value) for key, value in content.items() if key not in origin}
    return [without_origin(value) for value in content] if isinstance(content, list) else content


def half_written(folder: Path) -> list[str]:
    """Name the files that have a name but not their end; a figure is written in one piece."""
    ends = {".csv": b"\n", ".json": b"}\n", ".png": b"IEND\xaeB`\x82", ".pdf": b"%%EOF\n"}
    return [
        f"{path} is not whole"
        for path in filter(Path.is_file, folder.glob("runs/**/*"))
        if path.name != "claim.json" and not path.read_bytes().endswith(ends.get(path.suffix, b""))
    ]


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name, "absent") != expected.get(name, "absent")]


# ---------------------------------------------------------------- uninterrupted commands


@dataclass
class Uninterrupted:
    """Folder, results and seconds of each command without a kill; made once."""

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)
    expected: dict[str, dict[str, object]] = field(default_factory=dict)

    def copy_before(self, name: str, folder: Path) -> Path:
        """Make the folder that a command starts in."""
        if earlier := WORKS[name].after:
            self.complete(earlier)
            return shutil.copytree(self.folder(earlier), folder)
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG)
        return folder

    def folder(self, name: str) -> Path:
        return self.root / name.replace(" ", "_")

    def complete(self, name: str) -> None:
        """Run a command as a fresh interpreter, and time it as a forked process."""
        if name in self.expected:
            return
        folder = self.copy_before(name, self.folder(name))
        script, *arguments = WORKS[name].command.split()
        command = [sys.executable, str(REPOSITORY / script), *arguments]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST
        )
        assert done.returncode == 0, done.stderr
        self.expected[name] = results(folder)
        again = self.copy_before(name, folder.with_name(f"{folder.name}_again"))
        process = Command(again, script, *arguments)
        if name != "figures":  # which locks nothing
            process.wait_for_lock(again)
        status, error = process.finish()
        self.seconds[name] = time.monotonic() - process.began
        assert status == 0, error
        assert not differences(results(again), self.expected[name])
        shutil.rmtree(again)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


# ---------------------------------------------------------------- kills


def phase(name: str, folder: Path, expected: Iterable[str]) -> str:
    """Tell what a killed command was doing from the locks and tables that it left behind."""
    held = [path.parent for path in folder.rglob("claim.json")]
    if name == "figures":
        return "drawing"
    if any(not trained(directory) for directory in held):
        return "training"
    if held:
        return "measurement"
    tables = [name for name in expected if name.endswith(".csv") and "/seed" in name]
    if name.startswith("reproduce") and all((folder / table).exists() for table in tables):
        return "drawing"
    return "start or end"


def trained(directory: Path) -> bool:
    """Return whether a locked folder is a finished run, or lies in one as parts do."""
    run = next(
        (above for above in (directory, *directory.parents) if above.name.startswith("seed")), None
    )
    return run is None or ((run / "provenance.json").exists() and Run.at(run).finished)


def rerun(folder: Path, script: str, *arguments: str) -> None:
    """Run a command until it is done: children of a killed parent may still hold their runs."""
    for _ in range(SETTLES):
        status, error = Command(folder, script, *arguments).finish()
        if status == 0:
            return
        assert status in (1, 75), error
        assert "held by" in error or status == 75, error
    raise AssertionError(error)


def killed(name: str, number: int, work: Uninterrupted, tmp_path: Path) -> tuple[str, list[str]]:
    """Kill a command once, rerun it; return what the kill hit, and the files that differ."""
    work.complete(name)
    draw = random.Random(f"{name} {number}")
    moment, all_die = draw.random() * work.seconds[name], draw.random() < 0.5
    script, *arguments = WORKS[name].command.split()
    for attempt in range(6):
        folder = work.copy_before(name, tmp_path / f"{name}_{number}_{attempt}".replace(" ", "_"))
        process = Command(folder, script, *arguments)
        if name != "figures":
            process.wait_for_lock(folder)
        if process.kill_after(moment):
            break
        shutil.rmtree(folder)
        moment /= 2  # it was faster than when it was timed
    else:
        pytest.fail("it always ended before it could be killed")
    if all_die:
        kill_holders(folder)
    hit, different = phase(name, folder, work.expected[name]), half_written(folder)
    rerun(folder, script, *arguments)
    different += differences(results(folder), work.expected[name])
    if not different:
        shutil.rmtree(folder)
    return hit, different


def schedule(kills: int, first: int = 0) -> Iterator[tuple[str, int]]:
    """Spread kills over the commands by their shares, mixed so that a part is balanced too."""
    shares = [name for name, work in WORKS.items() for _ in range(work.kills)]
    random.Random(0).shuffle(shares)
    for number in range(first, kills):
        yield shares[number % len(shares)], number


def test_shares_are_a_hundred():
    assert Counter(name for name, _ in schedule(100)) == {n: w.kills for n, w in WORKS.items()}
    assert sum(work.kills for work in WORKS.values()) == 100


def test_differences_are_found(tmp_path):
    """A table with another byte, weights with another bit, a missing file and one too many."""
    runs = tmp_path / "runs" / "checkpoints"
    runs.mkdir(parents=True)
    weights = torch.zeros(3)
    (runs / "a.csv").write_text("1\n")
    torch.save({"model": {"w": weights}}, runs / "b.pt")
    before = results(tmp_path)
    assert not differences(results(tmp_path), before)
    (runs / "a.csv").write_text("2\n")
    weights[1] = 1e-30
    torch.save({"model": {"w": weights}}, runs / "b.pt")
    (runs / ".c.tmp").touch()
    names = [
        name.removeprefix("runs/checkpoints/") for name in differences(results(tmp_path), before)
    ]
    assert names == [".c.tmp", "a.csv", "b.pt: w"]
    shutil.rmtree(runs)
    assert len(differences(results(tmp_path), before)) == 3


def test_killed_once(uninterrupted, tmp_path):
    hit, different = killed("gradient accounting", 0, uninterrupted, tmp_path)
    assert not different, hit


@pytest.mark.timeout(7200)
@pytest.mark.slow(reason="a hundred kills, each with a rerun to the end: a quarter of an hour")
def test_campaign(uninterrupted, tmp_path, capsys):
    hits, different = Counter(), {}
    first, kills = (int(os.environ.get(key, default)) for key, default in NUMBERS.items())
    for name, number in schedule(kills, first):
        hit, files = killed(name, number, uninterrupted, tmp_path)
        hits[name, hit] += 1
        if files:
            different[name, number, hit] = files
        with capsys.disabled():
            print(f"{sum(hits.values()):4d} {name}: {hit}: {files or 'the same'}", flush=True)
    with capsys.disabled():
        for (name, hit), count in sorted(hits.items()):
            print(f"{name:24} {hit:14} {count:4d}")
    assert not different


@pytest.mark.slow(reason="twelve kills in a row: a minute")
def test_killed_again_and_again(uninterrupted, tmp_path):
    name = "reproduce --jobs 2"
    uninterrupted.complete(name)
    folder, moments = uninterrupted.copy_before(name, tmp_path / "folder"), random.Random(7)
    script, *arguments = WORKS[name].command.split()
    kills = 0
    for _ in range(12):
        kills += Command(folder, script, *arguments).kill_after(moments.uniform(0, 5))
        kill_holders(folder)
    assert kills > 3
    rerun(folder, script, *arguments)
    assert not differences(results(folder), uninterrupted.expected[name])
