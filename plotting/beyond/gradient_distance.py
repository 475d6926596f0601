"""Gradient norms against distances in feature space."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beyond.gradient_distance import (
    DISTANCES,
    PAIRS,
    Columns,
    middle_and_last,
    read_summary,
    read_table,
)
from plotting.families import Family
from plotting.figure_kind import FigureKind
from plotting.style import COLORS, DASHES, PAGE, SMALL, entitle, names_of


def plot_gradient_distance(family: Family) -> Figure:
    """Rank correlations of every seed over the epochs; two epochs of the first seed as points."""
    names, table = names_of(family.config.data.split), read_table(family.runs[0])
    shape = {"figsize": (PAGE, 2.4), "width_ratios": [1.3, 1, 1]}
    figure, (left, *panels) = plt.subplots(1, 3, **shape)
    for kind in ("clean", "noisy"):
        for number, run in enumerate(family.runs):
            rows = read_summary(run, kind, *PAIRS[0])
            epoch, rho = ([row[column] for row in rows] for column in ("epoch", "rho"))
            low, high = ([row[column] for row in rows] for column in ("low", "high"))
            label = names[kind] if number == 0 else None
            left.plot(epoch, rho, DASHES[kind], marker=".", color=COLORS[kind], label=label)
            left.fill_between(epoch, low, high, color=COLORS[kind], alpha=0.15, lw=0)
    left.axhline(0, color="0.7", lw=0.6, zorder=0)
    left.set(xlabel="epoch", ylabel="rank correlation of\ngradient norm with distance")
    left.set_title("95% intervals")
    left.legend()
    for axes, epoch in zip(panels, middle_and_last(np.unique(table["epoch"]))):
        draw_points(axes, table, epoch)
        axes.set_title(f"epoch {epoch}, seed {family.runs[0].config.seed}")
    panels[0].set_ylabel("gradient norm")
    entitle(figure, "Gradient norms and distances to the class", family.about)
    return figure


def draw_points(axes: Axes, table: Columns, epoch: int) -> None:
    """Gradient norm against distance, noisy above clean ones; a logarithm has no place for 0."""
    x, y = table["distance"], table["gradient_norm"]
    here = table["epoch"] == epoch
    shown = here & np.isfinite(x) & np.isfinite(y) & (y > 0)
    for kind, memorized in (("clean", 0), ("noisy", 1)):
        rows = shown & (table["memorized"] == memorized)
        points = {"s": 3, "alpha": 0.4, "lw": 0, "color": COLORS[kind], "rasterized": True}
        axes.scatter(x[rows], y[rows], **points)
    axes.set_xlabel("distance to the class")
    if shown.any():
        axes.set_yscale("log")
    if left_out := int((here & ~shown).sum()):
        axes.text(
            0, 1, f"{left_out} not shown: 0, or no number", transform=axes.transAxes, size=SMALL
        )


FIGURES = (
    FigureKind(
        ("gradient-distance",), "gradient_distance", "gradient_distance", DISTANCES.name,
        plot_gradient_distance, "Gradient norms and distances to the class.",
        "A rank correlation above 0: examples far from their class have larger gradients.",
        beyond=True,
    ),
)  # fmt: skip
