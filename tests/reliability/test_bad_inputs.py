"""The corpus of bad inputs: each gets one line and status 2, and nothing is written.

One table: configurations and what is said on the command line about them, command lines of every
script, and data files.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import example_tied_dropout
import gradient_accounting
import layer_retraining
import layer_rewinding
import neuron_flipping
import plot_results
import reproduce
from engine.launch.cli import run_script
from tests.conftest import complaints
from tests.own_data import good_arrays

REPOSITORY = Path(__file__).resolve().parents[2]
MANY = "[" + ", ".join(map(str, range(150))) + "]"
# Content of the file, overrides, and what the line must say.
CONFIGURATIONS = [
    ("data: {noise_rate: 1.2}", [], "data.noise_rate: 1.2 is not allowed: a number from 0 to 1"),
    ("data: {noise_rate: -0.1}", [], "data.noise_rate: -0.1 is not allowed"),
    ("data: {noise_rate: .nan}", [], "data.noise_rate: nan is not allowed"),
    ("data: {noise_rate: ten}", [], "data.noise_rate: 'ten' is not allowed: a number"),
    ("data: {noise_rate: true}", [], "data.noise_rate: True is not allowed: a number"),
    ("data: {noise_rate: null}", [], "data.noise_rate: None is not allowed"),
    ("data: {noise_rate: [0.1, 0.2]}", [], "to try several, write sweep: {data.noise_rate: [...]}"),
    ("flipping: {examples: [2, 4]}", [], "[2, 4] is not allowed: a whole number, 1 or more"),
    ("train: {epochs: 0}", [], "train.epochs: 0 is not allowed: a whole number from 1 to 100000"),
    ("train: {epochs: 2.5}", [], "train.epochs: 2.5 is not allowed: a whole number"),
    ("train: {epochs: '20'}", [], "train.epochs: '20' is not allowed: a whole number"),
    ("train: {epochs: 5}", [], "train.peak_epoch: 10 is not allowed: at most train.epochs"),
    ("train: {peak_lr: 0}", [], "train.peak_lr: 0 is not allowed: a number above 0"),
    ("train: {peak_lr: .inf}", [], "train.peak_lr: inf is not allowed"),
    ("train: {batch_size: 1}", [], "train.batch_size: 1 is not allowed"),
    ("train: {schedule: triangel}", [], "did you mean triangle?"),
    ("train: {account_gradients: 1}", [], "1 is not allowed: true or false"),
    ("model: {name: resnet18}", [], "'resnet18' is not allowed: one of resnet9, resnet50"),
    ("model: {name: resnet-9}", [], "did you mean resnet9?"),
    ("model: {name: vit_small, width: 0.5}", [], "model.width: 0.5 is not allowed: only resnet9"),
    ("model: {depth: 3}", [], "model.depth: 3 is not allowed: only vit_small takes it"),
    ("data: {name: minst}", [], "did you mean mnist?"),
    ("data: {name: npz}", [], "data.path: null is not allowed: data.name npz needs"),
    ("data: {name: mnist, path: x.npz}", [], "only data.name npz takes a path"),
    ("data: {split: human, name: mnist}", [], "data.split: 'human' is not allowed"),
    ("data: {split: atypical, name: svhn}", [], "no scores are published for svhn"),
    ("data: {keep_memorized: true}", [], "data.keep_memorized: true is not allowed"),
    ("data: {train_size: 1}", [], "data.train_size: 1 is not allowed"),
    ("data: {human_labels: {column: worse}}", [], "did you mean worse_label?"),
    ("data: mnist", [], "data: 'mnist' is not a section with keys name, root"),
    ("data: {nois_rate: 0.1}", [], "data.nois_rate: unknown key; did you mean data.noise_rate?"),
    ("noise_rate: 0.1", [], "noise_rate: unknown key; did you mean data.noise_rate?"),
    ("trian: {epochs: 3}", [], "trian: unknown key; did you mean train?"),
    ("zzzzzz: 3", [], "zzzzzz: unknown key; allowed: name, output_dir"),
    ("1: 3", [], "1: unknown key"),
    ("seed: -1", [], "seed: -1 is not allowed"),
    ("seed: [0, 0]", [], "seed: 0 stands twice in the list"),
    ("seed: []", [], "seed: [] is not a list of values"),
    ("checkpoints: {keep: some}", [], "checkpoints.keep: 'some' is not allowed: all, or a list"),
    ("checkpoints: {keep: [0, 60]}", [], "checkpoints.keep: 60 is not allowed: at most"),
    ("checkpoints: {keep: [-1]}", [], "checkpoints.keep: [-1] is not allowed"),
    ("rewinding: {epochs: [0, 60]}", [], "rewinding.epochs: 60 is not allowed: at most"),
    ("rewinding: {epochs: [...]}", [], "is not allowed: all, or a list of epochs such as [0, 5"),
    ("rewinding: {epochs: [0, 5, 7, ...]}", [], "rewinding.epochs: [0, 5, 7, '...'] is not"),
    ("rewinding: {epochs: [5, 0, ...]}", [], "rewinding.epochs: [5, 0, '...'] is not allowed"),
    ("rewinding: {epochs: 5}", [], "rewinding.epochs: 5 is not allowed"),
    ("checkpoints: {keep: [0, 5, ...]}", [], "checkpoints.keep: [0, 5, '...'] is not allowed"),
    ("rewinding: {batchnorm: last}", [], "'last' is not allowed: one of final, checkpoint"),
    ("retraining: {epochs: 5}", [], "retraining.peak_epoch: 10 is not allowed: at most"),
    ("retraining: {patience: 0}", [], "retraining.patience: 0 is not allowed"),
    ("sweep: {data.noise_rate: 0.1}", [], "data.noise_rate: 0.1 is not a list of values"),
    ("sweep: {data.noise_rate: [0.1, 7]}", [], "data.noise_rate: 7 is not allowed"),
    ("sweep: {data.noise: [0.1]}", [], "data.noise: unknown key; did you mean data.noise_"),
    ("sweep: [seed]", [], "sweep: ['seed'] does not map key paths to lists"),
    ("sweep: {seed: [0], seed: [1]}", [], "seed stands twice"),
    ("sweep: {data.noise_rate: [0], data: {noise_rate: [1]}}", [], "swept a second time"),
    ("seed: 3\nsweep: {seed: [0, 1]}", [], "seed: is swept, and set"),
    ("seed: 3\nseed: 4", [], "seed stands twice"),
    ("train: {epochs: 20, epochs: 30}", [], "epochs stands twice"),
    ("data: {name: mnist", [], "not valid YAML (line 1"),
    ("a: b: c", [], "not valid YAML"),
    ("name: \tx\n\t- y", [], "not valid YAML"),
    ("name: !!python/object/apply:os.system ['true']", [], "not valid YAML"),
    ("date: 2023-99-99", [], "not valid YAML"),
    ("", [], "the file is empty"),
    ("# only a comment\n", [], "the file is empty"),
    ("- a\n- b", [], "a configuration is a mapping"),
    ("just text", [], "a configuration is a mapping"),
    ("extends: [a, b]", [], "extends: ['a', 'b'] is not the name of one file"),
    ("extends: nowhere.yaml", [], "nowhere.yaml: no such file"),
    ("extends: a.yaml", [], "goes round in a circle: a.yaml -> a.yaml"),
    ("name: ''", [], "name: '' is not allowed: text"),
    ("device: gpu", [], "device: 'gpu' is not allowed: one of auto, cpu, cuda"),
    ("precision: fp16", [], "precision: 'fp16' is not allowed: one of auto, fp32, tf32, bf16"),
    ("name: x", ["train.epochs"], "'train.epochs' is not of the form key.path=value"),
    ("name: x", ["train.epoch=3"], "train.epoch: unknown key; did you mean train.epochs?"),
    ("name: x", ["train.epochs=many"], "command line: train.epochs: 'many' is not allowed"),
    ("name: x", ["train.epochs=[1"], "command line: train.epochs: not valid YAML"),
    ("name: x", ["seed=1", "seed=2"], "command line: seed: is set twice"),
    ("name: x", ["sweep.seed=[1]", "seed=2"], "command line: seed"),
    ("name: x", ["train.epochs=5"], "train.peak_epoch: 10 is not allowed"),
    ("data: {noise_seed: -1" + "0" * 400 + "}", [], "data.noise_seed: -1000000"),
    ("train: {epochs: 1" + "0" * 400 + "}", [], "train.epochs: 1000000"),
    (
        "train: {epochs: 0x" + "F" * 5000 + "}",
        [],
        "epochs: a number that long is not allowed",
    ),
    ("name: 1" + "0" * 5000, [], "not valid YAML: Exceeds the limit"),
    ("a: &a [x, x]\nb: [*a, *a]", [], "(line 2, column 5): aliases (*) are not allowed"),
    ("name: &a [*a]", [], "aliases (*) are not allowed"),
    ("name: " + "[" * 3000, [], "not valid YAML"),
    ("name: two\\nlines\n" + "x" * 99, [], "not valid YAML"),
    ('name: "two\\nlines"', [], "is not allowed: text on one line"),
    ("output_dir: 3", [], "output_dir: 3 is not allowed: text on one line"),
    (
        f"sweep: {{seed: {MANY}, data.noise_seed: {MANY}}}",
        [],
        "22,500 runs; at most 10,000",
    ),
    ("extends: ../../../../../../../etc/hostname", [], "is a mapping 'key: value', not"),
    ("extends: .", [], "cannot be read"),
    ("extends: loop.yaml", [], "loop.yaml: cannot be read: "),
    ("output_dir: ~nouser/runs", [], "~nouser/runs: this machine has no such user"),
    ("data: {name: mnist, root: ~nouser}", [], "~nouser: this machine has no such user"),
    ("data: {name: npz, path: ~nouser/x.npz}", [], "~nouser/x.npz: this machine has no such user"),
    (
        "train: {peak_lr: 1e39}",
        [],
        "train.peak_lr: 1e+39 is not allowed: a number above 0; at most",
    ),
    ("train: {weight_decay: 1e39}", [], "train.weight_decay: 1e+39 is not allowed"),
    ("retraining: {peak_lr: 1e39}", [], "retraining.peak_lr: 1e+39 is not allowed"),
    ("flipping: {noise_ratio: 1e39}", [], "flipping.noise_ratio: 1e+39 is not allowed"),
    ("train: {epochs: 1:30}", [], "(line 1, column 17): 1:30 is a number to the base 60 in YAML"),
    ("train: {peak_lr: 1:30.5}", [], "1:30.5 is a number to the base 60 in YAML"),
    ("seed: 010", [], "(line 1, column 7): 010 is a number to the base 8 in YAML"),
    ("name: x", ["train.epochs=1:30"], "train.epochs: not valid YAML (line 1, column 1): 1:30"),
    ("name: x", ["seed=010"], "seed: not valid YAML (line 1, column 1): 010 is a number to the"),
]
# Script, its arguments (FILE is a good configuration, FOLDER an empty folder), and the line.
COMMAND_LINES = [
    ("gradient_accounting", [], "command line: the following arguments are required: CONFIG"),
    ("gradient_accounting", ["FILE", "--devise", "cpu"], "unrecognized arguments: --devise cpu"),
    ("gradient_accounting", ["FILE", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ("gradient_accounting", ["FILE", "train.epochs=0"], "train.epochs: 0 is not allowed"),
    ("gradient_accounting", ["FILEx"], "no such file; did you mean good.yaml?"),
    ("gradient_accounting", ["FOLDER"], "is not the directory of a run: it has no config.yaml"),
    ("gradient_accounting", ["FILE", "model.name=vit_small", "model.patch=7"], "model: "),
    ("gradient_accounting", ["FILE", "data.train_size=2000000000"], "allowed: 1 to 1000000"),
    ("layer_rewinding", ["FILE"], "seed0: no such run; `python gradient_accounting.py "),
    ("layer_retraining", ["FILE"], "seed0: no such run; `python gradient_accounting.py "),
    ("neuron_flipping", ["FILE"], "seed0: no such run; `python gradient_accounting.py "),
    ("example_tied_dropout", ["FILE", "dropout.kind=all"], "dropout.kind: 'all' is not allowed"),
    ("plot_results", ["FOLDER"], "no finished run there"),
    ("plot_results", ["nowhere"], "nowhere: no such folder"),
    ("plot_results", ["FOLDER", "--figure", "20"], "--figure: '20' is not a figure"),
    ("plot_results", ["--format", "svg"], "argument --format: invalid choice: 'svg'"),
    ("reproduce", ["FILE", "--time-budget", "soon"], "'soon' is not a number of seconds"),
    ("reproduce", ["FILE", "--time-budget", "nan"], "'nan' is not a number of seconds"),
    ("gradient_accounting", ["loop.yaml"], "loop.yaml: cannot be read: "),
    ("gradient_accounting", ["pipe.yaml"], "pipe.yaml: cannot be read: it is not a regular file"),
    ("reproduce", ["pipe.yaml"], "pipe.yaml: cannot be read: it is not a regular file"),
    ("gradient_accounting", ["FILE", "data.path=pipe.yaml", "data.name=npz"], "regular file"),
    ("reproduce", ["sede=3"], "sede: unknown key; did you mean seed?"),
    ("reproduce", ["FILE", "experiments=[rewind]"], "experiments: ['rewind'] is not allowed"),
]


def without(*names):
    return lambda a: [a.pop(name) for name in names]


def renamed(old, new):
    return lambda a: a.update({new: a.pop(old)})


def put(name, value):
    return lambda a: a.update({name: value(a[name])})


def at(index, value, dtype=None):
    def change(array):
        array = array.astype(dtype or array.dtype)
        array[index] = value
        return array

    return change


# What is done to a good data file, and what the line must say (a regular expression).
DATA_FILES = {
    "missing": (without("x_test"), "there is no x_test; found x_train"),
    "misspelled": (renamed("x_train", "X_train"), "no x_train; did you mean it by X_train"),
    "transposed": (renamed("y_test", "test_y"), "no y_test; did you mean it by test_y"),
    "optional misspelled": (renamed("noisy_label", "noisy_labels"), "mean it by noisy_labels"),
    "float images": (
        put("x_train", lambda x: x / 255),
        "x_train: found dtype float64.*multiply images in .* by 255 and convert to uint8",
    ),
    "int images": (put("x_test", lambda x: x.astype(int)), "x_test: found dtype int64"),
    "flat images": (put("x_train", lambda x: x.reshape(12, -1)), r"x_train: .*\(12, 60\)"),
    "channels first": (
        put("x_train", lambda x: x.transpose(0, 3, 1, 2)),
        r"x_train: .*\(12, 3, 5, 4\).*1 or 3 channels, as the last axis",
    ),
    "no images": (put("x_test", lambda x: x[:0]), "x_test: .*empty"),
    "no pixels": (put("x_train", lambda x: x[:, :0]), "x_train: .*empty"),
    "object images": (put("x_train", lambda x: x.astype(object)), "x_train: .*unreadable"),
    "sizes differ": (put("x_test", lambda x: x[:, 1:]), r"x_test: .*\(4, 4, 3\).*\(5, 4, 3\)"),
    "fewer labels": (put("y_train", lambda y: y[1:]), r"y_train: .*\(11,\).*\(12,\)"),
    "column of labels": (put("y_test", lambda y: y[:, None]), r"y_test: .*\(6, 1\).*\(6,\)"),
    "float labels": (put("y_train", lambda y: y.astype(float)), "y_train: found dtype float64"),
    "bool labels": (put("y_train", lambda y: y > 0), "y_train: found dtype bool"),
    "object labels": (put("y_test", lambda y: y.astype(object)), "y_test: .*unreadable"),
    "text labels": (put("y_test", lambda y: y.astype(str)), "y_test: found dtype <U"),
    "negative": (put("y_train", at(4, -1)), r"y_train: found label -1 at position 4.*0\.\.K-1"),
    "from 1": (put("y_train", lambda y: y + 1), "y_train: .*none of class 0"),
    "gap": (put("y_train", at(5, 10**12)), "y_train: .*up to 10+ but none of class 3"),
    "one class": (put("y_train", lambda y: y * 0), "y_train: found one class only"),
    "unknown test class": (put("y_test", at(2, 3)), r"y_test: found label 3 at position 2.*0\.\.2"),
    "noisy length": (put("noisy_label", lambda y: y[:5]), r"noisy_label: .*\(5,\)"),
    "noisy class": (put("noisy_label", at(0, 3)), r"noisy_label: found label 3.*0\.\.2"),
    "noisy type": (put("noisy_label", lambda y: y * 1.0), "noisy_label: found dtype float64"),
    "nan score": (put("c_score", at(3, np.nan)), "c_score: found nan at position 3.*0 to 1"),
    "high score": (put("c_score", at(3, 1.5)), r"c_score: found 1\.5 at position 3"),
    "negative score": (put("c_score", at(3, -0.5)), r"c_score: found -0\.5 at position 3"),
    "score length": (put("c_score", lambda s: s[:-1]), r"c_score: .*\(11,\)"),
    "score type": (put("c_score", lambda s: s > 0.5), "c_score: found dtype bool"),
}
NO_DATA_FILES = [b"", b"hello", b"\x93NUMPY and no more", b"PK\x05\x06"]
SCRIPTS = {
    script.__name__: script
    for script in (
        gradient_accounting, layer_rewinding, layer_retraining, neuron_flipping,
        example_tied_dropout, plot_results, reproduce,
    )
}  # fmt: skip


@pytest.fixture
def complaint(tmp_path, monkeypatch, capsys):
    """Return a script's line about bad input, after checking that it does nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")

    def complaint(name: str, arguments: list[str]) -> str:
        script, before = SCRIPTS[name], sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        if script in (plot_results, reproduce):
            status = script.main(arguments)
        else:
            status = run_script(script.EXPERIMENT, "", arguments)
        printed = capsys.readouterr()
        assert status == 2, printed
        assert printed.out == ""
        (line,) = complaints(printed.err)
        assert len(line) < 1000
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return complaint


