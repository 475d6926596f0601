"""The notebook runs from its first cell to its last, and draws what the tables say."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

import gradient_accounting
import layer_rewinding
import neuron_flipping
from engine.launch.cli import run_script

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "explore_a_run.ipynb"
CONFIG = """
device: cpu
data: {name: glyphs, train_size: 60, test_size: 20, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 2, batch_size: 32, peak_epoch: 1}
rewinding: {epochs: [0, 1, 2]}
flipping: {examples: 2, noise_copies: 1, reference_batch: 20, remaining: 40, max_neurons: 9}
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(CONFIG)
    for script in (gradient_accounting, layer_rewinding, neuron_flipping):
        assert run_script(script.EXPERIMENT, "", ["a.yaml"]) == 0
    (found,) = tmp_path.glob("runs/*/seed0")
    return found


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_notebook_draws_two_figures_of_a_finished_run(run, monkeypatch):
    plt.switch_backend("Agg")
    plt.close("all")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells), "the notebook is kept without outputs"
    names: dict = {}
    for source in sources:
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert names["run"] == run
    assert len(plt.get_fignums()) == 2

    clean, noisy, test = names["left"].lines
    for line, column in ((clean, "acc_clean"), (noisy, "acc_noisy"), (test, "acc_test")):
        expected = [100 * float(row[column]) for row in table(run / "history.csv")]
        np.testing.assert_allclose(line.get_ydata(), expected)
    rewound = table(run / "layer_rewinding.csv")
    assert len(names["right"].lines) == 9
    for layer, line in enumerate(names["right"].lines):
        expected = [100 * float(r["acc_noisy"]) for r in rewound if r["group"] == str(layer)]
        np.testing.assert_allclose(line.get_ydata(), expected)
    flipped = [row for row in table(run / "neuron_flipping.csv") if row["flipped"] == "1"]
    assert sum(patch.get_height() for patch in names["axes"].patches) == len(flipped) > 0
    plt.close("all")
