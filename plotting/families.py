"""Runs as figures need them: those that differ in nothing but the seed belong together."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TypeVar

import numpy as np

from data import DataError
from engine.config.load import SCHEMA, flatten
from engine.config.schema import EXACT_SEARCH, Config
from engine.errors import UserError
from engine.launch.experiments import load_experiments
from engine.runs import files
from engine.runs.commands import printable
from engine.runs.identity import family_title, run_name, short_name, without_dropout
from engine.runs.measurement import KeptTable
from engine.runs.run import Run
from engine.runs.tables import LAYERS, ResultTable

# With these, another quantity is measured than the paper's, and every title says so.
REDEFINING = {
    "rewinding.batchnorm", "flipping.ablate", "flipping.refresh_reference",
    "flipping.reference_copies", "flipping.reference_rows", "dropout.rescale", "dropout.batchnorm",
}  # fmt: skip


Function = TypeVar("Function", bound=Callable)


def refusing_malformed(work: Function) -> Function:
    """Report results that `work` cannot use in one line that names their folders."""

    @wraps(work)
    def reporting(*arguments: object, **named: object) -> object:
        try:
            return work(*arguments, **named)
        except DataError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            places = ", ".join(dict.fromkeys(_folders_in(arguments))) or "results"
            raise UserError(
                f"{places}: a result file is malformed: {work.__name__}: "
                f"{type(error).__name__}: {error!s:.200}"
            ) from error

    return reporting


def _folders_in(value: object) -> Iterator[str]:
    if isinstance(value, Family):
        yield str(value.folder)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _folders_in(item)


@dataclass(frozen=True)
class Family:
    """Runs of the same settings with different seeds, in a folder of their own."""

    folder: Path
    runs: tuple[Run, ...]
    apart: str = ""  # settings that tell it from others with the same title

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def settings(self) -> dict[str, object]:
        """Settings that decided the weights, except the seed."""
        return {k: v for k, v in self.runs[0].settings.items() if k != "seed"}

    @property
    def values(self) -> dict[str, object]:
        """Every key's value, and what else decided the weights, such as digests of files."""
        return self.settings | flatten(self.config)

    @property
    def name(self) -> str:
        """The name that this version gives to the folder of such runs."""
        return run_name(self.config, self.runs[0].settings)

    @property
    def trained(self) -> str:
        """The title without what is said of dropout."""
        return family_title(without_dropout(self.config)) + self.apart

    @property
    def title(self) -> str:
        return family_title(self.config) + self.apart

    @property
    def seeds(self) -> str:
        """Number of runs of a figure, as its caption says it."""
        return count_seeds([self])

    @property
    def about(self) -> str:
        """The runs of a figure in small letters."""
        return f"{self.title}, {self.seeds}"

    @property
    def data(self) -> str:
        """The data set, and the number of training images where it is not all of them."""
        return family_title(self.config).partition(f" {short_name(self.config.model.name)}")[0]

    @property
    def model(self) -> str:
        """The network, without its file, and with its width where that is not 1."""
        model = self.config.model
        width = model.arguments.get("width", 1)
        name = short_name(model.name).rpartition(":")[2]
        return name + ("" if width == 1 else f" width {width:g}")

    @property
    def split(self) -> str:
        """The kind of memorized examples, or the share of noisy ones."""
        data = self.config.data
        if data.split == "noise":
            return f"{100 * data.noise_rate:g}% noise"
        return "atypical" if data.split == "atypical" else data.human_labels.column

    @property
    def layers(self) -> list[tuple[int, str]]:
        """Numbers and names of the layers; empty for a run of an earlier version."""
        run = self.runs[0]
        rows = LAYERS.read(run.directory) if LAYERS.path(run.directory).exists() else []
        return [(int(row["layer"]), row["name"]) for row in rows]

    @property
    def devices(self) -> list[str]:
        """Devices that the runs were trained on."""
        sources = [files.read_json(run.provenance_path) for run in self.runs]
        return sorted({str(source.get("device")) for source in sources})

    @property
    def measured_with(self) -> dict[str, object]:
        """Settings of the first run's tables, by key path, where they are not the defaults."""
        found = {}
        for experiment in load_experiments().values():
            for table in experiment.tables:
                found |= _unusual(self.runs[0], table.name)
        return found

    def having(self, file_name: str) -> "Family | None":
        """The runs that have this file, measured as the first one's was; None where none has."""
        runs = [run for run in self.runs if (run.directory / file_name).exists()]
        if not runs:
            return None
        alike = [run for run in runs if measured(run, file_name) == measured(runs[0], file_name)]
        words = [
            f", {key}={value}"
            for key, value in _unusual(runs[0], file_name).items()
            if key in REDEFINING
        ]
        return replace(self, runs=tuple(alike), apart=self.apart + "".join(words))

    def rows(self, table: ResultTable) -> list[dict]:
        """Return the rows of all runs, each of which has the table."""
        return [row for run in self.runs for row in table.read(run.directory)]

    def table(self, table: ResultTable) -> dict[str, np.ndarray]:
        """Return column -> values [seeds, rows]; each run has the table."""
        seeds = [table.read(run.directory) for run in self.runs]
        if len({len(rows) for rows in seeds}) > 1:
            raise UserError(f"{self.folder}: the runs' {table.name} differ in length")
        return {c: np.array([[row[c] for row in rows] for rows in seeds]) for c in table.columns}