@pytest.mark.parametrize(("content", "overrides", "expected"), CONFIGURATIONS)
def test_configurations(complaint, tmp_path, content, overrides, expected):
    (tmp_path / "a.yaml").write_text(content, encoding="utf-8")
    line = complaint("gradient_accounting", ["a.yaml", *overrides])
    assert expected in line
    where = "command line" if overrides and "peak_epoch" not in line else "a.yaml"
    assert line.startswith((where, "~nouser")) or content.startswith("extends")


@pytest.mark.parametrize(("script", "arguments", "expected"), COMMAND_LINES)
def test_command_lines(complaint, tmp_path, script, arguments, expected):
    (tmp_path / "good.yaml").write_text("data: {name: glyphs, train_size: 20, test_size: 20}\n")
    (tmp_path / "folder").mkdir()
    filled = [a.replace("FILE", "good.yaml").replace("FOLDER", "folder") for a in arguments]
    assert expected in complaint(script, filled)


@pytest.fixture
def own_data(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {name: npz, path: own.npz}\n")
    return tmp_path / "own.npz"


@pytest.mark.parametrize(("spoil", "expected"), DATA_FILES.values(), ids=DATA_FILES.keys())
def test_data_files(complaint, own_data, spoil, expected):
    arrays = good_arrays()
    spoil(arrays)
    np.savez(own_data, **arrays)
    line = complaint("gradient_accounting", ["own.yaml"])
    assert line.startswith("own.npz: ")
    assert re.search(expected, line)


@pytest.mark.parametrize("content", NO_DATA_FILES)
def test_no_data_files(complaint, own_data, content):
    own_data.write_bytes(content)
    line = complaint("gradient_accounting", ["own.yaml"])
    assert line.startswith("own.npz: not an .npz file, or cut off")


def test_there_is_no_data_file(complaint, own_data):
    assert complaint("gradient_accounting", ["own.yaml"]).startswith("own.npz: cannot be read: No ")


def test_the_table_is_long():
    assert len(CONFIGURATIONS) + len(COMMAND_LINES) + len(DATA_FILES) + len(NO_DATA_FILES) > 120


def test_a_data_file_that_unpacks_to_more_than_the_memory(complaint, tmp_path, monkeypatch):
    """A zip bomb: 20 TB of zeros, as its table of contents says; nothing is unpacked."""
    path = tmp_path / "bomb.npz"
    np.savez(path, **good_arrays())
    entry = zipfile.ZipInfo("x_train.npy")
    entry.file_size = 20 * 10**12
    monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda archive: [entry])
    (tmp_path / "a.yaml").write_text("data: {name: npz, path: bomb.npz}\n")
    line = complaint("gradient_accounting", ["a.yaml"])
    assert re.search(r"bomb.npz: size: found arrays of [0-9,.]+ GB; allowed: less than", line)


