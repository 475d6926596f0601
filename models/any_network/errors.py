"""The error of a network that cannot be used, and the two ways out of it."""

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

WAYS_OUT = "name other layers (model.layers), or subclass StagedModel (docs/your_network.md)"
_OWN_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parent)


class NetworkError(ValueError):
    """One line: the place, the problem, and the way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, [*known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def last_line(error: BaseException) -> str:
    """Return an exception's type and the last line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def place_of(error: BaseException) -> str:
    """Return 'FILE, line N: CODE, ' of the innermost line outside of torch, or an empty string."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in _OWN_FOLDERS):
            return f"{path.name}, line {frame.lineno}: {(frame.line or '').strip()}: "
    return ""
