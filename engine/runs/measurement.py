"""Measurements of a finished run: part by part, with the settings that they came from.

A measurement leaves three things in the run's directory. Parts (`parts/<name>-<digest>/`) are saved
as soon as each is measured, and stay: a killed measurement resumes with the next part, and a return
to earlier settings measures nothing again. The table (`<name>.csv`) is made from the parts. The
source (`<name>.json`) names the settings, code and machine of the table; it is written last and
holds the table's digest, so that a table without its own source never counts as finished.

The table in the run's directory is of the settings asked for last. Before one of other settings
replaces it, table and source are copied to `other_settings/<name>-<digest>/`, and come back from
there when their settings are asked for again.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from data import file_digest
from engine.errors import UserError
from engine.runs import files, provenance
from engine.runs.run import Run
from engine.runs.stopping import safe_point
from engine.runs.tables import ResultTable

Part = TypeVar("Part")

OTHER_SETTINGS = "other_settings"


@dataclass(frozen=True)
class KeptTable:
    """A table of settings other than those of the table in its run's directory."""

    path: Path
    settings: dict[str, object]

    @classmethod
    def below(cls, directory: Path) -> Iterator["KeptTable"]:
        """Yield the kept tables of a run; name a source that is damaged on stderr."""
        for source in sorted((directory / OTHER_SETTINGS).glob("*/*.json")):
            if isinstance(settings := _read_source(source).get("settings"), dict):
                yield cls(source.with_suffix(".csv"), settings)

    def differences(self, current: Mapping[str, object] | None) -> dict[str, object]:
        """Return the values of all settings that differ; None for one that this table lacks."""
        current = current or {}
        keys = {**self.settings, **current}
        return {k: self.settings.get(k) for k in keys if self.settings.get(k) != current.get(k)}


def keep_aside(source: Path, settings: Mapping[str, object], *tables: Path) -> None:
    """Copy tables and their source to other_settings/ unless they are of these settings.

    Tables that are not the source's, by the digests that it has, are left alone: a process that was
    killed between writing them and their source left them without one.
    """
    if not all(path.exists() for path in (source, *tables)):
        return
    content = _read_source(source)
    before, digests = content.get("settings"), content.get("tables")
    if not isinstance(before, dict) or before == settings:
        return
    if isinstance(digests, dict) and digests != files.digests_of(tables):
        return
    for path in (*tables, source):
        _copy(path, _folder_aside(source, before) / path.name)


def _read_source(path: Path) -> dict[str, object]:
    """Read what a table was measured with; empty, with a line on stderr, if it is damaged."""
    try:
        return files.read_json(path)
    except UserError as error:
        print(f"{error}; the table beside it is left out", file=sys.stderr)
        return {}


def _folder_aside(source: Path, settings: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return source.parent / OTHER_SETTINGS / f"{source.stem}-{digest[:8]}"


def _copy(path: Path, to: Path) -> None:
    content = path.read_bytes()
    files.write_atomically(to, lambda file: file.write(content))


class Measurement:
    """One table of a run, made with some settings.

    `settings` decide the content of a part: parts of other settings are never read. `selection`
    only decides which parts the table is made from, so that asking for more reuses existing parts.
    """

    def __init__(
        self,
        run: Run,
        table: ResultTable,
        settings: Mapping[str, object],
        selection: Mapping[str, object] | None = None,
    ) -> None:
        self.run, self.table = run, table
        self.path = table.path(run.directory)
        self.source_path = self.path.with_suffix(".json")
        # As JSON gives them back: tuples are lists there.
        self.settings = json.loads(json.dumps({**settings, **(selection or {})}))
        decisive = json.dumps(dict(settings), sort_keys=True)
        self.digest = hashlib.sha256(f"{run.identity} {decisive}".encode()).hexdigest()
        self.folder = run.directory / "parts" / f"{self.path.stem}-{self.digest[:12]}"
        self.began, self.piece = time.monotonic(), 0.0  # of the newest part: start and seconds

    @property
    def finished(self) -> bool:
        """Return whether the table is complete, undamaged, and from this run and these settings."""
        return self._state(self.source_path) == "finished"

    def _state(self, source_path: Path) -> str:
        """Return 'finished', 'to do', 'other settings', or a message about damaged files."""
        path = source_path.with_suffix(".csv")
        if not (source_path.exists() and path.exists()):
            return "to do"
        try:
            source = files.read_json(source_path)
        except UserError as error:
            return str(error)
        if source.get("identity") != self.run.identity:
            return f"{source_path}: belongs to another run"
        if source.get("sha256") != file_digest(path):
            return f"{path}: damaged, or another run's"
        return "finished" if source.get("settings") == self.settings else "other settings"

    def restore(self) -> None:
        """Put the table of these settings back in its place if it was kept aside."""
        kept = _folder_aside(self.source_path, self.settings) / self.source_path.name
        if self.finished or self._state(kept) != "finished":
            return
        self._make_room()
        for path, to in ((kept.with_suffix(".csv"), self.path), (kept, self.source_path)):
            _copy(path, to)

    def _make_room(self) -> None:
        """Keep a table of other settings; name a damaged one."""
        state = self._state(self.source_path)
        if state == "other settings":
            keep_aside(self.source_path, self.settings, self.path)
        elif state not in ("finished", "to do"):
            print(f"{state}; making it again from its parts", file=sys.stderr)

    def _part_path(self, key: str) -> Path:
        assert re.fullmatch(r"[\w.-]+", key), f"{key!r} is not a file name"
        return self.folder / f"{key}.pt"

    def part(self, key: str) -> object | None:
        """Read the part saved under this key; None if there is none, or if it is damaged.

        Stop here if a part is to be made and the time budget has no room for one like the last.
        """
        if (content := self._read(key)) is None:
            if self.piece:  # the first part of all is always made
                safe_point(next_piece=self.piece)
            self.began = time.monotonic()
        return content

    def _read(self, key: str) -> object | None:
        path = self._part_path(key)
        if not path.exists():
            return None
        try:
            part = files.read_tensors(path)
            if (part.get("digest"), part.get("key")) != (self.digest, key):
                raise UserError(f"{path}: belongs to another measurement")
        except UserError as error:
            print(f"{error}; measuring it again", file=sys.stderr)
            return None
        return part["content"]

    def save(self, key: str, content: object) -> None:
        """Save a part: numbers, text, tensors, and lists and dictionaries of them."""
        self.run.require_present()
        part = {"digest": self.digest, "key": key, "content": content}
        files.write_tensors(self._part_path(key), part)
        before, self.began = self.began, time.monotonic()
        self.piece = self.began - before
        safe_point()

    def once(self, key: str, make: Callable[[], Part]) -> Part:
        """Return the part saved under this key; make and save it first if there is none."""
        if (part := self.part(key)) is None:
            self.save(key, part := make())
        return part

    def finish(
        self,
        rows: Iterable[Mapping[str, object]],
        device: torch.device,
        precision: str | None = None,
    ) -> None:
        """Write the table, then its source; keep a table of other settings."""
        self._make_room()
        self.run.require_present()
        self.table.write(self.run.directory, rows)
        source = provenance.describe(device, precision or self.run.config.precision) | {
            "identity": self.run.identity,
            "settings": self.settings,
            "sha256": file_digest(self.path),
        }
        files.write_json(self.source_path, source)
