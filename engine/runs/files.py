"""Files that are whole or absent: atomic writes, and reads that name the damage."""

import csv
import errno
import io
import json
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from data import file_digest
from engine.errors import UserError
from engine.runs.locking import remove_dead_temporaries, require_held, temporary_path

LARGEST_COUNT = 1e9  # no table counts further: a larger number would only fill the memory
COUNTS = frozenset({
    "epoch", "group", "layer", "example", "index", "label", "true_label", "prediction_after",
    "memorized", "neurons", "flipped", "forgotten", "kept", "examples", "draw", "runs",
})  # fmt: skip

_reads: ContextVar[set[Path] | None] = ContextVar("reads", default=None)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, flush it to the disk, then rename it to `path`.

    `write` fills a buffer, since not every library reports a full disk.
    """
    buffer = io.BytesIO()
    write(buffer)
    require_held(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead_temporaries(path)
        temporary = temporary_path(path)
        try:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            require_held(path)
            os.replace(temporary, path)
        finally:
            # Even an absent file cannot be unlinked on a read-only disk.
            with suppress(OSError):
                temporary.unlink()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name this file in an operating system's error: a write names none, an open a temporary."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def recording_reads() -> Iterator[set[Path]]:
    """Collect the paths of all result files that are read inside."""
    read: set[Path] = set()
    token = _reads.set(read)
    try:
        yield read
    finally:
        _reads.reset(token)


def _pass_on_disk_error(error: Exception, path: Path) -> None:
    """Raise the error of a file that could not be read: it may be whole.

    A damaged archive that points before its own beginning is an invalid argument (EINVAL).
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise OSError(error.errno, error.strerror, str(path)) from None


def require_regular(path: Path) -> None:
    """Refuse a path that is no plain file: opening a named pipe may never return."""
    if (reads := _reads.get()) is not None:
        reads.add(path)
    with suppress(OSError):  # the read that follows says what is wrong
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is not a regular file")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; bytes of file names that are not text become escapes, also valid in JSON."""
    content = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda file: file.write(content))


def update_text(path: Path, text: str) -> None:
    """Write a file unless it holds this text already."""
    content = text.encode("utf-8", "backslashreplace")
    if not (path.is_file() and path.read_bytes() == content):
        write_text(path, text)


def read_text(path: Path) -> str:
    require_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


# ---------------------------------------------------------------- CSV: measured tables


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    write_text(path, csv_text(columns, rows))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Format floats with ten significant digits: more than float32 holds, equal text each time."""

    def cell(value: object) -> object:
        return f"{value:.10g}" if isinstance(value, float) else value

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(row[column]) for column in columns] for row in rows)
    return text.getvalue()


def read_csv(
    path: Path, columns: Sequence[str], text: Sequence[str] = (), added: Sequence[str] = ()
) -> list[dict]:
    """Read rows of numbers, except the `text` columns.

    A table without any of the `added` columns has nan there.
    """
    header, *lines = read_lines(path, columns, added)
    lacking = dict.fromkeys([name for name in columns if name not in header], math.nan)
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            cells = zip(header, line, strict=True)
            row = {name: cell if name in text else float(cell) for name, cell in cells} | lacking
        except ValueError:
            raise UserError(f"{path}: damaged: line {number} is not a row of numbers") from None
        for name in columns:
            if name not in text and not _possible(name, row[name]):
                raise UserError(
                    f"{path}: damaged: line {number}: {name}: {row[name]:g} is not {_allowed(name)}"
                )
        rows.append(row)
    return rows


def read_lines(path: Path, columns: Sequence[str], added: Sequence[str] = ()) -> list[list[str]]:
    """Read the cells of a table whose header is `columns`, with all or none of those `added`.

    Where a JSON file beside the table has a digest, the table must match it.
    """
    source = path.with_suffix(".json")
    if source.exists() and read_json(source).get("sha256") not in (None, file_digest(path)):
        raise UserError(
            f"{path}: is not what {source.name} describes: damaged, or another run's; "
            "delete it, and the script that made it makes it again"
        )
    lines = _csv_lines(path)
    early = [name for name in columns if name not in added]
    if lines[:1] not in ([list(columns)], [early]):
        raise UserError(f"{path}: damaged: its first line is not {','.join(columns)}")
    return lines


def _csv_lines(path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(read_text(path))))
    except csv.Error as error:  # a field of more than 128 KB
        raise UserError(f"{path}: damaged: {error}") from None


def _possible(column: str, value: float) -> bool:
    """Return whether a measurement can have this value in a column of this name."""
    if column in COUNTS:
        return 0 <= value <= LARGEST_COUNT
    if column.startswith("acc_"):
        return math.isnan(value) or 0 <= value <= 1
    return True


def _allowed(column: str) -> str:
    return "a number from 0 to 1" if column.startswith("acc_") else "a number from 0 to 1e9"


# ---------------------------------------------------------------- JSON, NumPy, torch


def write_json(path: Path, content: Mapping) -> None:
    write_text(path, _as_json(content))


def update_json(path: Path, content: Mapping) -> None:
    """Write a file unless it holds this content already."""
    update_text(path, _as_json(content))


def _as_json(content: Mapping) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged: not valid JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    return content


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_arrays(path: Path, *names: str, missing: bool = False) -> dict[str, np.ndarray]:
    """Read the named arrays of an .npz file without executing anything in it.

    With `missing`, arrays that the file does not have are left out. `write_arrays` compresses
    nothing: a compressed file is not from here, and may unpack to more than the memory holds.
    """
    require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if not missing or name in file}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # of many types, and some advise to trust the file
        _pass_on_disk_error(error, path)
        raise UserError(f"{path}: damaged, or not an .npz file of {', '.join(names)}") from None


def write_tensors(path: Path, content: Mapping) -> None:
    write_atomically(path, lambda file: torch.save(dict(content), file))


def read_tensors(path: Path) -> dict:
    """Read a dictionary of tensors and plain values without executing anything in the file."""
    require_regular(path)
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # the error below says everything
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError
            if archive.testzip():  # torch ignores the checksums
                raise ValueError
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle or zip raises errors without a common type
        _pass_on_disk_error(error, path)
        raise UserError(f"{path}: damaged, or not a checkpoint") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint: it holds no dictionary")
    return content


def digests_of(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    return {path.name: file_digest(path) for path in paths}


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
