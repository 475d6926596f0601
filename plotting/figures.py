"""Every kind of figure: what it is called, what it is made from, and what to see in it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from data import DataError
from engine.runs import files
from engine.runs.commands import shell_command
from plotting.dropout import FORGOTTEN, plot_forgotten, plot_masks
from plotting.examples import plot_examples
from plotting.families import Family, alike, refusing_malformed
from plotting.gradients import (
    ACCOUNTING,
    plot_gradient_cosines,
    plot_gradient_norms,
    plot_gradient_norms_compared,
    plot_gradient_norms_over_training,
    plot_learning_curves,
)
from plotting.layers import (
    RETRAINING,
    REWINDING,
    plot_retraining,
    plot_rewinding,
    plot_rewinding_compared,
    plot_rewinding_map,
)
from plotting.neurons import FLIPPING, plot_flipping, plot_flipping_compared
from plotting.style import paper_style


@dataclass(frozen=True)
class Kind:
    """A kind of figure: its numbers in the paper, its file, and what it is made from."""

    numbers: tuple[str, ...]
    name: str
    experiment: str
    source: str  # the result file that it needs
    plot: Callable[..., Figure]  # of a family, or of several at once
    see: str  # what to see in it, in one sentence
    compares: str | None = None  # settings in which the families of one figure may differ

    def concerns(self, family: Family) -> bool:
        """Whether a family of runs could have this figure at all."""
        kind = family.config.dropout.kind
        if self.experiment == "dropout":
            return kind == "example_tied"
        return kind == "none" or self.source == "history.csv"

    def comes_from(self, family: Family) -> bool:
        """Whether a script makes what the figure needs of a family that does not have it."""
        accounted = family.config.train.account_gradients or self.source != ACCOUNTING
        return self.concerns(family) and accounted


OF_ANY_MODEL = r"data\.noise_rate|(model|train)\..+"
KINDS = (
    Kind(
        ("examples",), "examples", "gradients", "split.npz", plot_examples,
        "What there is to memorize: judge for yourself whether a person would give these labels.",
    ),
    Kind(
        ("learning-curves",), "learning_curves", "gradients", "history.csv", plot_learning_curves,
        "Clean examples are learned first; mislabeled ones only later, if at all.",
    ),
    Kind(
        ("1", "8", "11", "12", "13", "14"), "gradient_norms", "gradients", ACCOUNTING,
        plot_gradient_norms,
        "The memorized examples, though few, contribute about as much gradient as all others, in "
        "every layer; the total is smaller than either, since the two oppose each other.",
    ),
    Kind(
        ("2",), "gradient_cosines", "gradients", ACCOUNTING, plot_gradient_cosines,
        "Dark: clean and memorized examples pull a layer in opposite directions in that epoch.",
    ),
    Kind(
        ("10",), "gradient_norms_over_training", "gradients", ACCOUNTING,
        plot_gradient_norms_over_training,
        "How the two contributions compare from the first epochs to the last; mind the scales.",
    ),
    Kind(
        ("11", "12", "13", "14"), "gradient_norms_compared", "gradients", ACCOUNTING,
        plot_gradient_norms_compared,
        "The memorized examples' contribution at every noise rate, and for every model.",
        compares=OF_ANY_MODEL,
    ),
    Kind(
        ("3", "9", "15", "16", "17"), "rewinding", "rewinding", REWINDING, plot_rewinding,
        "Lines near the top: layers that can go back without losing the memorized examples; "
        "layers that matter for these matter for the clean ones too.",
    ),
    Kind(
        ("rewinding-map",), "rewinding_map", "rewinding", REWINDING, plot_rewinding_map,
        "The same as a map: how late a layer's weights are still needed.",
    ),
    Kind(
        ("3", "15", "16", "17"), "rewinding_compared", "rewinding", REWINDING,
        plot_rewinding_compared,
        "Which layers are critical differs between models and noise rates.",
        compares=OF_ANY_MODEL,
    ),
    Kind(
        ("4", "18", "19"), "retraining", "retraining", RETRAINING, plot_retraining,
        "A high dashed line at any epoch after 0: the layer was not needed for memorizing, as what "
        "it learns from clean examples alone is enough.",
    ),
    Kind(
        ("5",), "neurons", "flipping", FLIPPING, plot_flipping,
        "Memorized examples flip with fewer neurons, their removal costs the others less, and the "
        "neurons lie in several layers.",
    ),
    Kind(
        ("5",), "neurons_compared", "flipping", FLIPPING, plot_flipping_compared,
        "How the number of neurons that hold an example grows with the network.",
        compares=r"model\..+",
    ),
    Kind(
        ("6",), "masks", "dropout", FORGOTTEN, plot_masks,
        "The masks that this model was trained with: blue for everybody, red for one example.",
    ),
    Kind(
        ("7",), "forgotten", "dropout", FORGOTTEN, plot_forgotten,
        "Clean examples that only the memorization neurons held: mostly odd or ambiguous ones.",
    ),
)  # fmt: skip
SCRIPTS = {
    "gradients": "gradient_accounting.py",
    "rewinding": "layer_rewinding.py",
    "retraining": "layer_retraining.py",
    "flipping": "neuron_flipping.py",
    "dropout": "example_tied_dropout.py",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of some runs: its files, or why there are none."""

    kind: Kind
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
    kinds: Sequence[Kind] = KINDS,
    formats: Sequence[str] = ("pdf", "png"),
    concerning: bool = True,
    gather: bool = False,
) -> Iterator[Drawing]:
    """Every figure, each beside its runs; those that compare several families in `folder`.

    With `gather` all lie in `folder`, those of a family in a folder with its name.
    """
    for kind in kinds:
        wanted = [family for family in families if not concerning or kind.concerns(family)]
        if kind.compares:
            measured = [part for family in wanted if (part := family.having(kind.source))]
            for number, group in enumerate(alike(measured, kind.compares, fewest=2), start=1):
                path = folder / "figures" / f"{kind.name}_{number}"
                about = f"{len(group)} settings of {group[0].title}"
                yield Drawing(kind, about, draw_figure(kind.plot, group, path, formats))
            continue
        for family in wanted:
            if part := family.having(kind.source):
                beside = folder / "figures" / family.name if gather else family.folder / "figures"
                about = f"{part.title}, {part.seeds}"
                try:
                    paths = draw_figure(kind.plot, part, beside / kind.name, formats)
                except DataError as error:
                    yield Drawing(kind, about, lack=str(error))
                else:
                    yield Drawing(kind, about, paths)
            elif kind.comes_from(family):
                script = SCRIPTS[kind.experiment]
                commands = [shell_command(["python", script, r.directory]) for r in family.runs]
                yield Drawing(kind, family.title, command=" && ".join(commands))
            else:
                yield Drawing(kind, family.title, lack=f"such a run has no {kind.source}")


@refusing_malformed
def draw_figure(
    plot: Callable[..., Figure],
    subject: Family | list[Family],
    path: Path,
    formats: Sequence[str] = ("pdf", "png"),
) -> tuple[Path, ...]:
    """What `plot` makes of a family, or of several at once, as files of this name."""
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
    # Without a date in it, the same figure is the same file.
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
    kind = path.suffix.removeprefix(".")
    files.write_atomically(path, lambda f: figure.savefig(f, format=kind, metadata=metadata))
