import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import CIFAR10, MNIST, SVHN

from data import DataError, file_digest, load_dataset

GENERATOR = np.random.default_rng(0)


def idx_file(array: np.ndarray) -> bytes:
    """MNIST's own format: magic number, sizes, bytes."""
    header = [0x800 + array.ndim, *array.shape]
    return np.array(header, ">i4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_root(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for half, n in (("train", 30), ("t10k", 10)):
        images = GENERATOR.integers(0, 256, (n, 28, 28))
        (folder / f"{half}-images-idx3-ubyte").write_bytes(idx_file(images))
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(idx_file(np.arange(n) % 10))
    return tmp_path


@pytest.fixture
def svhn_root(tmp_path, monkeypatch):
    monkeypatch.setattr(
        SVHN, "split_list", {k: [url, file, None] for k, (url, file, _) in SVHN.split_list.items()}
    )
    for half, n in (("train", 25), ("test", 9)):
        x = GENERATOR.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        savemat(tmp_path / f"{half}_32x32.mat", {"X": x, "y": np.arange(n)[:, None] % 10 + 1})
    return tmp_path


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, name, [[file, None] for file, _ in getattr(CIFAR10, name)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, file in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        batch = {"data": np.full((4, 3072), number, np.uint8), "labels": [number, 7, 8, 9]}
        batch["data"][:, 1024:2048] += 100  # green
        batch["data"][:, :32] += 50  # the upper border of red
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return tmp_path


def test_mnist(mnist_root):
    dataset = load_dataset("mnist", root=mnist_root)
    assert dataset.images.shape == (30, 1, 28, 28)
    assert dataset.test_images.shape == (10, 1, 28, 28)
    assert dataset.images.dtype == torch.uint8
    assert dataset.label.tolist() == [i % 10 for i in range(30)]
    assert dataset.class_names == tuple("0123456789")
    raw = (mnist_root / "MNIST/raw/train-images-idx3-ubyte").read_bytes()
    assert dataset.images.numpy().tobytes() == raw[16:]


def test_svhn_names_the_digit_zero_0(svhn_root):
    dataset = load_dataset("svhn", root=svhn_root)
    assert dataset.images.shape == (25, 3, 32, 32)
    assert dataset.test_images.shape == (9, 3, 32, 32)
    assert dataset.images.is_contiguous()
    assert dataset.label.dtype == torch.int64
    assert dataset.label.tolist() == [(i + 1) % 10 for i in range(25)]


def test_cifar10_keeps_order_channels_and_rows(cifar_root):
    dataset = load_dataset("cifar10", root=cifar_root)
    assert dataset.images.shape == (20, 3, 32, 32)
    assert dataset.images[:, :, 9, 0].tolist() == [
        [i // 4, i // 4 + 100, i // 4] for i in range(20)
    ]
    assert (dataset.images[:4, 0, 0] == 50).all()
    assert (dataset.images[:4, 0, 1:] == 0).all()
    assert dataset.label[::4].tolist() == [0, 1, 2, 3, 4]
    assert dataset.test_label.tolist() == [5, 7, 8, 9]
    assert dataset.class_names[3] == "cat"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", ["MNIST/raw", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
        ("cifar10", ["cifar-10-batches-py", "data_batch_1", "test_batch", "batches.meta"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
    ],
)
def test_without_files_and_network_one_line_says_which_files_go_where(tmp_path, name, files, capfd):
    with pytest.raises(DataError) as error:
        load_dataset(name, root=tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert "no network in tests" in message
    assert str(tmp_path) in message
    assert all(file in message for file in files)
    assert capfd.readouterr() == ("", "")


def test_one_missing_file_is_named(mnist_root):
    (mnist_root / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is not there"):
        load_dataset("mnist", root=mnist_root)


def test_a_download_replaces_no_file_that_is_there(mnist_root, tmp_path_factory, monkeypatch):
    """torchvision would extract all four again."""
    published = tmp_path_factory.mktemp("published")
    shutil.copytree(mnist_root / "MNIST", published / "MNIST")
    own = mnist_root / "MNIST/raw"
    labels = idx_file(np.full(10, 7))
    (own / "t10k-labels-idx1-ubyte").write_bytes(labels)
    (own / "train-labels-idx1-ubyte").unlink()

    def download(self):
        shutil.copytree(published / "MNIST/raw", self.raw_folder, dirs_exist_ok=True)

    monkeypatch.setattr(MNIST, "download", download)
    dataset = load_dataset("mnist", root=mnist_root)
    assert dataset.label.tolist() == [i % 10 for i in range(30)]
    assert set(dataset.test_label.tolist()) == {7}
    assert (own / "t10k-labels-idx1-ubyte").read_bytes() == labels
    assert [path.name for path in mnist_root.iterdir()] == ["MNIST"]


@pytest.mark.parametrize("size", [0, 3, 10, 5000])
def test_a_cut_off_mnist_file_is_one_clear_line_and_stays(mnist_root, size):
    file = mnist_root / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=r"mnist: a file in .* is damaged or incomplete") as error:
        load_dataset("mnist", root=mnist_root)
    assert "\n" not in str(error.value)
    assert file.stat().st_size == size


def test_images_without_labels_are_damage(mnist_root):
    (mnist_root / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx_file(np.arange(29) % 10))
    with pytest.raises(DataError, match="30 images but 29 labels"):
        load_dataset("mnist", root=mnist_root)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_files_that_are_not_the_published_ones_are_damage(tmp_path, name):
    """torchvision's own checksums are in force here."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / file).write_bytes(b"not a batch")
    for half in ("train", "test"):
        (tmp_path / f"{half}_32x32.mat").write_bytes(b"not a matrix")
    with pytest.raises(DataError, match=f"{name}: a file in .* is damaged or incomplete"):
        load_dataset(name, root=tmp_path)


def test_glyphs_come_in_the_size_that_is_asked_for():
    dataset = load_dataset("glyphs", train_size=120, test_size=30)
    assert dataset.images.shape == (120, 1, 20, 20)
    assert len(dataset.typicality) == 120
    assert len(dataset.test_label) == 30
    assert len(dataset.class_names) == 10
    with pytest.raises(DataError, match="train_size is 0; allowed: 1 to 1000000"):
        load_dataset("glyphs", train_size=0)


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(DataError, match=r"'cifar'; allowed: mnist, .*; did you mean cifar10"):
        load_dataset("cifar")


def test_file_digest(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert file_digest(str(tmp_path / "file")) == file_digest(tmp_path / "file")


def test_a_data_error_is_one_line():
    assert str(DataError("one\n  two\nthree")) == "one two three"
