"""Learning curves, and where gradients come from (Figures 1, 2, 3, 8, 10 to 14)."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from engine.config.load import flatten
from engine.runs.tables import HISTORY
from gradient_accounting import ACCOUNTS
from plotting.families import Family, differing
from plotting.figure_kind import OF_ANY_MODEL, FigureKind
from plotting.style import COLUMN, PAGE, draw_band, names_of, wrapped

KINDS = ("clean", "noisy", "total")


def read_curves(family: Family) -> dict[str, np.ndarray]:
    """Column -> values [seeds, epochs], the initialization being the first."""
    return family.table(HISTORY)


def plot_learning_curves(family: Family) -> Figure:
    """Figure 3, left: accuracy on clean and noisy training examples, and on test examples."""
    figure, axes = plt.subplots(figsize=(COLUMN, 2.3))
    draw_curves(axes, family, ("clean", "noisy", "total", "test"))
    axes.set_ylabel("accuracy")
    axes.legend(loc="best")
    figure.suptitle(f"{wrapped(family.title, COLUMN)}\n({family.seeds})", fontsize=8)
    return figure


def draw_curves(axes: Axes, family: Family, kinds: Sequence[str]) -> None:
    """Accuracies over the epochs of a training; mean and spread over seeds."""
    table, names = read_curves(family), names_of(family.config.data.split)
    epochs = table["epoch"][0]
    for kind in kinds:
        draw_band(axes, epochs, table[f"acc_{kind}"], kind, names[kind])
    axes.set(xlabel="epoch", xlim=(0, epochs[-1]), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def read_accounts(family: Family) -> dict[str, np.ndarray]:
    """Column -> values [seeds, epochs, groups]."""
    table = family.table(ACCOUNTS)
    groups = int(table["group"].max()) + 1
    return {name: values.reshape(len(values), -1, groups) for name, values in table.items()}


def _draw_norms(axes: Axes, family: Family, accounts: dict, epochs: slice) -> None:
    """Norms of each layer, averaged over some epochs; mean and spread over seeds."""
    groups = accounts["group"][0, 0]
    names = names_of(family.config.data.split)
    for kind in KINDS:
        draw_band(axes, groups, accounts[f"norm_{kind}"][:, epochs].mean(1), kind, names[kind])
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_gradient_norms(family: Family) -> Figure:
    """Figures 1, 8, 11 to 14: each layer's gradient norms, averaged over all epochs."""
    accounts = read_accounts(family)
    figure, axes = plt.subplots(figsize=(COLUMN, 2.3))
    _draw_norms(axes, family, accounts, slice(None))
    axes.set(xlabel="layer", ylabel="gradient norm / sqrt(parameters)")
    axes.legend()
    words = wrapped(family.title, COLUMN)
    figure.suptitle(f"{words}\nall epochs ({family.seeds})", fontsize=8)
    return figure


