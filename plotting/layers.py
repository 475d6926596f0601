"""Figures of single layers: rewinding (3, 9, 15-17) and retraining (4, 18, 19)."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from engine.runs.tables import ResultTable
from layer_retraining import RETRAINING
from layer_rewinding import REWINDING
from plotting.families import Family
from plotting.figure_kind import OF_ANY_MODEL, FigureKind
from plotting.gradients import draw_curves
from plotting.style import PAGE, draw_band, names_of, wrapped

LINES_AT_MOST = 11  # more would not be told apart


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
    return plot_rewinding_compared([family])


def plot_rewinding_compared(families: Sequence[Family]) -> Figure:
    """The same of several runs, a row for each; a line for each epoch that layers go back to."""
    rows = len(families)
    figure, panels = plt.subplots(
        rows, 3, figsize=(PAGE, 1.75 * rows + 0.5), sharey=True, squeeze=False
    )
    for (curves, *rewound), family in zip(panels, families):
        draw_curves(curves, family, ("clean", "noisy"))
        curves.legend(loc="best")
        curves.set_ylabel("accuracy")
        curves.set_title(f"{wrapped(family.title, PAGE / 3)}\n({family.seeds})", loc="left")
        table = by_group(family, REWINDING)
        scale = _draw_rewound(rewound, table, names_of(family.config.data.split))
        bar = figure.colorbar(scale, ax=rewound, label="rewound to epoch", pad=0.02)
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
    return figure


def _draw_rewound(panels: Sequence[Axes], table: dict, names: dict[str, str]) -> ScalarMappable:
    """Clean and noisy accuracy against the layer; the scale that the lines are coloured by."""
    groups, epochs = table["group"], table["epoch"]
    shown = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), LINES_AT_MOST)).round())
    scale = ScalarMappable(Normalize(epochs.min(), epochs.max()), "viridis_r")
    for axes, kind in zip(panels, ("clean", "noisy")):
        mean = table[f"acc_{kind}"].mean(0)
        for i in shown.astype(int):
            axes.plot(groups, mean[:, i], "o-", color=scale.to_rgba(epochs[i]))
        axes.set(title=f"{names[kind]} examples", xlabel="layer that is rewound")
        axes.set(xticks=groups, xlim=(groups[0] - 0.3, groups[-1] + 0.3))
    return scale


def plot_rewinding_map(family: Family) -> Figure:
    """The same as a map, layer by epoch: accuracy on the memorized examples."""
    table = by_group(family, REWINDING)
    groups, epochs = table["group"], table["epoch"]
    names = names_of(family.config.data.split)
    every = -(-len(epochs) // LINES_AT_MOST)
    figure, panels = plt.subplots(1, 2, figsize=(PAGE, 2.5), sharey=True)
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
    figure.suptitle(wrapped(f"{family.title} ({family.seeds})", PAGE), fontsize=8)
    return figure


def plot_retraining(family: Family) -> Figure:
    """A panel for each layer: accuracies while it is trained again, on clean examples only."""
    table = by_group(family, RETRAINING)
    names = names_of(family.config.data.split)
    count = len(table["group"])
    rows = -(-count // 3)
    figure, panels = plt.subplots(
        rows, 3, figsize=(PAGE, 1.35 * rows + 0.4), sharex=True, sharey=True, squeeze=False
    )
    for group, axes in enumerate(panels.flat):
        if group >= count:
            axes.set_visible(False)
            continue
        for kind in ("clean", "noisy"):
            values = table[f"acc_{kind}"][:, group]
            draw_band(axes, table["epoch"], values, kind, names[kind])
        axes.set(title=f"layer {group}", ylim=(0, 1.04))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    panels[0, 0].legend(loc="lower right")
    figure.supxlabel("epoch of retraining (0: the layer as initialized)", fontsize=8)
    figure.supylabel("accuracy", fontsize=8)
    figure.suptitle(wrapped(f"{family.title} ({family.seeds})", PAGE), fontsize=8)
    return figure


FIGURES = (
    FigureKind(
        ("3", "9", "15", "16", "17"), "rewinding", "rewinding", REWINDING.name, plot_rewinding,
        "Lines near the top: layers that can go back without losing the memorized examples; "
        "layers that matter for these matter for the clean ones too.",
    ),
    FigureKind(
        ("rewinding-map",), "rewinding_map", "rewinding", REWINDING.name, plot_rewinding_map,
        "The same as a map: how late a layer's weights are still needed.",
    ),
    FigureKind(
        ("3", "15", "16", "17"), "rewinding_compared", "rewinding", REWINDING.name,
        plot_rewinding_compared,
        "Which layers are critical differs between models and noise rates.",
        compares=OF_ANY_MODEL,
    ),
    FigureKind(
        ("4", "18", "19"), "retraining", "retraining", RETRAINING.name, plot_retraining,
        "A high dashed line at any epoch after 0: the layer was not needed for memorizing, as what "
        "it learns from clean examples alone is enough.",
    ),
)  # fmt: skip
