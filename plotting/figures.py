"""All figures: which there are, and how they are drawn from result files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import groupby
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from data import DataError
from engine.launch.experiments import load_experiments
from engine.runs import files
from engine.runs.commands import shell_command
from plotting.families import Family, alike, describe, refusing_malformed
from plotting.figure_kind import FigureKind
from plotting.redrawing import unless_unchanged
from plotting.style import paper_style


@cache
def figure_kinds() -> tuple[FigureKind, ...]:
    """Return the figures of all experiments, in the order of the experiments."""
    modules = dict.fromkeys(name for e in load_experiments().values() for name in e.figures)
    return tuple(kind for name in modules for kind in import_module(name).FIGURES)


@dataclass(frozen=True)
class Drawing:
    """A figure of some runs: its files, or why there are none."""

    kind: FigureKind
    about: str
    paths: tuple[Path, ...] = ()
    command: str = ""  # that makes what it is made from
    lack: str = ""  # what it would need, where no command makes it

    def __str__(self) -> str:
        name = f"figure {self.kind.numbers[0]}"
        if self.lack:
            return f"{name}, of {self.about}: not drawn: {self.lack}"
        if self.command:
            return f"{name}: {self.kind.source} is missing; {self.command} makes it"
        return f"figure {self.kind.numbers[0]}: {' '.join(map(str, self.paths))}"


def draw_all(
    families: Sequence[Family],
    folder: Path,
    kinds: Sequence[FigureKind] | None = None,
    formats: Sequence[str] = ("pdf", "png"),
    concerning: bool = True,
    gather: bool = False,
) -> Iterator[Drawing]:
    """Every figure, each beside its runs; those that compare several families in `folder`.

    With `gather` all lie in `folder`, those of one of several families in a folder with its name;
    families of the same training set then share a contact sheet.
    """
    for kind in figure_kinds() if kinds is None else kinds:
        wanted = [f for f in families if (kind.concerns(f) if concerning else kind.fits(f))]
        if not wanted and not concerning:
            split = "atypical" if kind.atypical else "noise, or human"
            yield Drawing(
                kind,
                f"{sum(len(f.runs) for f in families)} runs",
                lack=f"it needs data.split: {split}",
            )
        if kind.compares:
            measured = [part for family in wanted if (part := family.having(kind.source))]
            for name, page in pages_of(kind, measured):
                path = folder / "figures" / name
                yield Drawing(kind, describe(page), _files_of(kind, page, path, formats, gather))
            continue
        for family in _of_different_data(wanted) if gather and kind.name == "examples" else wanted:
            if part := family.having(kind.source):
                beside = family.folder / "figures"
                if gather:
                    beside = folder / "figures" / (family.name if len(families) > 1 else "")
                about = part.about
                try:
                    paths = _files_of(kind, part, beside / kind.name, formats, gather)
                except DataError as error:
                    yield Drawing(kind, about, lack=str(error))
                else:
                    yield Drawing(kind, about, paths)
            if kind.comes_from(family):
                if lacking := [r for r in family.runs if not (r.directory / kind.source).exists()]:
                    script = load_experiments()[kind.experiment].command.split()
                    commands = [shell_command([*script, run.directory]) for run in lacking]
                    yield Drawing(kind, family.title, command=" && ".join(commands))
            elif not part:
                yield Drawing(kind, family.title, lack=f"such a run has no {kind.source}")


def pages_of(kind: FigureKind, families: Sequence[Family]) -> Iterator[tuple[str, list[Family]]]:
    """Yield the name and the families of each figure that compares some of these."""
    for number, group in enumerate(alike(families, kind.compares, fewest=2), start=1):
        pages = cut_into_pages(group, kind.page)
        for page, shown in enumerate(pages, start=1):
            name = f"{kind.name}_{number}" + (f"_page{page}" if len(pages) > 1 else "")
            yield name, shown


def cut_into_pages(families: Sequence[Family], most: int) -> list[list[Family]]:
    """Cut families into pages; those of a data set and a model stay together where they fit."""
    pages: list[list[Family]] = [[]]
    for _, same in groupby(families, key=lambda family: (family.data, family.model)):
        block = list(same)
        count = -(-len(block) // most)
        for part in range(count):
            own = block[len(block) * part // count : len(block) * (part + 1) // count]
            if len(pages[-1]) + len(own) > most:
                pages.append([])
            pages[-1] += own
    return pages


@refusing_malformed
def _files_of(
    kind: FigureKind,
    subject: Family | list[Family],
    path: Path,
    formats: Sequence[str],
    gather: bool,
) -> tuple[Path, ...]:
    """Return the files of a figure; unchanged ones are not drawn again, except to be kept."""
    draw = partial(draw_figure, kind.plot, subject, path, formats)
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    return draw() if gather else unless_unchanged(draw, subject, paths)


def _of_different_data(families: Sequence[Family]) -> list[Family]:
    """The first family of each training set."""
    found: dict[str, Family] = {}
    for family in families:
        of_data = {k: v for k, v in family.settings.items() if k.startswith("data.")}
        found.setdefault(repr(sorted(of_data.items())), family)
    return list(found.values())


@refusing_malformed
def draw_figure(
    plot: Callable[..., Figure],
    subject: Family | list[Family],
    path: Path,
    formats: Sequence[str] = ("pdf", "png"),
) -> tuple[Path, ...]:
    """Draw a family, or several at once, into files of this name."""
    with paper_style():
        figure = plot(subject)
        figure.draw_without_rendering()  # places everything, once for all formats
        figure.set_layout_engine("none")
        paths = tuple(path.with_name(f"{path.name}.{suffix}") for suffix in formats)
        for path in paths:
            _save(figure, path)
        plt.close(figure)
    return paths


def _save(figure: Figure, path: Path) -> None:
    # Without dates and versions in it, the same figure is the same file.
    keys = ("CreationDate", "Creator", "Producer") if path.suffix == ".pdf" else ("Software",)
    metadata = dict.fromkeys(keys)
    kind = path.suffix.removeprefix(".")
    files.write_atomically(path, lambda f: figure.savefig(f, format=kind, metadata=metadata))