@refusing_malformed
def find_families(places: Sequence[Path], overrides: tuple[str, ...] = ()) -> list[Family]:
    """The finished runs at or below the given folders, sweeps in the order of their values.

    A run that is named itself must be usable; of those below a folder, each that is not usable is
    named on stderr with the reason. Overrides are settings of figures, such as
    plotting.windows=[0,10,20].
    """
    named = {place.resolve() for place in places}
    runs = []
    for directory in _find_directories(places):
        try:
            runs.append(_finished_run(directory, overrides))
        except UserError as error:
            # A mistake on the command line is no fault of the run.
            if directory.resolve() in named or str(error).startswith("command line:"):
                raise
            where = "" if str(directory) in str(error) else f"{directory}: "
            print(printable(f"left out: {where}{error}"), file=sys.stderr)
    if not runs:
        raise UserError(f"{', '.join(map(str, places))}: no finished run there")
    together: dict[Path, list[Run]] = {}
    for run in runs:
        together.setdefault(run.directory.parent.resolve(), []).append(run)
    families = [Family(of[0].directory.parent, tuple(of)) for of in together.values()]
    for family in families:
        _name_left_out(family)
    return sorted(_told_apart(families), key=lambda family: by_numbers(family.title))


@refusing_malformed
def _finished_run(directory: Path, overrides: tuple[str, ...]) -> Run:
    """Return the run in this directory, whose training is finished and whose tables are whole."""
    run = Run.at(directory, overrides)
    if not run.finished:
        raise UserError(f"{directory}: no finished run there: its training is {run.state}")
    run.require_undamaged()
    for table in {t for experiment in load_experiments().values() for t in experiment.tables}:
        if table.path(directory).exists():
            table.require_whole(directory)
    return run


def name_other_settings(families: Sequence[Family]) -> Iterator[str]:
    """Yield a line for each table that was measured with other settings than the one shown."""
    for run in (run for family in families for run in family.runs):
        for kept in KeptTable.below(run.directory):
            shown = measured(run, kept.path.name)
            if words := _in_words(kept.differences(shown)):
                instead = _in_words({k: (shown or {}).get(k) for k in kept.differences(shown)})
                yield (
                    f"{run.directory / kept.path.name}: shown with {instead}; "
                    f"also measured, with {words}: {kept.path}"
                )


def _in_words(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value!s:.60}" for key, value in settings.items())


def plotting_overrides(config: Config) -> tuple[str, ...]:
    """Return the settings of figures in a configuration, for runs that were trained with others."""
    values = {k: v for k, v in flatten(config).items() if k.startswith("plotting.")}
    return tuple(f"{k}={list(v) if v else 'null'}" for k, v in values.items())


def by_numbers(words: str) -> list[str | float]:
    """A key to sort by that takes the numbers in words for numbers, such as 5,000 or 0.25."""
    parts = re.split(r"(\d[\d,]*(?:\.\d+)?)", words)  # words and numbers in turn
    return [float(part.replace(",", "")) if i % 2 else part for i, part in enumerate(parts)]


def _find_directories(places: Sequence[Path]) -> list[Path]:
    """Find the directories of runs, through links too; each once."""
    found: dict[Path, Path | None] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such folder; name a run, or a folder of runs")
        for root, folders, names in os.walk(place, followlinks=True):
            if (real := Path(root).resolve()) in found:
                folders.clear()
            else:
                is_run = {"provenance.json", "config.yaml"} <= set(names)
                found[real] = Path(root) if is_run else None
    return sorted(filter(None, found.values()))


