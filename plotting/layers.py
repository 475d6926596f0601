"""Figures of single layers: rewinding (3, 9, 15-17) and retraining (4, 18, 19)."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from engine.runs.tables import ResultTable
from layer_retraining import RETRAINING
from layer_rewinding import REWINDING
from plotting.families import Family, describe, name_models, place_in_grid
from plotting.figure_kind import OF_ANY_DATA, OF_ANY_MODEL, FigureKind
from plotting.gradients import draw_curves
from plotting.style import PAGE, draw_band, draw_mean, entitle, names_of, wrapped

NAMED = 6  # epochs in a legend, as in the paper; lines between them are drawn all the same


def by_group(family: Family, table: ResultTable) -> dict[str, np.ndarray]:
    """The groups, the epochs, and each accuracy as [seeds, groups, epochs].

    It is nan where a seed lacks an epoch, as it does after the end of a retraining that stopped.
    """
    tables = [table.read(run.directory) for run in family.runs]
    groups, epochs = (
        sorted({row[axis] for rows in tables for row in rows}) for axis in ("group", "epoch")
    )
    shape = (len(tables), len(groups), len(epochs))
    found = {name: np.full(shape, np.nan) for name in table.columns if name.startswith("acc_")}
    for seed, rows in enumerate(tables):
        for row in rows:
            place = seed, groups.index(row["group"]), epochs.index(row["epoch"])
            for name, values in found.items():
                values[place] = row[name]
    return {"group": np.array(groups, int), "epoch": np.array(epochs, int), **found}


def plot_rewinding(family: Family) -> Figure:
    """Figure 3: learning curves, and the final model with one layer from an earlier epoch."""
    return _plot_rewinding_rows([family])


def plot_rewinding_compared(families: Sequence[Family]) -> Figure:
    """Figures 15 to 17: by noise rate and model; Figure 3 where all have the same noise rate."""
    if len({family.split for family in families}) == 1:
        return _plot_rewinding_rows(families)
    places, models = place_in_grid(families), name_models(families)
    down, across = (1 + max(place[axis] for place in places) for axis in (0, 1))
    figure, panels = plt.subplots(
        2 * down, across, figsize=(PAGE, 2.3 * down + 0.3), sharey=True, squeeze=False
    )
    for axes in panels.flat:
        axes.set_visible(False)
    for (row, column), family, model in zip(places, families, models):
        pair = panels[2 * row : 2 * row + 2, column]
        table = by_group(family, REWINDING)
        for axes, kind in zip(pair, ("clean", "noisy")):
            axes.set_visible(True)
            _draw_rewound(axes, table, kind)
            if column == 0:
                axes.set_ylabel(names_of(family.config.data.split)[kind])
        name = f"{model}, {family.split}" if len(set(models)) > 1 else family.split
        pair[0].set_title(wrapped(name, 0.8 * PAGE / across))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.3), "ncols": 3}
    for column in panels.T if len(set(models)) > 1 else panels.T[:1]:
        lowest = [axes for axes in column if axes.get_visible()][-1]
        lowest.legend(title="epoch", **below, columnspacing=0.8, handlelength=1)
    figure.supxlabel("layer that is rewound")
    figure.supylabel("accuracy")
    entitle(figure, "Accuracy with one layer from an earlier epoch", describe(families))
    return figure


def _plot_rewinding_rows(families: Sequence[Family]) -> Figure:
    """A row for each family: learning curves, then clean and noisy accuracy after rewinding."""
    rows = len(families)
    figure, panels = plt.subplots(
        rows, 3, figsize=(PAGE, 1.6 * rows + 0.2), sharey=True, squeeze=False
    )
    for (curves, *rewound), family, name in zip(panels, families, name_models(families)):
        draw_curves(curves, family)
        if rows == 1:
            curves.legend(loc="best")
        curves.set_title("training" if rows == 1 else wrapped(name, PAGE / 3))
        table, names = by_group(family, REWINDING), names_of(family.config.data.split)
        for axes, kind in zip(rewound, ("clean", "noisy")):
            _draw_rewound(axes, table, kind)
            axes.set(title=f"{names[kind]} examples", xlabel="layer that is rewound")
        rewound[1].legend(title="epoch", loc="center left", bbox_to_anchor=(1, 0.5))
    about = families[0].about if rows == 1 else describe(families)
    # In many rows at least one legend would cover a curve.
    key = None if rows == 1 else panels[0, 0]
    entitle(figure, "Accuracy with one layer from an earlier epoch", about, key)
    return figure


def _draw_rewound(axes: Axes, table: dict, kind: str) -> None:
    """Accuracy against the layer, a line for each epoch: mean and spread over seeds."""
    groups, epochs = table["group"], table["epoch"]
    named = np.linspace(0, len(epochs) - 1, min(len(epochs), NAMED)).round().astype(int)
    colors = colormaps["viridis"](0.8 * epochs / max(1, epochs.max()))  # yellow is hard to see
    for i, epoch in enumerate(epochs):
        label = str(epoch) if i in named else None
        draw_mean(axes, groups, table[f"acc_{kind}"][:, :, i], "o-", color=colors[i], label=label)
    axes.set(ylim=(0, 1.04), xlim=(groups[0] - 0.3, groups[-1] + 0.3))
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def plot_rewinding_map(family: Family) -> Figure:
    """The same as a map, layer by epoch: accuracy on the memorized examples."""
    table = by_group(family, REWINDING)
    groups, epochs = table["group"], table["epoch"]
    names = names_of(family.config.data.split)
    every = -(-len(epochs) // 11)
    figure, panels = plt.subplots(1, 2, figsize=(PAGE, 2.3), sharey=True)
    for axes, kind in zip(panels, ("clean", "noisy")):
        image = axes.imshow(
            table[f"acc_{kind}"].mean(0).T, cmap="viridis", vmin=0, vmax=1, aspect="auto"
        )
        axes.set_xticks(range(len(groups)), groups)
        axes.set_yticks(range(len(epochs))[::every], epochs[::every])
        axes.set(title=f"{names[kind]} examples", xlabel="layer that is rewound")
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("rewound to epoch")
    figure.colorbar(image, ax=panels, label="accuracy", pad=0.02, format=PercentFormatter(1))
    entitle(figure, "Accuracy with one layer from an earlier epoch", family.about)
    return figure


def plot_retraining(family: Family) -> Figure:
    """Figures 4 and 19: accuracies while a layer is trained again, a panel for each layer."""
    table, layers = by_group(family, RETRAINING), dict(family.layers)
    rows = -(-len(table["group"]) // 3)
    figure, panels = plt.subplots(
        rows, 3, figsize=(PAGE, 1.25 * rows + 0.4), sharex=True, sharey=True, squeeze=False
    )
    for place, group in enumerate(table["group"]):
        name = f" ({layers[group]})" if group in layers else ""
        _draw_retrained(panels.flat[place], family, table, place)
        panels.flat[place].set_title(wrapped(f"layer {group}{name}", PAGE / 3))
    for axes in panels.flat[len(table["group"]) :]:
        axes.set_visible(False)
    _entitle_retraining(figure, family.about, panels[0, 0])
    return figure


def plot_retraining_compared(families: Sequence[Family]) -> Figure:
    """Figures 4, 18 and 19: a column for each data set and noise rate, a row for each layer."""
    tables = [by_group(family, RETRAINING) for family in families]
    rows = max(len(table["group"]) for table in tables)
    figure, panels = plt.subplots(
        rows, len(families), figsize=(PAGE, 0.75 * rows + 0.4), sharex="col", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for column, family, table in zip(panels.T, families, tables):
        for place, group in enumerate(table["group"]):
            _draw_retrained(column[place], family, table, place)
            panels[place, 0].set_ylabel(f"layer {group}")
        column[-1].xaxis.set_major_locator(MaxNLocator(8 // len(families) + 1, integer=True))
        words = filter(None, (family.data, family.split, family.apart.removeprefix(", ")))
        column[0].set_title("\n".join(wrapped(text, PAGE / len(families)) for text in words))
    _entitle_retraining(figure, describe(families), panels[0, 0])
    return figure


def _draw_retrained(axes: Axes, family: Family, table: dict, place: int) -> None:
    names = names_of(family.config.data.split)
    for kind in ("clean", "noisy"):
        accuracy = _carried_forward(table[f"acc_{kind}"][:, place])
        draw_band(axes, table["epoch"], accuracy, kind, names[kind])
    axes.set_ylim(0, 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _carried_forward(values: np.ndarray) -> np.ndarray:
    """Return [seeds, epochs] in which a seed that stopped keeps its last value while others go on.

    `retraining.patience` stops seeds at different epochs; a mean over the others alone would jump.
    """
    measured = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(measured, np.arange(values.shape[1]), 0), axis=1)
    return np.where(measured.any(0), np.take_along_axis(values, last, axis=1), np.nan)


def _entitle_retraining(figure: Figure, about: str, key: Axes) -> None:
    figure.supxlabel("epoch of retraining (0: the layer as initialized)")
    figure.supylabel("accuracy")
    entitle(figure, "Accuracy while one layer is trained again", about, key)


_REWOUND = (
    "Lines near the top: layers that can go back without losing the memorized examples. In the "
    "paper, layers that matter for these matter for the clean ones too."
)
_RETRAINED = (
    "A high dashed line at any epoch after 0: the layer was not needed for memorizing, as what "
    "it learns from {clean} examples alone is enough."
)

FIGURES = (
    FigureKind(
        ("3", "15", "16", "17"), "rewinding", "rewinding", REWINDING.name, plot_rewinding,
        "Accuracy with one layer from an earlier epoch.", _REWOUND, atypical=False,
    ),
    FigureKind(
        ("9",), "rewinding", "rewinding", REWINDING.name, plot_rewinding,
        "Accuracy on typical and atypical examples with one layer from an earlier epoch.",
        _REWOUND, atypical=True,
    ),
    FigureKind(
        ("rewinding-map",), "rewinding_map", "rewinding", REWINDING.name, plot_rewinding_map,
        "Accuracy with one layer from an earlier epoch, as a map.",
        "How late a layer's weights are still needed.",
    ),
    FigureKind(
        ("3", "15", "16", "17"), "rewinding_compared", "rewinding", REWINDING.name,
        plot_rewinding_compared,
        "Accuracy with one layer from an earlier epoch, by noise rate and model.",
        "Whether the critical layers differ between models and noise rates.",
        compares=OF_ANY_MODEL, page=9,
    ),
    FigureKind(
        ("4", "18"), "retraining", "retraining", RETRAINING.name, plot_retraining,
        "Accuracy while one layer is trained again on clean examples.",
        _RETRAINED.format(clean="clean"), atypical=False,
    ),
    FigureKind(
        ("19",), "retraining", "retraining", RETRAINING.name, plot_retraining,
        "Accuracy while one layer is trained again on typical examples.",
        _RETRAINED.format(clean="typical"), atypical=True,
    ),
    FigureKind(
        ("4", "18"), "retraining_compared", "retraining", RETRAINING.name,
        plot_retraining_compared,
        "Accuracy while one layer is trained again, by data set and noise rate.",
        _RETRAINED.format(clean="clean"), compares=OF_ANY_DATA, page=6, atypical=False,
    ),
    FigureKind(
        ("19",), "retraining_compared_atypical", "retraining", RETRAINING.name,
        plot_retraining_compared,
        "Accuracy while one layer is trained again on typical examples, by data set.",
        _RETRAINED.format(clean="typical"), compares=OF_ANY_DATA, page=6, atypical=True,
    ),
)  # fmt: skip
