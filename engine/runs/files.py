"""Files that are whole or not there: atomic writes, and reads that say what is wrong."""

import csv
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from data import file_digest
from engine.errors import UserError
from engine.runs.locking import require_held, temporary_path


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, then give it its name in one step, durably.

    `write` fills a buffer, since not every library says what went wrong when a disk is full.
    """
    buffer = io.BytesIO()
    write(buffer)
    require_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        require_held(path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the operating system names this file; that of a write names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Names of files may hold what is no text; it stays readable, in JSON as an escape."""
    content = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda file: file.write(content))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


# ---------------------------------------------------------------- CSV: what a run measured


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Floats get ten significant digits: more than float32 holds, and the same bytes every time."""

    def cell(value: object) -> object:
        return f"{value:.10g}" if isinstance(value, float) else value

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(row[column]) for column in columns] for row in rows)
    write_text(path, text.getvalue())


def read_csv(path: Path, columns: Sequence[str], text: Sequence[str] = ()) -> list[dict]:
    """The rows of a file of numbers, but for its `text` columns; its header must be `columns`.

    Where a JSON file beside it has a digest of it, it must be that very table.
    """
    lines = list(csv.reader(io.StringIO(read_text(path))))
    source = path.with_suffix(".json")
    if source.exists() and read_json(source).get("sha256") not in (None, file_digest(path)):
        raise UserError(
            f"{path}: is not what {source.name} describes: damaged, or another run's; "
            "delete it, and the script that made it makes it again"
        )
    if not lines or lines[0] != list(columns):
        raise UserError(f"{path}: damaged: its first line is not {','.join(columns)}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            cells = zip(columns, line, strict=True)
            rows.append({name: cell if name in text else float(cell) for name, cell in cells})
        except ValueError:
            raise UserError(f"{path}: damaged: line {number} is not a row of numbers") from None
    return rows


# ---------------------------------------------------------------- JSON, NumPy, torch


def write_json(path: Path, content: Mapping) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
    """The named arrays of an .npz file; nothing in the file is executed.

    With `missing`, arrays that the file does not have are left out.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if not missing or name in file}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception:  # of many kinds, and some advise to trust the file
        raise UserError(f"{path}: damaged, or not an .npz file of {', '.join(names)}") from None


def write_tensors(path: Path, content: Mapping) -> None:
    write_atomically(path, lambda file: torch.save(dict(content), file))


def read_tensors(path: Path) -> dict:
    """A dictionary of tensors and plain values; nothing in the file is executed."""
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # the error below says all there is to say
            if archive.testzip():  # torch does not look at the checksums
                raise ValueError
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception:  # what a damaged pickle or zip raises has no common type
        raise UserError(f"{path}: damaged, or not a checkpoint") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint: it holds no dictionary")
    return content


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
