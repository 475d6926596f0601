"""Scores of every example against counterfactual memorization."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from beyond.counterfactual import COUNTERFACTUAL, read_counterfactual
from beyond.example_scores import EXAMPLES, SCORES
from data import DataError
from engine.stats import rank_correlation
from plotting.beyond.scores import Table, draw_points, read_scores, readable, rows_of_kinds
from plotting.families import Family
from plotting.figure_kind import FigureKind
from plotting.style import PAGE, entitle, names_of


def plot_counterfactual(family: Family) -> Figure:
    """Draw scores of the first seed against counterfactual memorization, with rank correlations."""
    run = family.runs[0]
    memorization, names = read_counterfactual(run), names_of(family.config.data.split)
    if not EXAMPLES.path(run.directory).exists():
        raise DataError(f"{EXAMPLES.name} is missing: python -m beyond.example_scores makes it")
    table = read_scores(run)
    shown = [name for name in SCORES if np.isfinite(table[name]).any() and name != "dropped"]
    columns = 3
    lines = -(-len(shown) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(PAGE, 1.7 * lines), squeeze=False)
    for axes, name in zip(panels.flat, shown):
        for kind, rows in rows_of_kinds(table).items():
            draw_points(
                axes, table[name][rows], memorization["memorization"][rows], kind, names[kind]
            )
        rhos = _correlations(table, memorization["memorization"], name)
        axes.set_title(
            f"{readable(name)}\nall {rhos[0]:.2f}, {names['clean']} {rhos[1]:.2f}", size=7
        )
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for line in panels:
        line[0].set_ylabel("memorization")
    panels[0, 0].legend(markerscale=2)
    trained = int(memorization["trained_in"][0] + memorization["trained_out"][0])
    about = f"{family.title}; memorization: accuracy with minus without the example, {trained} "
    about += "trainings; above the panels: rank correlations"
    entitle(figure, "Scores of every example against counterfactual memorization", about)
    return figure


def _correlations(table: Table, memorization: np.ndarray, name: str) -> Sequence[float]:
    """Return the rank correlations with memorization over all and over clean examples."""
    finite = np.isfinite(table[name]) & np.isfinite(memorization)
    subsets = (finite, finite & rows_of_kinds(table)["clean"])
    return [rank_correlation(table[name][rows], memorization[rows]) for rows in subsets]


FIGURES = (
    FigureKind(
        ("counterfactual",), "counterfactual", "counterfactual", COUNTERFACTUAL.name,
        plot_counterfactual, "Scores of every example against counterfactual memorization.",
        "A score that measures memorization rises with it among the clean examples too.",
        beyond=True,
    ),
)  # fmt: skip
