"""Fixtures that several test files share."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import gradient_accounting
import plot_results
from engine.config.load import load_configs
from engine.runs.run import Run
from plotting.families import find_families

TINY = """
name: tiny
device: cpu
data: {name: glyphs, train_size: 150, test_size: 40, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 3, batch_size: 32, peak_epoch: 1}
"""


def pytest_collection_modifyitems(items):
    """Skip what this machine has no means for, each with its reason."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_data = pytest.mark.skip(reason="needs real data in the folder named by REAL_DATA")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "real_data" in item.keywords and not os.environ.get("REAL_DATA"):
            item.add_marker(no_data)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors this small lose more by waiting for a busy core than they gain from a second one."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """For the whole session, so that a module can keep what it has loaded from there."""
    return Path(os.environ["REAL_DATA"])


@pytest.fixture
def tiny_file(tmp_path) -> Path:
    """A configuration that trains in a second, with its runs under tmp_path."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + f"output_dir: {tmp_path / 'runs'}\n")
    return path


@pytest.fixture
def tiny(tiny_file):
    """The tiny configuration, changed by overrides: tiny('train.epochs=5')."""

    def make(*overrides: str):
        (config,) = load_configs(tiny_file, overrides)
        return config

    return make


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without figures: drawing takes longer than all the rest of a tiny run."""
    monkeypatch.setattr(plot_results, "draw_all", lambda *arguments, **named: iter(()))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Start every test from the same global generator, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def complaints(error: str) -> list[str]:
    """Return the lines of a command's stderr without the first, which names the device."""
    lines = error.splitlines()
    return lines[1:] if lines and lines[0].startswith("Device: ") else lines


@pytest.fixture(scope="session")
def trained_family(tmp_path_factory) -> Path:
    """A folder of two trained runs, of seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("family")
    path = folder / "tiny.yaml"
    path.write_text(TINY + f"output_dir: {folder / 'runs'}\n")
    for config in load_configs(path, ("seed=[0, 1]",)):
        gradient_accounting.EXPERIMENT.main(Run.of(config))
    return folder / "runs"


@pytest.fixture
def family(trained_family, tmp_path):
    """The family of the two runs, in a copy under tmp_path."""
    shutil.copytree(trained_family, tmp_path / "runs")
    (found,) = find_families([tmp_path / "runs"])
    return found
