"""Skip a figure whose sources, code, settings and files are those of its last drawing.

`figures/drawn_from.json` says, by figure: a digest of code, versions and runs; the result files
that were read, with their digests; and the figure's own files, with theirs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from data import file_digest
from engine.errors import UserError
from engine.runs import files
from engine.runs.provenance import REPOSITORY, code_digest
from plotting.families import Family

NAME = "drawn_from.json"
CODE = ("data", "models", "engine", "plotting", "beyond")


def unless_unchanged(
    draw: Callable[[], tuple[Path, ...]], subject: Family | list[Family], paths: Sequence[Path]
) -> tuple[Path, ...]:
    """Return these files of a figure; draw them unless that would change nothing."""
    record, name = paths[0].with_name(NAME), paths[0].stem
    families = subject if isinstance(subject, list) else [subject]
    of = _digest([_code_digest(), *map(_describe, families)])
    drawn = _read(record)
    if _is_current(drawn.get(name), of, paths):
        return tuple(paths)
    with files.recording_reads() as read:
        made = draw()
    folder = record.parent
    entry = {
        "of": of,
        "read": {
            os.path.relpath(path, folder): file_digest(path)
            for path in sorted(read)
            if path.is_file()
        },
        "written": files.digests_of(made),
    }
    files.write_json(record, dict(sorted((_read(record) | {name: entry}).items())))
    return made


def _is_current(entry: object, of: str, paths: Sequence[Path]) -> bool:
    """Return whether a figure's entry describes its runs, sources and files as they are now."""
    if not isinstance(entry, dict) or entry.get("of") != of:
        return False
    read, written = entry.get("read"), entry.get("written")
    if not (isinstance(read, dict) and isinstance(written, dict)):
        return False
    folder = paths[0].parent
    known = {folder / name: digest for name, digest in read.items()}
    known |= {path: written.get(path.name) for path in paths}
    return all(path.is_file() and file_digest(path) == d for path, d in known.items())


def _describe(family: Family) -> list[object]:
    """Everything about a family that a figure may show, except what is in result files.

    A table that is new may add something to a figure that did without it.
    """
    runs = []
    for run in family.runs:
        tables = sorted(path.name for path in run.directory.glob("*.csv"))
        runs.append([run.directory.name, repr(run.config), tables])
    return [family.title, repr(sorted(family.settings.items())), *runs]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@cache
def _code_digest() -> str:
    """Digest of the source files that figures come from, and of the packages that draw them."""
    scripts = sorted(path.name for path in REPOSITORY.glob("*.py"))
    return f"{code_digest([*CODE, *scripts])} {version('matplotlib')} {version('numpy')}"


def _read(record: Path) -> dict:
    try:
        return files.read_json(record) if record.exists() else {}
    except UserError:  # damaged: draw again
        return {}
