"""Figures from result files: nothing here trains or measures.

    python plot_results.py                          # every finished run below runs/
    python plot_results.py runs/NAME --figure 2     # some runs, one figure
    python plot_results.py --format png

Runs that differ in nothing but the seed share a figure: lines are means over seeds, bands a
standard deviation. A figure lies in figures/ beside its seeds' folders; one whose data are missing
is named with the command that makes them. Which figures: examples (a contact sheet of the training
set), 1 (also 8 and 11 to 14: gradient norms), 2 (their cosines), 3 (learning curves), 10 (gradient
norms over training), 9 (also 3-right and 15 to 17: rewinding), rewinding-map (the same, layer by
epoch), 4 (also 18 and 19: retraining), 5 (neurons to flip), 6 (masks of example-tied dropout), 7
(clean examples that it forgets). Tables 1 to 3 and the AUCs of all runs together lie in tables/
below the folder that was named, as Markdown, CSV and LaTeX.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from data import DataError
from engine import files
from engine.errors import UserError
from engine.options import nearest
from plotting.dropout import FORGOTTEN, plot_forgotten, plot_masks
from plotting.examples import plot_examples
from plotting.layers import (
    RETRAINING,
    REWINDING,
    plot_retraining,
    plot_rewinding,
    plot_rewinding_map,
)
from plotting.neurons import FLIPPING, plot_flipping
from plotting.runs import Family, find_families
from plotting.style import paper_style
from plotting.tables import TABLES
from plotting.training import (
    plot_gradient_cosines,
    plot_gradient_norms,
    plot_gradient_norms_over_training,
    plot_learning_curves,
)


@dataclass(frozen=True)
class Kind:
    """A kind of figure: its numbers in the paper, its file, and what it is made from."""

    numbers: tuple[str, ...]
    name: str
    source: str  # the result file that it needs
    script: str  # which makes that file
    plot: Callable[[Family], Figure]

    def concerns(self, family: Family) -> bool:
        """Whether a family of runs could have this figure at all."""
        kind = family.config.dropout.kind
        if self.script == "example_tied_dropout.py":
            return kind == "example_tied"
        return kind == "none" or self.source in ("split.npz", "history.csv")


ACCOUNTING = ("gradient_accounting.csv", "gradient_accounting.py")
LAYERS = ((REWINDING, "layer_rewinding.py"), (RETRAINING, "layer_retraining.py"))
KINDS = (
    Kind(("examples",), "examples", "split.npz", "gradient_accounting.py", plot_examples),
    Kind(("1", "8", "11", "12", "13", "14"), "gradient_norms", *ACCOUNTING, plot_gradient_norms),
    Kind(("2",), "gradient_cosines", *ACCOUNTING, plot_gradient_cosines),
    Kind(("3",), "learning_curves", "history.csv", "gradient_accounting.py", plot_learning_curves),
    Kind(("10",), "gradient_norms_over_training", *ACCOUNTING, plot_gradient_norms_over_training),
    Kind(("9", "15", "16", "17"), "rewinding", *LAYERS[0], plot_rewinding),
    Kind(("rewinding-map",), "rewinding_map", *LAYERS[0], plot_rewinding_map),
    Kind(("4", "18", "19"), "retraining", *LAYERS[1], plot_retraining),
    Kind(("5",), "neurons", FLIPPING, "neuron_flipping.py", plot_flipping),
    Kind(("6",), "masks", FORGOTTEN, "example_tied_dropout.py", plot_masks),
    Kind(("7",), "forgotten", FORGOTTEN, "example_tied_dropout.py", plot_forgotten),
)


def choose_kinds(number: str | None) -> list[Kind]:
    known = [n for kind in KINDS for n in kind.numbers]
    if number not in (None, *known):
        hint = nearest(number, known) or f"; allowed: {', '.join(known)}"
        raise UserError(f"command line: --figure: {number!r} is not a figure{hint}")
    return [kind for kind in KINDS if number in (None, *kind.numbers)]


def save(figure: Figure, path: Path) -> None:
    # Without a date in it, the same figure is the same file.
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
    kind = path.suffix.removeprefix(".")
    files.write_atomically(path, lambda f: figure.savefig(f, format=kind, metadata=metadata))


def draw(family: Family, kind: Kind, formats: Sequence[str]) -> str:
    """One figure in all formats; a line that says where it is, or what is missing."""
    if not family.has(kind.source):
        command = f"python {kind.script} {family.runs[0].config_path}"
        return f"figure {kind.numbers[0]}: {kind.source} is missing; {command} makes it"
    with paper_style():
        figure = kind.plot(family)
        paths = [family.folder / "figures" / f"{kind.name}.{suffix}" for suffix in formats]
        for path in paths:
            save(figure, path)
        plt.close(figure)
    return f"figure {kind.numbers[0]}: {' '.join(map(str, paths))}"


def write_tables(families: Sequence[Family], folder: Path) -> list[Path]:
    """Every table that the runs have rows for, in three forms."""
    written = []
    for make in TABLES:
        table = make(families)
        if not table.measured:
            continue
        forms = {"md": table.markdown(), "csv": table.csv(), "tex": table.latex()}
        for suffix, text in forms.items():
            written.append(folder / f"{table.name}.{suffix}")
            files.write_text(written[-1], text)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", default=[Path("runs")])
    parser.add_argument("--figure", metavar="NUMBER", help="only this one")
    parser.add_argument("--format", choices=("pdf", "png"), help="only this one; else both")
    given = parser.parse_args(arguments)
    formats = [given.format] if given.format else ["pdf", "png"]
    try:
        kinds, families = choose_kinds(given.figure), find_families(given.runs)
        for family in families:
            for kind in kinds:
                if given.figure or kind.concerns(family):
                    print(draw(family, kind, formats), flush=True)
        if not given.figure:
            for path in write_tables(families, given.runs[0] / "tables"):
                print(f"table: {path}", flush=True)
    except (UserError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
