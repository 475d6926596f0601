"""Runs as figures need them: those that differ in nothing but the seed belong together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine import files
from engine.cli import title
from engine.config import flatten
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
    def settings(self) -> dict[str, object]:
        """What decided the weights, but for the seed."""
        return {k: v for k, v in self.runs[0].settings.items() if k != "seed"}

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        plain, dropout = title(self.config).rpartition(" seed")[0], self.config.dropout
        if dropout.kind == "example_tied":
            return f"{plain}, example-tied {dropout.p_gen:g}, {dropout.p_mem:g}"
        return plain if dropout.kind == "none" else f"{plain}, {dropout.kind} {dropout.p_gen:g}"

    @property
    def seeds(self) -> str:
        """How many runs a figure is about, as its caption says it."""
        return f"n = {len(self.runs)} seed{'s' if len(self.runs) > 1 else ''}"

    @property
    def devices(self) -> list[str]:
        """What the runs were trained on."""
        sources = [files.read_json(run.provenance_path) for run in self.runs]
        return sorted({str(source.get("device")) for source in sources})

    def having(self, file_name: str) -> "Family | None":
        """The runs that have this file; None where none has."""
        runs = tuple(run for run in self.runs if (run.directory / file_name).exists())
        return replace(self, runs=runs) if runs else None

    def rows(self, file_name: str, columns: Sequence[str], text: Sequence[str] = ()) -> list[dict]:
        """The rows of all runs, each of which has the file."""
        paths = [run.directory / file_name for run in self.runs]
        return [row for path in paths for row in files.read_csv(path, columns, text)]

    def table(self, file_name: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Column -> values [seeds, rows]; each run has the file."""
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
        run.require_undamaged()
    if not runs:
        raise UserError(f"{', '.join(map(str, places))}: no finished run there")
    folders = dict.fromkeys(run.directory.parent for run in runs)
    return [
        Family(folder, tuple(run for run in runs if run.directory.parent == folder))
        for folder in folders
    ]


def setting_of(family: Family, key: str) -> float:
    return flatten(family.config)[key]


def alike(families: Sequence[Family], ignoring: str, fewest: int) -> list[list[Family]]:
    """Groups of `fewest` families or more that differ in the settings of this pattern alone."""
    groups: dict[str, list[Family]] = {}
    for family in families:
        same = {k: v for k, v in family.settings.items() if not re.fullmatch(ignoring, k)}
        groups.setdefault(repr(sorted(same.items())), []).append(family)
    return [group for group in groups.values() if len(group) >= fewest]


def families_over(key: str, families: Sequence[Family], fewest: int = 3) -> list[list[Family]]:
    """Groups of families that differ in one number alone, ascending by it."""
    ascending = sorted(families, key=lambda family: setting_of(family, key))
    return alike(ascending, re.escape(key), fewest)