def write_bomb(path: Path, name: str, gigabytes: int) -> None:
    """Write an .npz in which array `name` is that many GB of zeros, packed to a thousandth."""
    arrays, rows = good_arrays(), gigabytes * 2**20
    arrays |= {"labels": arrays["y_train"]}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for other in sorted(arrays.keys() - {name}):
            with archive.open(f"{other}.npy", "w") as file:
                np.lib.format.write_array(file, arrays[other])
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 32, 32)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(gigabytes * 64):
                file.write(bytes(2**24))


def write_false_header(path: Path) -> None:
    """Write an .npz with a few bytes of images that claim to be 10 TB."""
    arrays = good_arrays()
    np.savez(path, **{name: arrays[name] for name in arrays if name != "x_train"})
    with zipfile.ZipFile(path, "a") as archive, archive.open("x_train.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**10, 32, 32)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1000))


def start_and_measure(folder: Path, *arguments: str) -> tuple[int, str, float]:
    """Run a real process; return its status, its stderr, and its peak memory in MB."""
    script = str(REPOSITORY / "gradient_accounting.py")
    process = subprocess.Popen(
        [sys.executable, script, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    error = process.stderr.read()
    process.stderr.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, error, usage.ru_maxrss / 1024


SCORES = ("data.split=atypical", "data.c_scores=bomb.npz")


@pytest.mark.slow(reason="packs 3 GB of zeros, and starts five processes")
def test_archives_that_would_fill_the_memory(own_data, tmp_path):
    """Images, an array that is not read, scores, and a false header; beside good data."""
    bombs = {
        "x_train": ["data.path=bomb.npz"],
        "notes": ["data.path=bomb.npz"],
        "scores": ["data.split=atypical", "data.c_scores=bomb.npz"],
        "false header": ["data.path=bomb.npz"],
    }
    np.savez(own_data, **good_arrays())
    _, error, usual = start_and_measure(tmp_path, "own.yaml")
    assert "images of at least" in error, "the data were read"
    for name, overrides in bombs.items():
        if name == "false header":
            write_false_header(tmp_path / "bomb.npz")
        else:
            write_bomb(tmp_path / "bomb.npz", name, gigabytes=1)
        assert (tmp_path / "bomb.npz").stat().st_size < 6_000_000
        status, error, peak = start_and_measure(tmp_path, "own.yaml", *overrides)
        (line,) = complaints(error)
        assert status == 2, line
        assert line.startswith("bomb.npz"), line
        assert peak < usual + 100, (name, line)
