"""Runs as figures need them: those that differ in nothing but the seed belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import files
from engine.cli import title
from engine.errors import UserError
from engine.runs import Run
from engine.settings import Config


@dataclass(frozen=True)
class Family:
    """Runs of the same settings with different seeds, in a folder of their own."""

    folder: Path
    runs: tuple[Run, ...]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def title(self) -> str:
        return title(self.config).rpartition(" seed")[0]

    @property
    def seeds(self) -> str:
        """How many runs a figure is about, as its caption says it."""
        return f"n = {len(self.runs)} seed{'s' if len(self.runs) > 1 else ''}"

    def has(self, file_name: str) -> bool:
        return all((run.directory / file_name).exists() for run in self.runs)

    def rows(self, file_name: str, columns: Sequence[str], text: Sequence[str] = ()) -> list[dict]:
        """The rows of all seeds, of a file that each run has."""
        paths = [run.directory / file_name for run in self.runs]
        return [row for path in paths for row in files.read_csv(path, columns, text)]

    def table(self, file_name: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Column -> values [seeds, rows], of a file that each run has."""
        tables = [files.read_csv(run.directory / file_name, columns) for run in self.runs]
        if len({len(table) for table in tables}) > 1:
            raise UserError(f"{self.folder}: the runs' {file_name} differ in length")
        return {c: np.array([[row[c] for row in table] for table in tables]) for c in columns}


def find_families(places: Sequence[Path]) -> list[Family]:
    """The finished runs at or below the given folders."""
    directories = set()
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such folder; name a run, or a folder of runs")
        directories |= {path.parent for path in place.rglob("provenance.json")}
    runs = [run for run in map(Run.at, sorted(directories)) if run.finished]
    for run in runs:
        run.require_intact()
    if not runs:
        raise UserError(f"{', '.join(map(str, places))}: no finished run there")
    folders = dict.fromkeys(run.directory.parent for run in runs)
    return [
        Family(folder, tuple(run for run in runs if run.directory.parent == folder))
        for folder in folders
    ]
