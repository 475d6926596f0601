"""Rectangular images: every step works on them, or one line says what a network needs."""

import numpy as np
import pytest
import torch

import gradient_accounting
import layer_rewinding
import neuron_flipping
import plot_results
from engine.launch.cli import run_script
from engine.training.build import _load_dataset_once
from models import build_model
from tests.conftest import complaints

CONFIG = """
device: cpu
data: {name: npz, path: rectangles.npz, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 2, batch_size: 32, peak_epoch: 1}
rewinding: {epochs: [0]}
flipping: {examples: 2, noise_copies: 1, reference_batch: 20, remaining: 40, max_neurons: 2}
"""


@pytest.fixture(autouse=True)
def rectangles(tmp_path, monkeypatch):
    """80 images of 12 rows and 20 columns; a bright column is the class."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 200, (80, 12, 20), dtype=np.uint8)
    label = np.arange(80) % 4
    images[np.arange(80), :, 3 + 4 * label] = 255
    arrays = {"x_train": images, "y_train": label, "x_test": images[:20], "y_test": label[:20]}
    np.savez("rectangles.npz", **arrays)
    (tmp_path / "a.yaml").write_text(CONFIG)
    _load_dataset_once.cache_clear()


def test_training_measuring_and_drawing(tmp_path):
    for script in (gradient_accounting, layer_rewinding, neuron_flipping):
        assert run_script(script.EXPERIMENT, "", ["a.yaml"]) == 0
    assert plot_results.main(["runs", "--figure", "examples", "--format", "png"]) == 0
    assert list(tmp_path.glob("runs/*/figures/examples.png"))


def test_a_network_for_square_images_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(CONFIG.replace("resnet9, width: 0.05", "vit_small"))
    assert run_script(gradient_accounting.EXPERIMENT, "", ["a.yaml"]) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert line == "model: vit_small needs square images, not 12x20"


@pytest.mark.parametrize("name", ["resnet9", "resnet50"])
def test_a_network_classifies_each_shape(name):
    for height, width in ((12, 20), (20, 12)):
        shape = {"channels": 1, "classes": 3, "image_size": (height, width)}
        model = build_model(name, **shape, seed=0).eval()
        assert model(torch.zeros(2, 1, height, width)).shape == (2, 3)
