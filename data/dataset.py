"""Data sets as loaders return them, and the error that loaders raise."""

import hashlib
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

# Errors of reading a damaged .npz or .npy.
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class DataError(ValueError):
    """Mistake of the user, or a missing file; its message is one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


@dataclass(frozen=True)
class Dataset:
    """Whole data set as published: in its original order, with its true labels."""

    name: str  # mnist, cifar10, svhn, glyphs or npz
    images: torch.Tensor  # uint8 [n, channels, height, width]
    label: torch.Tensor  # int64 [n]
    test_images: torch.Tensor
    test_label: torch.Tensor
    class_names: tuple[str, ...]
    typicality: torch.Tensor | None = None  # float64 [n] in [0, 1], where known
    noisy_label: torch.Tensor | None = None  # int64 [n], labels of annotators (npz only)


def expanded(path: str | Path) -> Path:
    """Replace a leading ~ or ~NAME by the home directory that it stands for."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path}: this machine has no such user; write the path in full") from None


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe may never return
            raise DataError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """Return the last line of a library's message (the cause, where chained), or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
