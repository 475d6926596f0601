"""Run directories: one for each training, found again, and never confused."""

import pickle

import numpy as np
import pytest
import torch

import gradient_accounting
from engine.config.load import load_configs, to_yaml
from engine.errors import UserError
from engine.runs import files
from engine.runs.identity import run_directory
from engine.runs.run import Run, each_once, load_weights
from engine.training.build import load_split, make_model

TRAINING = [
    "seed=1", "precision=bf16", "data.noise_rate=0.3", "data.noise_seed=2", "data.train_size=99",
    "data.test_size=30", "data.augment=true", "model.width=0.5", "train.epochs=4",
    "train.batch_size=16", "train.peak_lr=0.2", "train.peak_epoch=2", "train.momentum=0.5",
    "train.weight_decay=0", "train.schedule=warmup_cosine", "train.account_gradients=false",
]  # fmt: skip


def test_what_decides_the_weights_decides_the_directory(tiny):
    directories = [run_directory(tiny(*o)) for o in ([], *([t] for t in TRAINING))]
    assert len(set(directories)) == len(directories)


@pytest.mark.parametrize(
    "override",
    ["name=other", "device=auto", "data.root=/elsewhere", "checkpoints.keep=[3]",
     "data.c_score_threshold=0.7", "data.human_labels.column=worse_label",
     "rewinding.epochs=all", "retraining.peak_lr=0.3"],
)  # fmt: skip
def test_what_does_not_decide_the_weights_does_not(tiny, override):
    assert run_directory(tiny(override)) == run_directory(tiny())


def test_names_can_be_read(tiny):
    directory = run_directory(tiny("seed=3"))
    assert directory.name == "seed3"
    assert directory.parent.name.startswith("glyphs-resnet9-noise0.2-n150-width0.05-")


def test_own_data_are_known_by_content_not_by_place(tiny, tmp_path):
    (tmp_path / "x y.npz").write_bytes(b"one")
    (tmp_path / "z.npz").write_bytes(b"one")
    (tmp_path / "w.npz").write_bytes(b"two")

    def digest(name):
        config = tiny("data.name=npz", f"data.path={tmp_path / name}")
        return run_directory(config).parent.name[-8:]

    assert digest("x y.npz") == digest("z.npz") != digest("w.npz")
    with pytest.raises(Exception, match=r"nowhere\.npz"):
        digest("nowhere.npz")


@pytest.fixture
def finished(tiny) -> Run:
    run = Run.of(tiny("train.epochs=1"))
    gradient_accounting.EXPERIMENT.main(run)
    return run


def test_a_moved_run_is_still_itself(finished, tmp_path):
    moved = finished.directory.rename(tmp_path / "moved run")
    run = Run.at(moved)
    assert run.finished
    assert run.config == finished.config
    assert run.read_checkpoint(1).keys() == run.read_checkpoint(0).keys()


def test_an_override_cannot_change_what_was_trained(finished):
    assert Run.at(finished.directory, ("device=auto",)).config.device == "auto"
    with pytest.raises(UserError, match=r"train\.peak_lr: cannot be changed"):
        Run.at(finished.directory, ("train.peak_lr=3",))


def test_a_directory_that_holds_another_run_is_left_alone(finished, tiny):
    other = Run.of(tiny("train.epochs=1", "seed=7"))
    finished.directory.rename(other.directory)
    with pytest.raises(UserError, match=r"provenance\.json: belongs to another run; move .*seed7"):
        gradient_accounting.EXPERIMENT.main(other)


def test_provenance_says_where_it_came_from(finished):
    found = files.read_json(finished.provenance_path)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"git_commit", "git_dirty", "device", "command", "seconds"} <= found.keys()
    assert found["finished"] is True
    assert finished.config_path.read_text() == to_yaml(finished.config)


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_damaged_and_foreign_checkpoints_get_one_line(finished, tiny, tmp_path):
    path = finished.checkpoint_path(1)
    good = path.read_bytes()
    trace = tmp_path / "executed"

    def complaint() -> str:
        with pytest.raises(UserError) as caught:
            finished.read_checkpoint(1)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert "damaged" in complaint()
    path.write_bytes(pickle.dumps(Bomb(trace)))
    assert "damaged" in complaint()
    torch.save(Bomb(trace), path)
    assert "damaged" in complaint()
    assert not trace.exists()
    torch.save([1, 2], path)
    assert "holds no dictionary" in complaint()
    path.write_bytes(finished.checkpoint_path(0).read_bytes())
    assert "is of epoch 0, not 1" in complaint()
    path.unlink()
    assert "no such file" in complaint()

    other = Run.of(tiny("train.epochs=1", "seed=5"))
    gradient_accounting.EXPERIMENT.main(other)
    path.write_bytes(other.checkpoint_path(1).read_bytes())
    assert "belongs to another run" in complaint()


def test_weights_of_another_model_are_refused(finished, tiny):
    config = tiny("model.width=0.1")
    model = make_model(config, load_split(config))
    with pytest.raises(UserError, match=r"of another model: conv1\.conv\.weight is \(3, 1, 3, 3\)"):
        load_weights(model, finished.read_checkpoint(0), finished.checkpoint_path(0))


def test_a_write_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.csv"
    files.write_csv(path, ("x",), [{"x": 1}])

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert path.read_text() == "x\n1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("content", ["", "y\n1\n", "x\n1,2\n", "x\none\n"])
def test_damaged_tables_get_one_line(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        files.read_csv(tmp_path / "a.csv", ("x",))


@pytest.mark.parametrize("key", ["flipping.ablate=[activation,weight]", "device=[auto,cpu]"])
def test_a_sweep_cannot_measure_one_run_in_two_ways(tiny_file, key):
    configs = load_configs(tiny_file, [f"sweep.{key}"])
    with pytest.raises(UserError, match=f"sweep: {key.partition('=')[0]}: changes no training"):
        each_once(map(Run.of, configs))


def test_runs_that_two_settings_lead_to_are_worked_on_once(tiny_file):
    configs = load_configs(tiny_file, ["sweep.dropout.p_gen=[0.2,0.4]"])  # without dropout
    assert len(each_once(map(Run.of, configs))) == 1


def test_a_home_directory_may_be_written_with_a_tilde(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arrays = {"x_train": np.zeros((9, 4, 4), np.uint8), "y_train": np.arange(9) % 3}
    np.savez(tmp_path / "own.npz", x_test=arrays["x_train"], y_test=arrays["y_train"], **arrays)
    own = ("data.name=npz", "data.train_size=null", "data.test_size=null")
    run = Run.of(tiny(*own, "data.path=~/own.npz", "output_dir=~/results"))
    assert run.directory.parents[1] == tmp_path / "results"
    assert run.identity == Run.of(tiny(*own, f"data.path={tmp_path / 'own.npz'}")).identity