def plot_gradient_norms_compared(families: Sequence[Family]) -> Figure:
    """Figures 11 to 14: the same of several runs, a row for each model, by noise rate.

    Of a single model the panels fill three columns.
    """
    models = dict.fromkeys(_model_of(family) for family in families)
    rates = sorted({family.config.data.noise_rate for family in families})
    across = len(rates) if len(models) > 1 else min(3, len(rates))
    down = len(models) if len(models) > 1 else -(-len(rates) // across)
    width = max(COLUMN, min(PAGE, 2.3 * across))
    figure, panels = plt.subplots(down, across, figsize=(width, 1.6 * down + 0.4), squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for family in families:
        place = rates.index(family.config.data.noise_rate)
        row = list(models).index(_model_of(family))
        axes = panels[row, place] if len(models) > 1 else panels.flat[place]
        axes.set_visible(True)
        _draw_norms(axes, family, read_accounts(family), slice(None))
        words = f"noise {family.config.data.noise_rate:.0%} ({family.seeds})"
        if len(models) > 1:
            words = f"{_name_model(family, families)}, {words}"
        axes.set_title(wrapped(words, width / across))
    first = next(axes for axes in panels.flat if axes.get_visible())
    first.legend()
    figure.supxlabel("layer", fontsize=8)
    figure.supylabel("gradient norm / sqrt(parameters)", fontsize=8)
    return figure


def _model_of(family: Family) -> str:
    """The model and how it is trained: what makes a row of its own."""
    return repr({k: v for k, v in family.settings.items() if k.startswith(("model.", "train."))})


def _name_model(family: Family, families: Sequence[Family]) -> str:
    """Its name, and what tells it from others of that name: 'resnet9, width 0.25'."""
    name, values = family.config.model.name, flatten(family.config)
    keys = differing([other for other in families if other.config.model.name == name])
    apart = [
        f"{key.partition('.')[2]} {values[key]}"
        for key in keys
        if key.startswith(("model.", "train."))
    ]
    return ", ".join([name, *apart])


def plot_gradient_norms_over_training(family: Family) -> Figure:
    """Figure 10: the same in nine windows of the training, each with a scale of its own."""
    accounts = read_accounts(family)
    count = accounts["epoch"].shape[1]
    bounds = np.unique(np.linspace(0, count, min(9, count) + 1).round().astype(int))
    rows = -(-(len(bounds) - 1) // 3)
    figure, panels = plt.subplots(rows, 3, figsize=(PAGE, 1.6 * rows + 0.3), squeeze=False)
    for axes, start, stop in zip(panels.flat, bounds, bounds[1:]):
        _draw_norms(axes, family, accounts, slice(start, stop))
        axes.set_title(f"epochs {start + 1} to {stop}" if stop > start + 1 else f"epoch {stop}")
    for axes in list(panels.flat)[len(bounds) - 1 :]:
        axes.set_visible(False)
    panels[0, 0].legend()
    figure.supxlabel("layer", fontsize=8)
    figure.supylabel("gradient norm / sqrt(parameters)", fontsize=8)
    figure.suptitle(wrapped(f"{family.title} ({family.seeds})", PAGE), fontsize=8)
    return figure


def plot_gradient_cosines(family: Family) -> Figure:
    """Figure 2: cosine between the clean and the noisy gradient, epoch by layer."""
    accounts = read_accounts(family)
    cosine = accounts["cosine"].mean(0)
    figure, axes = plt.subplots(figsize=(COLUMN, 2.8))
    epochs, groups = cosine.shape
    image = axes.imshow(
        cosine,
        cmap="viridis",
        vmin=-1,
        vmax=np.max(cosine, initial=0, where=np.isfinite(cosine)),
        aspect="auto",
        extent=(-0.5, groups - 0.5, epochs + 0.5, 0.5),
        interpolation="nearest",
    )
    axes.set(xlabel="layer", ylabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    clean, noisy = (names_of(family.config.data.split)[kind] for kind in ("clean", "noisy"))
    figure.colorbar(image, label=f"cosine of {clean} and {noisy} gradient")
    figure.suptitle(f"{wrapped(family.title, COLUMN)}\n({family.seeds})", fontsize=8)
    return figure


FIGURES = (
    FigureKind(
        ("learning-curves",), "learning_curves", "gradients", HISTORY.name, plot_learning_curves,
        "Clean examples are learned first; mislabeled ones only later, if at all.",
    ),
    FigureKind(
        ("1", "8", "11", "12", "13", "14"), "gradient_norms", "gradients", ACCOUNTS.name,
        plot_gradient_norms,
        "The memorized examples, though few, contribute about as much gradient as all others, in "
        "every layer; the total is smaller than either, since the two oppose each other.",
    ),
    FigureKind(
        ("2",), "gradient_cosines", "gradients", ACCOUNTS.name, plot_gradient_cosines,
        "Dark: clean and memorized examples pull a layer in opposite directions in that epoch.",
    ),
    FigureKind(
        ("10",), "gradient_norms_over_training", "gradients", ACCOUNTS.name,
        plot_gradient_norms_over_training,
        "How the two contributions compare from the first epochs to the last; mind the scales.",
    ),
    FigureKind(
        ("11", "12", "13", "14"), "gradient_norms_compared", "gradients", ACCOUNTS.name,
        plot_gradient_norms_compared,
        "The memorized examples' contribution at every noise rate, and for every model.",
        compares=OF_ANY_MODEL,
    ),
)  # fmt: skip
