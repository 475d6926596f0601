"""Measurements of a finished run: part by part, with the settings that they came from.

A measurement leaves three things in the run's directory. Parts (`parts/<name>-<digest>/`) are saved
as soon as each is measured, and stay: a killed measurement resumes with the next part, and a return
to earlier settings measures nothing again. The table (`<name>.csv`) is made from the parts. The
source (`<name>.json`) names the settings, code and machine of the table; it is written last and
holds the table's digest, so that a table without its own source never counts as finished.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from data import file_digest
from engine.errors import UserError
from engine.runs import files, provenance
from engine.runs.run import Run
from engine.runs.stopping import safe_point
from engine.runs.tables import ResultTable


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

    @property
    def finished(self) -> bool:
        """Return whether the table is complete, undamaged, and from this run and these settings."""
        return self._state() == "finished"

    def _state(self) -> str:
        """Return 'finished', 'to do', or a message about damaged files."""
        if not (self.source_path.exists() and self.path.exists()):
            return "to do"
        try:
            source = files.read_json(self.source_path)
        except UserError as error:
            return str(error)
        if source.get("identity") != self.run.identity:
            return f"{self.source_path}: belongs to another run"
        if source.get("settings") != self.settings:
            return "to do"
        whole = source.get("sha256") == file_digest(self.path)
        return "finished" if whole else f"{self.path}: damaged, or another run's"

    def _part_path(self, key: str) -> Path:
        assert re.fullmatch(r"[\w.-]+", key), f"{key!r} is not a file name"
        return self.folder / f"{key}.pt"

    def part(self, key: str) -> object | None:
        """Read the part saved under this key; None if there is none, or if it is damaged."""
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
        safe_point()

    def finish(
        self,
        rows: Iterable[Mapping[str, object]],
        device: torch.device,
        precision: str | None = None,
    ) -> None:
        """Write the table, then its source."""
        if (state := self._state()) not in ("finished", "to do"):
            print(f"{state}; making it again from its parts", file=sys.stderr)
        self.run.require_present()
        self.table.write(self.run.directory, rows)
        source = provenance.describe(device, precision or self.run.config.precision) | {
            "identity": self.run.identity,
            "settings": self.settings,
            "sha256": file_digest(self.path),
        }
        files.write_json(self.source_path, source)
