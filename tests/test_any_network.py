"""The five experiments on networks that are not ours: same bytes, own identity, no code unasked."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import example_tied_dropout
import gradient_accounting
import layer_retraining
import layer_rewinding
import neuron_flipping
import plot_results
import reproduce
from engine.config.load import load_configs
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.identity import identity_of, run_directory, without_dropout
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split
from models.dropout import tied_layers
from plotting.dropout import remake_layers
from plotting.families import find_families
from tests.conftest import complaints

CPU = torch.device("cpu")
SCRIPTS = (gradient_accounting, layer_rewinding, layer_retraining, neuron_flipping)
TABLES = (
    "history.csv", "gradient_accounting.csv", "layer_rewinding.csv", "layer_retraining.csv",
    "neuron_flipping.csv", "mislabel_detection.csv",
)  # fmt: skip
DROPOUT_TABLES = (
    "history.csv", "example_tied_dropout.csv", "forgotten.csv", "dropout_ablation.csv",
    "unlearning.csv",
)  # fmt: skip
PLAIN = Path(__file__).parent / "plain_networks.py"
QUICK = (
    "rewinding.epochs=all", "retraining.epochs=2", "retraining.peak_epoch=1",
    "flipping.examples=3", "flipping.reference_batch=20", "flipping.remaining=40",
    "flipping.noise_copies=2", "flipping.max_neurons=6", "dropout.forget=[1,3]",
    "dropout.forget_draws=2",
)  # fmt: skip
RESNET9_SITES = "[conv1, conv2, residual1, conv5, residual2, conv8]"
VIT = "{patch: 5, dim: 12, depth: 2, heads: 2, dim_head: 6, mlp_dim: 10, dropout: 0.1}"
VIT_KEYS = tuple(f"model.{pair.replace(': ', '=')}" for pair in VIT.strip("{}").split(", "))


def contents(folder: Path, tables: tuple[str, ...]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tables}


def five_experiments(config) -> dict[str, bytes]:
    """The tables of all scripts, as bytes; those of the dropout run with its own prefix."""
    plain = Run.of(without_dropout(config))
    for script in SCRIPTS:
        script.EXPERIMENT.main(plain)
    tables = contents(plain.directory, TABLES)
    tied = Run.of(example_tied_dropout.without_accounting(config))
    example_tied_dropout.EXPERIMENT.main(tied)
    return tables | {
        f"dropout/{name}": data for name, data in contents(tied.directory, DROPOUT_TABLES).items()
    }


def compare(tiny, ours: tuple[str, ...], plain: tuple[str, ...], shared: tuple[str, ...] = ()):
    overrides = (*QUICK, "dropout.kind=example_tied", *shared)
    shared = dict(override.split("=", 1) for override in overrides)  # the last one wins
    shared = [f"{key}={value}" for key, value in shared.items()]
    expected = five_experiments(tiny(*shared, *ours))
    found = five_experiments(tiny(*shared, "model.width=1.0", *plain))
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name
    assert len(expected["neuron_flipping.csv"].splitlines()) > 1


def test_resnet9_as_a_plain_module_writes_the_same_bytes(tiny):
    compare(
        tiny,
        ("model.width=0.05",),
        (
            f"model.name={PLAIN}:make_resnet9",
            "model.options={width: 0.05}",
            f"dropout.sites={RESNET9_SITES}",
        ),
    )


@pytest.mark.slow("trains two ViTs")
@pytest.mark.timeout(1200)
def test_vit_small_as_a_plain_module_writes_the_same_bytes(tiny):
    sites = "[transformer.layers.0, transformer.layers.1]"
    compare(
        tiny,
        ("model.name=vit_small", "model.width=1.0", *VIT_KEYS),
        (
            f"model.name={PLAIN}:make_vit",
            f"model.options={VIT}",
            f"dropout.sites={sites}",
        ),
        ("train.peak_lr=0.01",),
    )


@pytest.mark.slow("trains four ResNet-50s")
@pytest.mark.timeout(3000)
def test_resnet50_as_a_plain_module_writes_the_same_bytes(tiny):
    compare(
        tiny,
        ("model.name=resnet50", "model.width=1.0"),
        (f"model.name={PLAIN}:make_resnet50",),  # dropout behind every layer but the last
        (
            "data.train_size=24", "data.test_size=8", "train.epochs=1", "train.batch_size=12",
            "retraining.epochs=1", "flipping.examples=1", "flipping.max_neurons=2",
        ),
    )  # fmt: skip


# ---------------------------------------------------------------- a network in a file

FILE = """
from torch import nn

