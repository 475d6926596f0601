"""Your own images as one .npz file, checked on loading, with one line for each mistake.

x_train, x_test   uint8 [n, height, width] or [n, height, width, channels]; 1 or 3 channels
y_train, y_test   integers [n], classes 0..K-1, each of which occurs in training
noisy_label       optional, integers [n_train]: the labels as annotators gave them
c_score           optional, floats [n_train] in [0, 1]: how typical each example is
"""

import difflib
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from data.dataset import UNREADABLE, DataError, Dataset, expanded, reason

REQUIRED = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("noisy_label", "c_score")
# Images shrink by far less than MOST_PACKED; zeros, as in an archive made to fill memory, by 1,000.
MOST_PACKED = 100
UNPACKED_FREELY = 5 * 10**8  # bytes


def load_npz(path: str | Path) -> Dataset:
    """Read and check the file; nothing in it is ever unpickled."""
    path = expanded(path)
    arrays = _read_arrays(path)
    for name in ("x_train", "x_test"):
        _check_images(path, name, arrays[name])
    train_shape, test_shape = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if train_shape != test_shape:
        raise _error(path, "x_test", f"images of shape {test_shape}", f"{train_shape} as x_train")
    n = len(arrays["x_train"])
    _check_labels(path, "y_train", arrays["y_train"], n)
    classes = _count_classes(path, arrays["y_train"])
    _check_labels(path, "y_test", arrays["y_test"], len(arrays["x_test"]), classes)
    if "noisy_label" in arrays:
        _check_labels(path, "noisy_label", arrays["noisy_label"], n, classes)
    if "c_score" in arrays:
        _check_scores(path, arrays["c_score"], n)
    return Dataset(
        name="npz",
        images=_channels_first(arrays["x_train"]),
        label=_tensor(arrays["y_train"], np.int64),
        test_images=_channels_first(arrays["x_test"]),
        test_label=_tensor(arrays["y_test"], np.int64),
        class_names=tuple(str(k) for k in range(classes)),
        typicality=_tensor(arrays.get("c_score"), np.float64),
        noisy_label=_tensor(arrays.get("noisy_label"), np.int64),
    )


def _error(path: Path, name: str, found: str, allowed: str) -> DataError:
    return DataError(f"{path}: {name}: found {found}; allowed: {allowed}")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; an .npz with {', '.join(REQUIRED)} is needed")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an .npz file, or cut off; write it with np.savez")
    arrays, name = {}, "table of contents"
    try:
        require_room(path)
    except DataError:
        raise
    except UNREADABLE as error:
        raise _error(path, name, reason(error), "an .npz file") from None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            for name in [known for known in REQUIRED + OPTIONAL if known in names]:
                arrays[name] = file[name]
    except (MemoryError, *UNREADABLE) as error:  # a header may claim any size
        found = f"something unreadable ({reason(error)})"
        raise _error(path, name, found, "a plain numeric array") from None
    _check_names(path, names)
    return arrays


def require_room(path: Path) -> None:
    """Refuse arrays that unpack to more than the memory, or far further than images do."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found, packed = f"arrays of {size / 1e9:,.1f} GB", path.stat().st_size
    if size > memory:
        raise _error(
            path, "size", found, f"less than this machine's memory, {memory / 1e9:,.1f} GB"
        )
    if size > max(UNPACKED_FREELY, MOST_PACKED * packed):
        found = f"{found} in a file of {packed / 1e6:,.1f} MB"
        raise _error(path, "size", found, f"{MOST_PACKED} times the file; write it with np.savez")


def _check_names(path: Path, names: list[str]) -> None:
    """Check that every required array is there and no other name is a misspelling of one."""
    known = REQUIRED + OPTIONAL
    absent = [name for name in known if name not in names]
    unknown = [name for name in names if name not in known]
    for name in absent:
        # A wrong guess about an optional array would refuse a good file: guess only when sure.
        cutoff = 0.6 if name in REQUIRED else 0.85
        close = difflib.get_close_matches(name, unknown, n=1, cutoff=cutoff)
        if close:
            raise DataError(f"{path}: there is no {name}; did you mean it by {close[0]}?")
        if name in REQUIRED:
            found = ", ".join(names) or "nothing"
            raise DataError(f"{path}: there is no {name}; found {found}")


def _check_images(path: Path, name: str, images: np.ndarray) -> None:
    shape = f"shape {images.shape}"
    if images.ndim not in (3, 4):
        raise _error(path, name, shape, "[n, height, width] or [n, height, width, channels]")
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        raise _error(path, name, shape, "1 or 3 channels, as the last axis")
    if 0 in images.shape:
        raise _error(path, name, f"{shape}, which is empty", "one image of one pixel or more")
    if images.dtype != np.uint8:
        advice = ""
        if np.issubdtype(images.dtype, np.floating):
            advice = " (multiply images in [0, 1] by 255 and convert to uint8)"
        raise _error(path, name, f"dtype {images.dtype}", f"uint8, 0 to 255{advice}")


def _check_labels(
    path: Path, name: str, label: np.ndarray, n: int, classes: int | None = None
) -> None:
    if not np.issubdtype(label.dtype, np.integer):
        raise _error(path, name, f"dtype {label.dtype}", "integers")
    if label.shape != (n,):
        raise _error(path, name, f"shape {label.shape}", f"({n},), one label for each image")
    last = "K-1" if classes is None else classes - 1
    wrong = label < 0 if classes is None else (label < 0) | (label >= classes)
    if wrong.any():
        at = int(wrong.argmax())
        raise _error(path, name, f"label {label[at]} at position {at}", f"classes 0..{last}")


def _count_classes(path: Path, label: np.ndarray) -> int:
    present = np.unique(label)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        found = f"labels up to {present[-1]} but none of class {gaps[0]}"
        raise _error(path, "y_train", found, "classes 0..K-1, each at least once")
    if len(present) < 2:
        raise _error(path, "y_train", "one class only", "two classes or more")
    return len(present)


def _check_scores(path: Path, score: np.ndarray, n: int) -> None:
    if not np.issubdtype(score.dtype, np.floating):
        raise _error(path, "c_score", f"dtype {score.dtype}", "floating point")
    if score.shape != (n,):
        raise _error(path, "c_score", f"shape {score.shape}", f"({n},), one for each image")
    wrong = ~((score >= 0) & (score <= 1))  # NaN is caught, as it compares false with everything
    if wrong.any():
        at = int(wrong.argmax())
        raise _error(path, "c_score", f"{score[at]} at position {at}", "numbers from 0 to 1")


def _channels_first(images: np.ndarray) -> torch.Tensor:
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images))


def _tensor(array: np.ndarray | None, dtype: type) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(dtype))
