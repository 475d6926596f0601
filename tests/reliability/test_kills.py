"""kill -9 at random moments: every script, rerun, ends with the results of an uninterrupted one.

Moments are drawn from seeds, within the time that the script worked for when nobody disturbed it.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
device: cpu
output_dir: runs
data: {name: glyphs, train_size: 400, test_size: 100, noise_rate: 0.2}
model: {name: resnet9, width: 0.1}
train: {epochs: 6, batch_size: 32, peak_epoch: 2}
rewinding: {epochs: all}
retraining: {epochs: 2, peak_epoch: 1}
flipping: {examples: 8, noise_copies: 2, reference_batch: 40, remaining: 100, max_neurons: 8}
dropout: {kind: example_tied, forget: [1, 3], forget_draws: 3}
"""
# Each script, and the one whose results it reads.
SCRIPTS = {
    "gradient_accounting": None,
    "layer_rewinding": "gradient_accounting",
    "layer_retraining": "gradient_accounting",
    "neuron_flipping": "gradient_accounting",
    "example_tied_dropout": None,
    "plot_results": "layer_rewinding",
    "reproduce": None,
}


def start(script: str, folder: Path) -> subprocess.Popen:
    argument = "runs" if script == "plot_results" else "config.yaml"
    command = [sys.executable, str(REPOSITORY / f"{script}.py"), argument]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(script: str, folder: Path) -> None:
    process = start(script, folder)
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error


def at_work(script: str, process: subprocess.Popen, folder: Path) -> None:
    """Wait until the script has locked a run; drawing figures locks nothing."""
    while script != "plot_results" and not list(folder.rglob("claim.json")):
        if process.poll() is not None:
            return
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, object]:
    """Read the bytes of every table and figure, and every bit of weights and records."""
    found = {}
    for path in sorted(folder.glob("runs/**/*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".csv", ".pdf", ".png", ".md", ".tex"):
            found[name] = path.read_bytes()
        elif path.suffix == ".npz":
            with np.load(path) as file:
                found |= {f"{name}: {key}": file[key].tobytes() for key in file.files}
        elif path.parent.name == "checkpoints":
            state = torch.load(path, weights_only=True)["model"]
            found |= {f"{name}: {key}": value.numpy().tobytes() for key, value in state.items()}
    return found


@dataclass
class Undisturbed:
    """Results and working time of each script without a kill; made once."""

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def before(self, script: str) -> Path:
        """The folder that a script starts in."""
        if earlier := SCRIPTS[script]:
            return self.after(earlier)
        folder = self.root / "new"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(CONFIG)
        return folder

    def after(self, script: str) -> Path:
        folder = self.root / script
        if script not in self.seconds:
            shutil.copytree(self.before(script), folder)
            process = start(script, folder)
            at_work(script, process, folder)
            began = time.monotonic()
            _, error = process.communicate(timeout=280)
            assert process.returncode == 0, error
            self.seconds[script] = time.monotonic() - began
        return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def kill(script: str, folder: Path, seconds: float) -> bool:
    """Start a script and kill it after it worked for some seconds; return whether it still ran."""
    process = start(script, folder)
    try:
        at_work(script, process, folder)
        time.sleep(seconds)
    finally:
        process.kill()
    process.stderr.close()
    return process.wait() == -signal.SIGKILL


def check_kill(script: str, seed: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    expected = contents(undisturbed.after(script))
    moment = random.Random(f"{script} {seed}").random() * undisturbed.seconds[script]
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        shutil.copytree(undisturbed.before(script), folder)
        if kill(script, folder, moment):
            break
        moment /= 2  # it was faster than when it was timed
    else:
        pytest.fail("it always ended before it could be killed")
    finish(script, folder)
    assert contents(folder) == expected
    left = [
        path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == "claim.json"
    ]
    assert not left


def test_killed_once(undisturbed, tmp_path):
    check_kill("gradient_accounting", 0, undisturbed, tmp_path)


@pytest.mark.slow(reason="35 kills, each with a restart to the end: some minutes")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_at_a_random_moment(undisturbed, tmp_path, script, seed):
    check_kill(script, seed, undisturbed, tmp_path)


@pytest.mark.slow(reason="twelve kills in a row: a minute")
def test_killed_again_and_again(undisturbed, tmp_path):
    folder = tmp_path / "folder"
    expected = contents(undisturbed.after("reproduce"))
    shutil.copytree(undisturbed.before("reproduce"), folder)
    moments = random.Random(7)
    kills = sum(kill("reproduce", folder, moments.uniform(0, 3)) for _ in range(12))
    assert kills > 3
    finish("reproduce", folder)
    assert contents(folder) == expected
