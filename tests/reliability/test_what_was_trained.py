"""One history per run, measured on the images that were trained: changes are said or refused."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gradient_accounting
import layer_rewinding
from engine.config.load import load_configs
from engine.errors import RunFailed, UserError
from engine.launch.cli import run_script
from engine.runs import files, locking, provenance
from engine.runs.run import Run, images_digest
from engine.runs.tables import HISTORY
from engine.training import build
from engine.training.build import load_split
from tests.killing import killed_after_epoch

CPU = torch.device("cpu")
CONFIG = """
device: cpu
data: {name: mnist, root: data, train_size: 60, test_size: 20, noise_rate: 0.2}
model: {name: resnet9, width: 0.05}
train: {epochs: 3, batch_size: 32, peak_epoch: 1}
rewinding: {epochs: [0, 3]}
"""


def write_mnist(seed: int) -> None:
    """MNIST's four files with small sets of random images, whose labels no seed changes."""
    raw, random = Path("data/MNIST/raw"), np.random.default_rng(seed)
    raw.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 80), ("t10k", 30)):
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        label = (np.arange(n) % 10).astype(np.uint8)
        for kind, array, magic in (("images-idx3", images, 2051), ("labels-idx1", label, 2049)):
            head = np.array([magic, *array.shape], ">i4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build._load_dataset_once.cache_clear()
    write_mnist(seed=0)
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


def change_images() -> None:
    build._load_dataset_once.cache_clear()
    write_mnist(seed=1)


def call(script, *options: str) -> int:
    return run_script(script.EXPERIMENT, "", ["config.yaml", *options])


def the_run() -> Run:
    (directory,) = Path("runs").glob("*/seed0")
    return Run.at(directory)


def interrupt(epoch: int = 1) -> None:
    with killed_after_epoch(epoch):
        call(gradient_accounting)


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------- images


def test_a_training_is_not_resumed_on_other_images(folder, capsys):
    interrupt()
    before = the_run().history_path.read_bytes()
    change_images()
    assert call(gradient_accounting) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("data: the images of mnist are not those of runs/")
    assert the_run().history_path.read_bytes() == before
    build._load_dataset_once.cache_clear()
    write_mnist(seed=0)
    assert call(gradient_accounting) == 0


def test_a_run_is_not_measured_on_other_images(folder, capsys):
    assert call(gradient_accounting) == 0
    change_images()
    assert call(layer_rewinding) == 2
    assert "the images of mnist are not those of" in capsys.readouterr().err
    assert not list(Path("runs").rglob("layer_rewinding*"))


def test_a_run_of_an_earlier_version_is_still_resumed_and_measured(folder):
    interrupt()

    def forget(content):
        del content["images"], content["starts"]

    rewrite(the_run().provenance_path, forget)
    assert call(gradient_accounting) == 0
    rewrite(the_run().provenance_path, forget)
    assert call(layer_rewinding) == 0


def test_without_a_digest_the_history_still_tells_that_the_images_are_others(folder, capsys):
    learning = ("train.epochs=20", "train.peak_epoch=5", "rewinding.epochs=[0,20]")
    assert call(gradient_accounting, *learning) == 0
    rewrite(the_run().provenance_path, lambda content: content.pop("images"))
    change_images()
    assert call(layer_rewinding, *learning) == 2
    assert "history.csv: says" in capsys.readouterr().err


def test_every_image_and_its_place_is_in_the_digest(folder):
    split = load_split(the_config())
    digest = images_digest(split)
    for name in ("images", "test_images"):
        images = getattr(split, name)
        images[5, 0, 3, 4] ^= 1
        assert images_digest(split) != digest
        images[5, 0, 3, 4] ^= 1
    assert images_digest(split) == digest
    split.images[:2] = split.images[[1, 0]]
    assert images_digest(split) != digest


def the_config():
    return load_configs("config.yaml")[0]


# ---------------------------------------------------------------- the last row of the history


def final_accuracy(run: Run) -> torch.Tensor:
    split = load_split(run.config)
    return build.load_evaluated_model(run, split, CPU)[1].correct


def test_a_measurement_first_reproduces_the_history(folder):
    assert call(gradient_accounting) == 0
    run = the_run()
    split, correct = load_split(run.config), final_accuracy(run)
    last = HISTORY.read(run.directory)[-1]
    assert correct[~split.memorized].double().mean().item() == pytest.approx(last["acc_clean"])
    run.require_reproduced(split, correct)
    one_other = correct.clone()
    one_other[(~split.memorized).nonzero()[0]] ^= True
    run.require_reproduced(split, one_other)  # rounding
    with pytest.raises(UserError, match=r"history\.csv: says .* accuracy after the last epoch"):
        run.require_reproduced(split, ~correct)


def test_a_history_without_its_last_row_is_one_line(folder, capsys):
    assert call(gradient_accounting) == 0
    run = the_run()
    lines = run.history_path.read_text().splitlines()
    run.history_path.write_text("\n".join(lines[:-1]) + "\n")
    digest = files.file_digest(run.history_path)
    rewrite(run.provenance_path, lambda c: c["files"].update({"history.csv": digest}))
    assert call(layer_rewinding) == 2
    assert "does not end with epoch 3" in capsys.readouterr().err


# ---------------------------------------------------------------- starts


def test_every_start_is_listed(folder, capsys):
    interrupt()
    assert call(gradient_accounting) == 0
    starts = files.read_json(the_run().provenance_path)["starts"]
    assert [start["from_epoch"] for start in starts] == [0, 2]
    assert {"git_commit", "git_dirty", "code", "torch", "device", "threads"} <= starts[0].keys()
    assert "resumed from epoch" not in capsys.readouterr().err


CHANGES = {
    "commit": ({"git_commit": "0" * 40, "code": None}, "with other code (0000000000"),
    "uncommitted code": ({"code": "0" * 64}, "with other code"),
    "torch": ({"torch": "1.0"}, f"torch (1.0 -> {torch.__version__.partition('+')[0]})"),
    "device": ({"device": "Abacus (7 threads)"}, "device (Abacus (7 threads) -> "),
    "threads": ({"threads": 99}, "threads (99 -> "),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("strict", [False, True])
def test_what_changed_since_the_last_start_is_said_or_refused(folder, capsys, name, strict):
    interrupt()
    values, words = CHANGES[name]
    rewrite(the_run().provenance_path, lambda content: content["starts"][-1].update(values))
    before = {path: path.read_bytes() for path in Path("runs").rglob("*.*") if path.is_file()}
    status = call(gradient_accounting, *(["--strict"] if strict else []))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "from epoch 2" in line]
    assert words in line
    assert status == (1 if strict else 0)
    if strict:
        after = {path: path.read_bytes() for path in before if path.exists()}
        assert after == before
    else:
        assert len(files.read_json(the_run().provenance_path)["starts"]) == 2


def test_a_commit_that_changes_no_code_of_a_training_is_no_change(folder, capsys):
    interrupt()
    other = {"git_commit": "0" * 40, "git_dirty": True}
    rewrite(the_run().provenance_path, lambda content: content["starts"][-1].update(other))
    assert call(gradient_accounting, "--strict") == 0
    assert "with other" not in capsys.readouterr().err


def test_an_earlier_versions_start_is_compared_as_far_as_it_is_known(folder, capsys):
    interrupt()

    def make_old(content):
        del content["starts"]
        content["versions"]["torch"] = "1.0"

    rewrite(the_run().provenance_path, make_old)
    assert call(gradient_accounting) == 0
    assert "from epoch 2 on with other torch (1.0 -> " in capsys.readouterr().err
    assert len(files.read_json(the_run().provenance_path)["starts"]) == 2


def test_a_training_that_saved_nothing_yet_has_nothing_to_mix(folder, capsys):
    interrupt()
    run = the_run()
    shutil.rmtree(run.directory / "resume")
    rewrite(run.provenance_path, lambda content: content["starts"][-1].update(torch="1.0"))
    assert call(gradient_accounting, "--strict") == 0


def test_the_code_digest_sees_an_edited_file(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    for name in provenance.CODE:
        path = tmp_path / name
        if path.suffix:
            path.write_text("a = 1\n")
        else:
            path.mkdir()
            (path / "module.py").write_text("b = 1\n")
    before = provenance.code_digest()
    assert provenance.code_digest() == before
    (tmp_path / "engine" / "module.py").write_text("b = 2\n")
    assert provenance.code_digest() != before


# ---------------------------------------------------------------- a lost lock


@pytest.mark.parametrize("moment", ["within an epoch", "between epochs"])
def test_a_training_that_lost_its_lock_saves_nothing_on_exit(folder, monkeypatch, capsys, moment):
    """The other process's files, which lie there by then, stay as they are."""
    monkeypatch.setattr(locking, "BEAT", 0.01)
    interrupt()
    run, step = the_run(), gradient_accounting.GradientAccountant.backward
    state = {}

    def lose(self, losses, batch):
        step(self, losses, batch)
        claim = run.directory / "claim.json"
        if not state:
            rewrite(claim, lambda content: content.update(token="of another", pid=1))
            state.update({p: p.read_bytes() for p in run.directory.rglob("*") if p.is_file()})
        time.sleep(0.1 if moment == "within an epoch" else 0)

    monkeypatch.setattr(gradient_accounting.GradientAccountant, "backward", lose)
    assert call(gradient_accounting) == 1
    assert "claim.json: lock lost; now held by process 1" in capsys.readouterr().err
    left = {p: p.read_bytes() for p in run.directory.rglob("*") if p.is_file()}
    assert left == state


def test_a_process_that_lost_its_lock_removes_nothing(folder):
    interrupt()
    run = the_run()
    with locking.lock(run.directory):
        rewrite(run.directory / "claim.json", lambda content: content.update(token="of another"))
        with pytest.raises(RunFailed, match="lock lost"):
            run.discard(run.resumable_epochs())
    assert run.resumable_epochs() == [1, 0]
    (run.directory / "claim.json").unlink()
