"""C-scores: how typical each training example is, in [0, 1] (Jiang et al., 2021).

A C-score is the share of held-out models that classify an example correctly. The paper calls the
examples below 0.5 atypical: 4,838 of CIFAR-10 and 1,098 of MNIST.
"""

import contextlib
import hashlib
import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.dataset import UNREADABLE, DataError, Dataset, expanded, file_digest, reason
from data.npz import require_room

NETWORK_TIMEOUT = 30  # seconds


@dataclass(frozen=True)
class _Published:
    file: str
    address: str
    size: int  # bytes
    sha256: str

    def check(self, path: Path, origin: str | None = None) -> None:
        """Raise DataError unless the file is, byte for byte, the published one."""
        size = path.stat().st_size
        if size != self.size:
            fault = f"{size} bytes instead of {self.size}"
        elif (digest := file_digest(path)) != self.sha256:
            fault = f"SHA-256 {digest} instead of {self.sha256}"
        else:
            return
        raise DataError(
            f"{origin or path}: not the published {self.file}, or damaged: {fault};"
            f" the original comes from {self.address}"
        )


PUBLISHED = {
    "cifar10": _Published(
        "cifar10-cscores-orig-order.npz",
        "https://pluskid.github.io/structural-regularity/cscores/cifar10-cscores-orig-order.npz",
        800_470,
        "0f8b3e219fd37867fc1ef532335b6169f8109d137275ae53b802bb8177556ac8",
    ),
    "mnist": _Published(
        "mnist-cscores.npy",
        "https://raw.githubusercontent.com/pluskid/structural-regularity/"
        "021c363637e4433ab28910376128a6764b9db362/mnist-cscores.npy",
        480_128,
        "2e0d1a2dd4be77592e4d4570df7ae764068398187bde7c02aa071a2e05a99a34",
    ),
}


def load_c_scores(
    dataset: Dataset, *, root: str | Path, path: str | Path | None = None
) -> torch.Tensor:
    """Load a score for each training example, float64 [n], in the data set's order.

    Without a path: the data set's own scores, or the published file ROOT/c_scores/FILE, which
    is downloaded if it is not there. With a path: an .npz of labels and scores in the data set's
    order, or the published .npy of MNIST.
    """
    if path is not None:
        path = expanded(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file of C-scores")
    elif dataset.typicality is not None:
        return dataset.typicality
    else:
        path = _find_published(dataset.name, expanded(root) / "c_scores")
    scores = _read_npy(path) if path.suffix == ".npy" else _read_npz(path, dataset.label.numpy())
    n = len(dataset.label)
    if scores.shape != (n,):
        raise DataError(f"{path}: scores of shape {scores.shape}, but the data set has {n} images")
    if not (np.issubdtype(scores.dtype, np.floating) and ((scores >= 0) & (scores <= 1)).all()):
        raise DataError(f"{path}: C-scores must be numbers from 0 to 1 without NaN")
    return torch.from_numpy(scores.astype(np.float64))


def c_scores_published(name: str) -> bool:
    """Return True if a data set's scores are published as a file to download."""
    return name in PUBLISHED


def c_scores_at_hand(name: str, root: str | Path) -> bool:
    """Return True if the published scores of a data set are below `root`."""
    if not c_scores_published(name):
        return False
    return (expanded(root) / "c_scores" / PUBLISHED[name].file).is_file()


def tfds_order(n: int) -> np.ndarray:
    """Return the order of the TensorFlow Datasets release: entry p is official example order[p].

    It sorted the training set by hashes of its keys, which can be repeated without TensorFlow.
    """
    keys = [hashlib.md5(f"train{i}".encode(), usedforsecurity=False).digest() for i in range(n)]
    return np.array(sorted(range(n), key=keys.__getitem__), dtype=np.int64)


def _find_published(name: str, folder: Path) -> Path:
    """Return the published file below `folder`, downloaded if missing, and verified."""
    if name not in PUBLISHED:
        hint = "a c_score array in the file, or " if name == "npz" else ""
        raise DataError(
            f"{name}: there are no published C-scores for it;"
            f" give {hint}the path of an .npz with labels and scores (data.c_scores)"
        )
    source = PUBLISHED[name]
    path = folder / source.file
    if not path.is_file():
        _download(source, path)
    source.check(path)
    return path


def _download(source: _Published, path: Path) -> None:
    """Download the file; it gets its name only when complete and verified."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(source.address, timeout=NETWORK_TIMEOUT) as response:
            part.write_bytes(response.read())
        source.check(part, origin=f"the download for {path}")
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{path} is not there and could not be downloaded ({reason(error)}); put"
            f" {source.file} into {path.parent}; it comes from {source.address}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _read_npz(path: Path, label: np.ndarray) -> np.ndarray:
    """Read scores in the data set's order, verified by the labels in the file."""
    try:
        require_room(path)
        with np.load(path, allow_pickle=False) as file:
            labels, scores = file["labels"], file["scores"]
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, *UNREADABLE) as error:
        raise DataError(
            f"{path}: cannot be read as an .npz with labels and scores ({reason(error)})"
        ) from None
    if labels.shape != label.shape:
        raise DataError(
            f"{path}: labels of shape {labels.shape}, but the data set has {len(label)} images"
        )
    if (differ := int((labels != label).sum())) > 0:
        raise DataError(
            f"{path}: {differ} of {len(label)} labels differ from the data set's:"
            " these are the C-scores of other data, or in another order"
        )
    return scores


def _read_npy(path: Path) -> np.ndarray:
    """Read MNIST's published scores in the official order.

    An .npy holds no labels to verify its order, so no other file is accepted.
    """
    PUBLISHED["mnist"].check(path)
    in_tfds_order = np.load(path, allow_pickle=False)
    scores = np.empty_like(in_tfds_order)
    scores[tfds_order(len(scores))] = in_tfds_order
    return scores