def make(channels, classes, image_size, width=4):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )
"""

OTHERS = """
class Spare(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.spare = network, nn.Parameter(network[4].bias.detach())

    def forward(self, images):
        return self.network(images)

def wide(channels, classes, image_size):
    return make(channels, classes + 1, image_size)

def number(**arguments):
    return 3

def fails(**arguments):
    raise ValueError("a first line, and\\nits last line")

def spare(**arguments):
    return Spare(make(**arguments))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch, tiny_file):
    """A configuration of a network in a file beside it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("nets").mkdir()
    Path("nets/mine.py").write_text(FILE)
    text = tiny_file.read_text().replace(
        "model: {name: resnet9, width: 0.05}", "model: {name: nets/mine.py:make}"
    )
    Path("mine.yaml").write_text(text + "rewinding: {epochs: all}\n")
    return Path("mine.yaml")


def run(script, *arguments) -> int:
    return run_script(script.EXPERIMENT, script.__doc__, [*map(str, arguments)])


def the_run(config: Path, *overrides: str) -> Run:
    (found,) = load_configs(config, overrides)
    return Run.of(without_dropout(found))


def test_from_a_file_to_a_report(mine, no_figures):
    for script in (gradient_accounting, layer_rewinding):
        assert run(script, mine) == 0
    directory = the_run(mine).directory
    assert "nets" not in directory.parent.name
    assert (directory / "network" / "mine.py").read_text() == FILE
    assert plot_results.main(["runs"]) == 0
    assert Path("runs/report.html").exists()


def test_an_edited_network_is_another_run_and_a_moved_one_is_not(mine):
    before = identity_of(the_run(mine).config)
    assert the_run(mine, "model.options={width: 5}").identity != before
    assert the_run(mine, "model.layers=['0', '4']").identity != before
    Path("elsewhere").mkdir()
    shutil.copy("nets/mine.py", "elsewhere/mine.py")
    assert the_run(mine, "model.name=elsewhere/mine.py:make").identity == before
    Path("nets/mine.py").write_text(FILE + "\n")
    assert identity_of(the_run(mine).config) != before


def test_a_network_with_options_through_reproduce_and_before_and_after_an_edit(mine, capsys):
    """Options are part of keys; a file's digest is a setting that no configuration has."""
    overrides = ["model.options={width: 5}", "experiments=[rewinding]"]
    assert reproduce.main([str(mine), "--dry-run", *overrides]) == 0
    assert run(gradient_accounting, mine, *overrides) == 0
    Path("nets/mine.py").write_text(FILE + "\n")
    assert run(gradient_accounting, mine, *overrides) == 0
    capsys.readouterr()
    assert plot_results.main(["runs", "--figure", "2", "--format", "png"]) == 0
    assert capsys.readouterr().out.endswith(".png\n")


def test_a_directory_that_holds_a_network_asks_for_trust(mine, capsys):
    assert run(gradient_accounting, mine) == 0
    found = the_run(mine).directory
    shutil.move("nets/mine.py", "kept.py")  # the run may be from elsewhere
    assert run(layer_rewinding, found) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "its network is a file, and this would run its code; read " in message
    assert "add --trust, or name your own copy: model.name=FILE.py:CALLABLE" in message
    assert run(layer_rewinding, found, "--trust") == 0
    (found / "layer_rewinding.csv").unlink()
    (found / "layer_rewinding.json").unlink(missing_ok=True)
    shutil.copy("kept.py", "mine.py")
    assert run(layer_rewinding, found, "model.name=mine.py:make") == 0
    assert (found / "layer_rewinding.csv").exists()


def test_another_file_than_the_one_trained_on_is_refused(mine, capsys):
    assert run(gradient_accounting, mine) == 0
    found = the_run(mine).directory
    Path("mine.py").write_text(FILE + "\n")
    assert run(layer_rewinding, found, "model.name=mine.py:make") == 2
    assert "mine.py: is not the file that the run was trained on (model.name)" in (
        capsys.readouterr().err
    )
    (found / "network" / "mine.py").write_text(FILE + "\n")
    assert run(layer_rewinding, found, "--trust") == 2
    assert "is not the file that the run was trained on" in capsys.readouterr().err


def test_drawing_runs_no_code_of_a_run(mine, no_figures):
    assert run(gradient_accounting, mine) == 0
    found = the_run(mine).directory
    for path in (Path("nets/mine.py"), found / "network" / "mine.py"):
        path.write_text("raise SystemExit('code of a run directory was run')\n")
    assert plot_results.main(["runs"]) == 0


def test_a_run_whose_network_is_gone_is_drawn_from_its_tables_and_named(mine, capsys, no_figures):
    for script in (gradient_accounting, layer_rewinding):
        assert run(script, mine) == 0
    found = the_run(mine).directory
    Path("nets/mine.py").unlink()
    capsys.readouterr()
    assert plot_results.main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (named,) = [line for line in lines if "nets/mine.py" in line]
    assert found.parent.name in named
    assert "is gone; its tables are drawn, and --trust measures with the copy in it" in named