def measured(run: Run, file_name: str) -> dict[str, object] | None:
    """The settings of a measurement; None for what a training itself writes."""
    source = (run.directory / file_name).with_suffix(".json")
    return files.read_json(source).get("settings") if source.exists() else None


def _unusual(run: Run, file_name: str) -> dict[str, object]:
    """The settings of a measurement by key path, where they are not the defaults."""
    known = load_experiments().values()
    section = next((e.key for e in known if file_name in [t.name for t in e.tables]), None)
    settings = measured(run, file_name) or {} if section else {}
    if section == "flipping" and settings:
        # Earlier versions did not have this key, and took all of the remaining examples.
        settings = _with_exact({"remaining_rows": None} | settings)
    paths = {f"{section}.{key}": value for key, value in settings.items()}
    return {
        key: value for key, value in paths.items() if key in SCHEMA and value != SCHEMA[key].default
    }


def _with_exact(settings: dict[str, object]) -> dict[str, object]:
    """Write the keys of an exact search of neurons as `exact`, the way to ask for it."""
    recorded = {"reference_rows": None} | settings  # an earlier version took all rows
    if any(recorded.get(key, key) != value for key, value in EXACT_SEARCH.items()):
        return settings
    return {k: v for k, v in settings.items() if k not in EXACT_SEARCH} | {"exact": True}


def _name_left_out(family: Family) -> None:
    """Say which seeds' measurements differ in their settings from the first one's."""
    tables = {path.name for run in family.runs for path in run.directory.glob("*.csv")}
    for name in sorted(tables):
        shown = family.having(name).runs
        for run in family.runs:
            if (path := run.directory / name).exists() and run not in shown:
                first = shown[0].directory.name
                print(f"{path}: left out: its settings are not those of {first}", file=sys.stderr)


def _told_apart(families: Sequence[Family]) -> list[Family]:
    """Titles name what runs mostly differ in; where two coincide, all that these differ in."""
    told = []
    for family in families:
        same = [other for other in families if other.title == family.title]
        values = family.values
        apart = [
            f", {key.removesuffix('.sha256')}={shown_value(key, values.get(key))}"
            for key in differing(same)
        ]
        told.append(replace(family, apart="".join(apart)))
    return told


def shown_value(key: str, value: object) -> str:
    """Return a setting's value as titles show it: of a digest the first letters."""
    return str(value)[:12] if key.endswith(".sha256") else str(value)


def differing(families: Sequence[Family]) -> list[str]:
    """The key paths of the settings in which these families are not all alike."""
    settings = [family.settings for family in families]
    keys = dict.fromkeys(key for of in settings for key in of)
    return [key for key in keys if len({repr(of.get(key)) for of in settings}) > 1]


def count_seeds(families: Sequence[Family]) -> str:
    """Return the number of seeds of these families, as a caption says it: 'n = 1 to 3 seeds'."""
    counts = sorted({len(family.runs) for family in families})
    return f"n = {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} " + (
        "seed" if counts == [1] else "seeds"
    )


def name_models(families: Sequence[Family]) -> list[str]:
    """Name each family's model and what tells it from others: 'resnet9 width 0.25, peak_lr 0.1'."""
    names = []
    for family in families:
        name, values = family.config.model.name, family.values
        keys = differing([other for other in families if other.config.model.name == name])
        apart = [
            f"{key.partition('.')[2].removesuffix('.sha256')} {shown_value(key, values.get(key))}"
            for key in keys
            if key.startswith(("model.", "train.")) and key != "model.width"
        ]
        names.append(", ".join([family.model, *apart]))
    return names


def place_in_grid(families: Sequence[Family]) -> list[tuple[int, int]]:
    """Return a row and a column for each family: its noise rate and its model, as in the paper.

    Families of a single model fill three columns, row by row.
    """
    names = name_models(families)
    models = list(dict.fromkeys(names))
    if len(models) == 1:
        return [divmod(number, min(3, len(families))) for number in range(len(families))]
    splits = list(dict.fromkeys(sorted((f.split for f in families), key=by_numbers)))
    return [(splits.index(f.split), models.index(name)) for f, name in zip(families, names)]


def describe(families: Sequence[Family]) -> str:
    """Return what several families have in common: data sets, models, splits, and seeds."""
    each = (
        [family.data for family in families],
        [family.model for family in families],
        [family.split for family in families],
    )
    common = [", ".join(dict.fromkeys(words)) for words in each]
    return "; ".join([*common, count_seeds(families)])


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
