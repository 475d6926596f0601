"""CIFAR-10N (Wei et al., 2022): labels given by people, as natural label noise."""

import warnings
from pathlib import Path

import numpy as np
import torch

from data.dataset import DataError, Dataset, expanded

FILE = "CIFAR-10_human.pt"
SOURCE = f"https://github.com/UCSC-REAL/cifar-10-100n (data/{FILE})"
COLUMNS = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")


def load_human_labels(
    dataset: Dataset,
    *,
    root: str | Path,
    path: str | Path | None = None,
    column: str = "aggre_label",
) -> torch.Tensor:
    """Load the labels of one column, int64 [n], from `path` or ROOT/CIFAR-10_human.pt.

    The file's clean labels must be the data set's own. Without a path, the noisy_label of an npz is
    used, which has no columns.
    """
    if path is None and dataset.noisy_label is not None:
        if column != COLUMNS[0]:
            raise DataError(
                f"{dataset.name}: the file has a noisy_label of its own, and no column {column!r};"
                " leave data.human_labels.column out"
            )
        return dataset.noisy_label
    if path is None and dataset.name not in ("cifar10", "npz"):
        raise DataError(f"{dataset.name}: there are no human labels for it, only for CIFAR-10")
    if column not in COLUMNS:
        raise DataError(f"human labels: no column {column!r}; allowed: {', '.join(COLUMNS)}")
    path = expanded(Path(root) / FILE if path is None else path)
    if not path.is_file():
        remedy = f"put {FILE} there from {SOURCE}"
        if dataset.name == "npz":
            remedy = f"give the npz a noisy_label array or, for images of CIFAR-10, {remedy}"
        raise DataError(f"{path} is not there; {remedy}")
    columns = _read_columns(path, ("clean_label", column))
    _check_clean_labels(path, columns["clean_label"], dataset.label.numpy())
    label = columns[column]
    classes = len(dataset.class_names)
    if label.shape != (len(dataset.label),) or not ((label >= 0) & (label < classes)).all():
        raise DataError(f"{path}: {column} must hold one label from 0 to {classes - 1} per image")
    return torch.from_numpy(label.astype(np.int64))


def _read_columns(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read arrays of a pickled dictionary without running code from the pickle.

    Torch's restricted reader refuses all functions but its own few and these, which rebuild an
    array of 64-bit integers.
    """
    reconstruct = np.empty(0).__reduce__()[0]  # it has moved between versions of NumPy
    allowed = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
    ]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on files that it then refuses
            columns = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(
            f"{path}: not a file of integer arrays as CIFAR-10N has it, or damaged;"
            f" nothing in it was run ({type(error).__name__}); it comes from {SOURCE}"
        ) from None
    for name in names:
        array = columns.get(name) if isinstance(columns, dict) else None
        if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{path}: there is no integer array {name} in it")
    return columns


def _check_clean_labels(path: Path, clean: np.ndarray, label: np.ndarray) -> None:
    if clean.shape != label.shape:
        raise DataError(
            f"{path}: labels for {clean.size} images, but the data set has {len(label)}"
        )
    if (differ := int((clean != label).sum())) > 0:
        raise DataError(
            f"{path}: {differ} of {len(label)} clean labels differ from the data set's:"
            " these labels belong to other images, or to another order"
        )