def test_an_interrupted_run_with_a_trusted_network_resumes_as_itself(mine):
    one = the_run(mine)
    assert run(gradient_accounting, mine, "train.epochs=2") == 0
    found = the_run(mine, "train.epochs=2").directory
    settings = files.read_json(found / "provenance.json")
    assert run(gradient_accounting, found, "--trust") == 0
    assert files.read_json(found / "provenance.json") == settings
    assert one.identity != settings["identity"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=nets/mime.py:make", "nets/mime.py: no such file; did you mean mine.py?"),
        ("model.name=nets/mine.py:mak", "has no callable 'mak'; did you mean make?"),
        ("model.name=torchvision:resnet81", "no such classifier; did you mean resnet18?"),
        ("model.name=resnet18", "one of resnet9, resnet50, vit_small, torchvision:NAME or FILE.py"),
        ("model.layers=['0', '11']", "layer 11: the network has no such module"),
        ("model.layers=[]", "model.layers: [] is not allowed: a list of different names, or null"),
        ("model.options={depth: 3}", "unexpected keyword argument 'depth'"),
        ("model.options=[1]", "names and plain values, such as {groups: 4}, or null"),
        ("model.width=0.5", "only resnet9 takes it, not nets/mine.py:make"),
        ("model.name=nets/other.py:wide", "its output for 2 images is 2 x 11, not 2 x 10"),
        ("model.name=nets/other.py:number", "returns an object of type int, not a torch.nn.Module"),
        ("model.name=nets/other.py:fails", "ValueError: its last line"),
        ("model.name=nets/broken.py:make", "broken.py: cannot be run: NameError: name 'x' is not"),
        ("model.layers=['4', '0']", "layers: 0 runs before 4; in forward order they are [0, 4]"),
        ("model.layers=['0', '0.0']", "layer 0.0: lies inside of layer 0; name one of the two"),
        ("model.name=nets/other.py:spare", "spare: the network's forward pass does not use this"),
    ],
)
def test_bad_input_gets_one_line(mine, capsys, override, message):
    Path("nets/other.py").write_text(FILE + OTHERS)
    Path("nets/broken.py").write_text("x + 1\n")
    assert run(gradient_accounting, mine, override) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert message in line


def test_our_networks_take_no_layers(tiny_file, capsys):
    assert run(gradient_accounting, tiny_file, "model.layers=[conv1, linear]") == 2
    assert "model.layers: ('conv1', 'linear') is not allowed: only torchvision:NAME" in (
        capsys.readouterr().err
    )


def test_dropout_behind_named_modules(mine, capsys):
    tied = ("dropout.kind=example_tied", "train.epochs=1", "dropout.forget_draws=1")
    assert run(example_tied_dropout, mine, *tied, "dropout.sites=[0, '1.0']") == 0
    assert run(example_tied_dropout, mine, *tied) == 0
    assert run(example_tied_dropout, mine, *tied, "dropout.sites=['1.7']") == 2
    assert "dropout: sites: the network has no module 1.7; did you mean" in capsys.readouterr().err


def test_figure_6_needs_no_code_of_the_network(mine, capsys):
    tied = ("dropout.kind=example_tied", "dropout.forget_draws=1", "dropout.sites=['0.0', '1']")
    assert run(example_tied_dropout, mine, *tied) == 0
    (family,) = find_families([Path("runs")])
    split = load_split(family.config)
    model = load_final_model(family.runs[0], split, CPU)
    Path("nets/mine.py").unlink()
    found = remake_layers(family, split)
    assert [*found] == ["0.0", "1"]
    for layer, own in zip(found.values(), tied_layers(model), strict=True):
        assert torch.equal(layer.masks, own.masks)
        assert layer.generalization == own.generalization
    assert plot_results.main(["runs", "--figure", "6", "--format", "png"]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("figure 6: "))
    assert path.name == "masks.png"
    assert path.exists()


def test_sites_decide_the_run(mine):
    tied = ("dropout.kind=example_tied",)
    (blocks,) = load_configs(mine, tied)
    found = {
        run_directory(load_configs(mine, (*tied, f"dropout.sites={sites}"))[0])
        for sites in ("['0', '1']", "['1', '0']", "['0']")
    }
    assert len({*found, run_directory(blocks)}) == 4
    (plain,) = load_configs(mine, ("dropout.sites=['0']",))
    assert run_directory(without_dropout(plain)) == the_run(mine).directory


def test_rectangular_images(mine, tmp_path):
    images = np.random.default_rng(0).integers(256, size=(60, 12, 20), dtype=np.uint8)
    label = np.arange(60) % 3
    arrays = {"x_train": images, "y_train": label, "x_test": images[:9], "y_test": label[:9]}
    np.savez(tmp_path / "wide.npz", **arrays)
    wide = (
        "data.name=npz", "data.path=wide.npz", "data.train_size=null", "data.test_size=null", *QUICK
    )  # fmt: skip
    for script in SCRIPTS:
        assert run(script, mine, *wide) == 0
    assert run(example_tied_dropout, mine, *wide, "dropout.kind=example_tied") == 0
    found = {path.name for path in Path("runs").glob("*/seed0/*.csv")}
    assert found >= {*TABLES, *DROPOUT_TABLES} - {"mislabel_detection.csv"}
