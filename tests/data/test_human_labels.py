import dataclasses
import pickle
import zipfile

import numpy as np
import pytest
import torch

from data import DataError, load_human_labels

CLEAN = np.arange(60) % 4


def human_file(path, protocol=2, **change):
    """A file as CIFAR-10N has it: a dictionary of integer arrays, pickled by torch."""
    columns = {"clean_label": CLEAN, "aggre_label": CLEAN[::-1].copy(), "worse_label": CLEAN * 0}
    torch.save(columns | change, path, pickle_protocol=protocol)
    return path


@pytest.fixture
def dataset(tiny_dataset):
    return dataclasses.replace(tiny_dataset, name="cifar10")


@pytest.mark.parametrize("name", ["cifar10", "npz"])
def test_a_column_becomes_labels(dataset, tmp_path, name):
    human_file(tmp_path / "CIFAR-10_human.pt")
    dataset = dataclasses.replace(dataset, name=name)
    label = load_human_labels(dataset, root=tmp_path, column="aggre_label")
    assert label.dtype == torch.int64
    assert label.tolist() == CLEAN[::-1].tolist()
    assert load_human_labels(dataset, root=tmp_path, column="worse_label").sum() == 0


def test_an_explicit_path(dataset, tmp_path):
    path = human_file(tmp_path / "own.pt")
    assert len(load_human_labels(dataset, root="nowhere", path=path, column="aggre_label")) == 60


def test_files_of_older_and_newer_numpy_are_read(dataset, tmp_path):
    """The function that rebuilds arrays moved from numpy.core to numpy._core."""
    path = human_file(tmp_path / "human.pt")
    names = [b"numpy.core.multiarray", b"numpy._core.multiarray"]
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for old, new in (names, names[::-1]):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in members.items():
                archive.writestr(name, content.replace(b"c" + old + b"\n", b"c" + new + b"\n"))
        label = load_human_labels(dataset, root="nowhere", path=path, column="aggre_label")
        assert label.tolist() == CLEAN[::-1].tolist()


def test_an_npz_may_carry_its_own_human_labels(tiny_dataset, tmp_path):
    noisy = torch.zeros(60, dtype=torch.int64)
    dataset = dataclasses.replace(tiny_dataset, noisy_label=noisy)
    with pytest.raises(
        DataError, match="has a noisy_label of its own, and no column 'worse_label'"
    ):
        load_human_labels(dataset, root="nowhere", column="worse_label")
    assert load_human_labels(dataset, root="nowhere", column="aggre_label") is noisy
    path = human_file(tmp_path / "own.pt")
    label = load_human_labels(dataset, root="nowhere", path=path, column="aggre_label")
    assert label.tolist() == CLEAN[::-1].tolist()


class Bomb:
    """Unpickled without care, it leaves a file behind."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (type(self.target).touch, (self.target,))


@pytest.mark.parametrize("save", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_a_pickle_that_would_run_code_runs_nothing(dataset, tmp_path, save):
    path, trace = tmp_path / "bomb.pt", tmp_path / "it_ran"
    save({"clean_label": CLEAN, "aggre_label": Bomb(trace)}, path)
    with pytest.raises(DataError, match="nothing in it was run") as error:
        load_human_labels(dataset, root="nowhere", path=path, column="aggre_label")
    assert "\n" not in str(error.value)
    assert not trace.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists()  # so that the test could have failed


def test_the_allow_list_does_not_stay(dataset, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    human_file(tmp_path / "CIFAR-10_human.pt")
    load_human_labels(dataset, root=tmp_path, column="aggre_label")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean_label": CLEAN[::-1].copy()}, "60 of 60 clean labels differ.*another order"),
        ({"clean_label": CLEAN[:50]}, "labels for 50 images, but the data set has 60"),
        ({"clean_label": None}, "no integer array clean_label"),
        ({"aggre_label": CLEAN * 1.0}, "not a file of integer arrays"),
        ({"aggre_label": CLEAN.tolist()}, "no integer array aggre_label"),
        ({"aggre_label": CLEAN[:50]}, "aggre_label must hold one label from 0 to 3 per image"),
        ({"aggre_label": CLEAN + 1}, "aggre_label must hold one label from 0 to 3 per image"),
    ],
)
def test_unfit_files_are_named(dataset, tmp_path, change, message):
    path = human_file(tmp_path / "human.pt", **change)
    with pytest.raises(DataError, match=message) as error:
        load_human_labels(dataset, root="nowhere", path=path, column="aggre_label")
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files_are_named(dataset, tmp_path):
    with pytest.raises(DataError, match=r"put CIFAR-10_human\.pt there"):
        load_human_labels(dataset, root=tmp_path, column="aggre_label")
    path = human_file(tmp_path / "CIFAR-10_human.pt")
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], pickle.dumps([1, 2])):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            load_human_labels(dataset, root=tmp_path, column="aggre_label")
        assert "\n" not in str(error.value)


def test_unknown_columns_and_other_data(dataset, tmp_path):
    with pytest.raises(DataError, match="no column 'worst_label'; allowed: aggre_label, random"):
        load_human_labels(dataset, root=tmp_path, column="worst_label")
    mnist = dataclasses.replace(dataset, name="mnist")
    with pytest.raises(DataError, match="mnist: there are no human labels"):
        load_human_labels(mnist, root=tmp_path, column="aggre_label")
