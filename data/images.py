"""Load a data set by name: MNIST, CIFAR-10 and SVHN through torchvision, glyphs, or your own npz.

Images stay uint8, a quarter of the memory of floats; batches normalize them.
"""

import contextlib
import difflib
import io
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.dataset import DataError, Dataset, expanded, file_digest, reason
from data.glyphs import GLYPH_NAMES, make_glyphs
from data.glyphs import SIZE as GLYPH_SIZE
from data.npz import load_npz

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "Outline",
    "at_hand",
    "file_digest",
    "full_sizes",
    "load_dataset",
    "outline",
]

DATASETS = ("mnist", "cifar10", "svhn", "glyphs", "npz")
DIGITS = tuple("0123456789")
GLYPHS_BY_DEFAULT = 4000, 1000  # for training and for testing
GLYPHS_AT_MOST = 1_000_000
NETWORK_TIMEOUT = 30  # seconds before an unresponsive network is given up


def load_dataset(
    name: str,
    *,
    root: str | Path = "datasets",
    path: str | Path | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Load the whole data set called `name`.

    `root` is the folder of the published files, also for downloads; `path` is the file of an npz.
    The sizes are the numbers of glyphs to make; for other data sets, `make_split` takes a subset.
    """
    if name == "glyphs":
        return _load_glyphs(train_size, test_size)
    if name == "npz":
        if path is None:
            raise DataError("npz: no file given; say where your .npz lies (data.path)")
        return load_npz(path)
    if name in PUBLISHED:
        return _load_published(name, expanded(root))
    close = difflib.get_close_matches(str(name), DATASETS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise DataError(f"unknown data set {name!r}; allowed: {', '.join(DATASETS)}{hint}")


@dataclass(frozen=True)
class Outline:
    """Sizes of a data set that are known before it is downloaded: for estimates."""

    shape: tuple[int, int, int]  # of an image: channels, height, width
    classes: int
    train_count: int


def is_published(name: str) -> bool:
    """Return True if the data set called `name` is downloaded where it is missing."""
    return name in PUBLISHED


def at_hand(name: str, root: str | Path = "datasets") -> bool:
    """Return True if the data set called `name` needs no download."""
    return not is_published(name) or not PUBLISHED[name].missing(expanded(root))


def outline(name: str, path: str | Path | None = None) -> Outline:
    """Return the sizes of the data set called `name` without a download; an npz is read."""
    if name == "glyphs":
        return Outline((1, GLYPH_SIZE, GLYPH_SIZE), len(GLYPH_NAMES), GLYPHS_BY_DEFAULT[0])
    if name in PUBLISHED:
        known = PUBLISHED[name]
        return Outline(known.shape, len(known.class_names), known.train_count)
    own = expanded(path) if path else None
    return _outline_once(name, own, own.stat().st_mtime_ns if own and own.exists() else None)


def full_sizes(name: str) -> tuple[int, int] | None:
    """Counts of training and test images where no size is asked for; None for an npz."""
    if name == "glyphs":
        return GLYPHS_BY_DEFAULT
    known = PUBLISHED.get(name)
    return known and (known.train_count, known.test_count)


@lru_cache
def _outline_once(name: str, path: Path | None, changed: int | None) -> Outline:
    dataset = load_dataset(name, path=path)
    return Outline(tuple(dataset.images.shape[1:]), len(dataset.class_names), len(dataset.label))


def _load_glyphs(train_size: int | None, test_size: int | None) -> Dataset:
    sizes = {
        "train_size": GLYPHS_BY_DEFAULT[0] if train_size is None else train_size,
        "test_size": GLYPHS_BY_DEFAULT[1] if test_size is None else test_size,
    }
    for key, size in sizes.items():
        if not 1 <= size <= GLYPHS_AT_MOST:
            raise DataError(f"glyphs: {key} is {size}; allowed: 1 to {GLYPHS_AT_MOST}")
    images, label, typicality = make_glyphs(sizes["train_size"], "train")
    test_images, test_label, _ = make_glyphs(sizes["test_size"], "test")
    return Dataset("glyphs", images, label, test_images, test_label, GLYPH_NAMES, typicality)


@dataclass(frozen=True)
class _Published:
    """Data set that torchvision reads: its files and sizes."""

    folder: str  # below the root
    files: tuple[str, ...]
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # of an image
    train_count: int
    test_count: int

    def missing(self, root: Path) -> list[str]:
        return [file for file in self.files if not (root / self.folder / file).is_file()]


PUBLISHED = {
    "mnist": _Published(
        "MNIST/raw",
        (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ),
        DIGITS,
        (1, 28, 28),
        60_000,
        10_000,
    ),
    "cifar10": _Published(
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        (
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        (3, 32, 32),
        50_000,
        10_000,
    ),
    "svhn": _Published(
        "", ("train_32x32.mat", "test_32x32.mat"), DIGITS, (3, 32, 32), 73_257, 26_032
    ),
}


def _load_published(name: str, root: Path) -> Dataset:
    """Read the files below root, after downloading missing ones.

    Existing files are never replaced; a damaged file is reported.
    """
    source = PUBLISHED[name]
    where = root / source.folder
    files = ", ".join(source.files)
    missing = source.missing(root)
    try:
        with _considerate_network():
            if missing:
                _download(name, root, source)
            train, test = (_read_half(name, root, train) for train in (True, False))
    except ModuleNotFoundError:
        raise  # SVHN without scipy is a broken installation, not a broken file
    except Exception as error:  # torchvision raises nearly anything when a file is damaged
        if missing := source.missing(root):
            raise DataError(
                f"{name}: {where / missing[0]} is not there and could not be downloaded"
                f" ({reason(error)}); put these files into {where}: {files}"
            ) from None
        raise DataError(
            f"{name}: a file in {where} is damaged or incomplete ({reason(error)});"
            f" replace it, or delete it to have it downloaded again; the files are {files}"
        ) from None
    return Dataset(name, *train, *test, source.class_names)


def _download(name: str, root: Path, source: _Published) -> None:
    """Download all files into a folder of their own, and take over the missing ones.

    torchvision extracts whole archives, and would replace the other files too.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        for train in (True, False):
            _read_half(name, Path(folder), train, download=True)
        for file in source.missing(root):
            path = Path(source.folder, file)
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(folder) / path, root / path)


def _read_half(
    name: str, root: Path, train: bool, download: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read training or test images uint8 NCHW and labels int64, through torchvision."""
    from torchvision import datasets as published  # takes more than a second to import

    if name == "mnist":
        half = published.MNIST(root, train=train, download=download)
        images, label = half.data[:, None], half.targets
    elif name == "cifar10":
        half = published.CIFAR10(root, train=train, download=download)
        images, label = half.data.transpose(0, 3, 1, 2), half.targets
    else:
        half = published.SVHN(root, split="train" if train else "test", download=download)
        images, label = half.data, half.labels
    images = torch.from_numpy(np.ascontiguousarray(images))
    label = torch.as_tensor(label, dtype=torch.int64)
    if len(images) != len(label):
        raise DataError(f"{len(images)} images but {len(label)} labels")
    return images, label


@contextlib.contextmanager
def _considerate_network() -> Iterator[None]:
    """Set a timeout for downloads, and keep torchvision's messages off stdout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
