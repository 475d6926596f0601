"""Learning curves, and where gradients come from (Figures 1, 2, 3, 8, 10 to 14)."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data import DataError
from engine.runs.tables import HISTORY
from gradient_accounting import ACCOUNTS
from plotting.families import Family, describe, name_models, place_in_grid
from plotting.figure_kind import OF_ANY_MODEL, FigureKind
from plotting.style import COLUMN, PAGE, draw_band, entitle, names_of, wrapped

KINDS = ("clean", "noisy", "total")
NORM = "norm / √parameters"


def read_curves(family: Family) -> dict[str, np.ndarray]:
    """Column -> values [seeds, epochs], the initialization being the first."""
    return family.table(HISTORY)


def plot_learning_curves(family: Family) -> Figure:
    """Figure 3, left: accuracy on clean and noisy training examples, and on test examples."""
    figure, axes = plt.subplots(figsize=(COLUMN, 2.2))
    draw_curves(axes, family, (*KINDS, "test"))
    axes.legend(loc="best")
    entitle(figure, "Accuracy during training", family.about)
    return figure


def draw_curves(axes: Axes, family: Family, kinds: Sequence[str] = KINDS) -> None:
    """Accuracies over the epochs of a training; mean and spread over seeds."""
    table, names = read_curves(family), names_of(family.config.data.split)
    epochs = table["epoch"][0]
    for kind in kinds:
        draw_band(axes, epochs, table[f"acc_{kind}"], kind, names[kind])
    axes.set(xlabel="epoch", ylabel="accuracy", xlim=(0, epochs[-1]), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def read_accounts(family: Family) -> dict[str, np.ndarray]:
    """Column -> values [seeds, epochs, groups]."""
    table = family.table(ACCOUNTS)
    groups = int(table["group"].max()) + 1
    return {name: values.reshape(len(values), -1, groups) for name, values in table.items()}


def window_of(family: Family) -> tuple[int, int]:
    """Return the epochs of Figures 1 and 8: from the weights of the first to those of the last."""
    last = family.config.train.epochs
    first, stop = family.config.plotting.window or np.rint([0.3 * last, 0.4 * last]).astype(int)
    return _require_trained(family, (int(first), max(int(stop), int(first) + 1)))


def windows_of(family: Family) -> tuple[int, ...]:
    """Return the bounds of Figure 10's windows."""
    last = family.config.train.epochs
    tenths = tuple(np.unique(np.rint(np.arange(10) * last / 10).astype(int)).tolist())
    return _require_trained(family, family.config.plotting.windows or tenths)


def _require_trained(family: Family, bounds: tuple[int, ...]) -> tuple[int, ...]:
    if bounds[-1] > (last := family.config.train.epochs):
        raise DataError(f"plotting: epoch {bounds[-1]} is after the last one, {last}")
    return bounds


def _draw_norms(axes: Axes, family: Family, accounts: dict, epochs: slice) -> None:
    """Norms of each layer, averaged over some epochs; mean and spread over seeds."""
    groups = accounts["group"][0, 0]
    names = names_of(family.config.data.split)
    for kind in KINDS:
        draw_band(axes, groups, accounts[f"norm_{kind}"][:, epochs].mean(1), kind, names[kind])
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_gradient_norms(family: Family) -> Figure:
    """Figures 1 and 8, left: each layer's gradient norms in a window; right: over all epochs."""
    accounts = read_accounts(family)
    first, last = window_of(family)
    figure, (window, whole) = plt.subplots(1, 2, figsize=(PAGE, 2))
    _draw_norms(window, family, accounts, slice(first, last))
    _draw_norms(whole, family, accounts, slice(None))
    default = "" if family.config.plotting.window else " (30% to 40% of all)"
    window.set(title=f"epochs {first} to {last}{default}", xlabel="layer", ylabel=NORM)
    whole.set(title=f"all {family.config.train.epochs} epochs", xlabel="layer")
    window.legend()
    entitle(figure, "Gradient norms in each layer", f"{family.about}; scales differ")
    return figure


def plot_gradient_norms_compared(families: Sequence[Family]) -> Figure:
    """Figures 11 to 14: norms over all epochs by noise rate (rows) and model (columns).

    Noise rates of a single model fill three columns.
    """
    places, names = place_in_grid(families), name_models(families)
    down, across = (1 + max(place[axis] for place in places) for axis in (0, 1))
    several = len(set(names)) > 1  # their scales differ
    figure, panels = plt.subplots(
        down, across, figsize=(PAGE, 1.5 * down + 0.3), squeeze=False,
        sharey="col" if several else True,
    )  # fmt: skip
    for axes in panels.flat:
        axes.set_visible(False)
    for place, family, name in zip(places, families, names):
        axes = panels[place]
        axes.set_visible(True)
        axes.yaxis.set_tick_params(labelleft=True)
        _draw_norms(axes, family, read_accounts(family), slice(None))
        axes.set_title(
            wrapped(f"{name}, {family.split}" if several else family.split, 0.8 * PAGE / across)
        )
    figure.supxlabel("layer")
    figure.supylabel(NORM)
    scales = "each model has its own scale" if several else "equal scales"
    about = f"{describe(families)}; {scales}"
    entitle(figure, "Gradient norms in each layer, all epochs", about, panels[places[0]])
    return figure


def plot_gradient_norms_over_training(family: Family) -> Figure:
    """Figure 10: the same in windows of the training, each with a scale of its own."""
    accounts = read_accounts(family)
    windows = list(pairwise(windows_of(family)))
    rows = -(-len(windows) // 3)
    figure, panels = plt.subplots(rows, 3, figsize=(PAGE, 1.4 * rows + 0.3), squeeze=False)
    for axes, (first, last) in zip(panels.flat, windows):
        _draw_norms(axes, family, accounts, slice(first, last))
        axes.set_title(f"epochs {first} to {last}")
    for axes in panels.flat[len(windows) :]:
        axes.set_visible(False)
    figure.supxlabel("layer")
    figure.supylabel(NORM)
    about = f"{family.about}; scales differ"
    entitle(figure, "Gradient norms over the training", about, panels[0, 0])
    return figure


def plot_gradient_cosines(family: Family) -> Figure:
    """Figure 2: cosine between the clean and the noisy gradient, epoch by layer."""
    cosine = read_accounts(family)["cosine"].mean(0)
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6))
    epochs, groups = cosine.shape
    image = axes.imshow(
        cosine, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest",
        extent=(-0.5, groups - 0.5, epochs + 0.5, 0.5),
    )  # fmt: skip
    axes.set(xlabel="layer", ylabel="epoch", xticks=range(groups), facecolor="0.8")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="cosine", ticks=[-1, -0.5, 0, 0.5, 1])
    names = names_of(family.config.data.split)
    subject = f"Cosine of {names['clean']} and {names['noisy']} gradients"
    entitle(figure, subject, family.about)
    return figure


_NORMS = (
    "In the paper the memorized examples, though few, contribute about as much gradient as all "
    "others, in every layer; the total is smaller than either, since the two oppose each other."
)

FIGURES = (
    FigureKind(
        ("learning-curves",), "learning_curves", "gradients", HISTORY.name, plot_learning_curves,
        "Accuracy during training.",
        "In the paper clean examples are learned first, and noisy ones later.",
    ),
    FigureKind(
        ("1", "11", "12", "13", "14"), "gradient_norms", "gradients", ACCOUNTS.name,
        plot_gradient_norms, "Gradient norms of clean and noisy examples in each layer.", _NORMS,
        atypical=False,
    ),
    FigureKind(
        ("8",), "gradient_norms", "gradients", ACCOUNTS.name, plot_gradient_norms,
        "Gradient norms of typical and atypical examples in each layer.", _NORMS, atypical=True,
    ),
    FigureKind(
        ("2",), "gradient_cosines", "gradients", ACCOUNTS.name, plot_gradient_cosines,
        "Cosine of the two kinds' gradients, by layer and epoch.",
        "Red: clean and memorized examples pull a layer in opposite directions in that epoch.",
    ),
    FigureKind(
        ("10",), "gradient_norms_over_training", "gradients", ACCOUNTS.name,
        plot_gradient_norms_over_training, "Gradient norms in each layer over the training.",
        "How the two contributions compare in successive parts of the training; scales differ.",
    ),
    FigureKind(
        ("11", "12", "13", "14"), "gradient_norms_compared", "gradients", ACCOUNTS.name,
        plot_gradient_norms_compared, "Gradient norms by noise rate and model.",
        "The memorized examples' contribution at every noise rate, and for every model.",
        compares=OF_ANY_MODEL, page=12,
    ),
)  # fmt: skip
