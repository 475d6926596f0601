"""Scores of every example: the figures that compare them."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from beyond.example_scores import ABOUT, AREAS, CORRELATIONS, EXAMPLES, SCORES
from data import DataError
from engine.runs.run import Run
from plotting.families import Family
from plotting.figure_kind import FigureKind
from plotting.style import COLORS, COLUMN, PAGE, entitle, in_percent, names_of

PAPER_AUC = {"neurons": 0.89, "learning time": 0.87, "forgetting time": 0.93}  # Section 6.1
CURVES = ("neurons", "learning_time", "forgetting_time", "summed_loss", "aum", "prediction_depth")
CURVE_COLORS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")

Table = dict[str, np.ndarray]  # column -> values [rows]


def read_scores(run: Run) -> Table:
    """Read the scores of a run's examples; nan where a cell is empty."""
    rows = EXAMPLES.read(run.directory)
    table = {c: np.array([row[c] for row in rows], dtype=int) for c in ABOUT}
    for name in SCORES:
        table[name] = np.array([float(row[name]) if row[name] else np.nan for row in rows])
    return table


def readable(name: str) -> str:
    return {"aum": "AUM", "el2n": "EL2N", "c_score": "C-score"}.get(name, name.replace("_", " "))


def rows_of_kinds(table: Table) -> dict[str, np.ndarray]:
    """Return the rows of each kind of example, the rarer kind last, to be drawn on top."""
    return {"clean": table["memorized"] == 0, "noisy": table["memorized"] == 1}


def draw_points(axes: Axes, x: np.ndarray, y: np.ndarray, kind: str, name: str) -> None:
    settings = {"s": 4, "alpha": 0.4, "lw": 0, "rasterized": True}
    axes.scatter(x, y, color=COLORS[kind], label=name, **settings)


# ---------------------------------------------------------------- the data map, and depth


def plot_data_map(family: Family) -> Figure:
    """Draw confidence against variability of every example of the first seed."""
    table, names = read_scores(family.runs[0]), names_of(family.config.data.split)
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6))
    for kind, rows in rows_of_kinds(table).items():
        draw_points(axes, table["variability"][rows], -table["confidence"][rows], kind, names[kind])
    axes.set(xlabel="variability: standard deviation over epochs", ylim=(0, 1))
    axes.set_ylabel("confidence: mean probability")
    axes.legend()
    entitle(figure, "Data map of the training examples", f"{family.title}, first seed")
    return figure


def plot_depth(family: Family) -> Figure:
    """Draw how deep predictions of noisy and of clean examples are made, over all seeds."""
    tables, names = [read_scores(run) for run in family.runs], names_of(family.config.data.split)
    depth = np.concatenate([table["prediction_depth"] for table in tables])
    if not np.isfinite(depth).any():
        raise DataError("prediction depth was not measured (scores.neighbours: null)")
    figure, axes = plt.subplots(figsize=(COLUMN, 2.2))
    place = np.arange(int(np.nanmax(depth)) + 1)
    for kind, shift in (("clean", -0.2), ("noisy", 0.2)):
        own = np.concatenate(
            [t["prediction_depth"][rows_of_kinds(t)[kind]] for t in tables]
        ).astype(int)
        share = np.bincount(own, minlength=len(place)) / max(1, len(own))
        mean = f", mean {own.mean():.2f}" if len(own) else ""
        axes.bar(place + shift, share, 0.4, color=COLORS[kind], label=names[kind] + mean)
    axes.set(xlabel="prediction depth (0: the input)", ylabel="share of examples")
    axes.yaxis.set_major_formatter(in_percent)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    entitle(figure, "Prediction depth", family.about)
    return figure


# ---------------------------------------------------------------- scores against the truth


def roc_curve(score: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return false and true positive rates as the threshold falls; equal scores pass together."""
    values, place = np.unique(-score, return_inverse=True)
    place = place.reshape(-1)
    rates = []
    for kind in (~truth, truth):
        counts = np.bincount(place[kind], minlength=len(values))
        rates.append(np.append(0, counts.cumsum()) / max(1, kind.sum()))
    return rates[0], rates[1]


def plot_roc(family: Family) -> Figure:
    """Draw ROC curves of some scores of the first seed, and every seed's AUC beside the paper's."""
    table = read_scores(family.runs[0])
    searched = np.isfinite(table["neurons"])
    figure, (curves, areas) = plt.subplots(1, 2, figsize=(PAGE, 3), width_ratios=[1, 1.2])
    # Thinner from curve to curve, so that one shows below another that is the same.
    widths = np.linspace(3, 1, len(CURVES))
    for name, color, width in zip(CURVES, CURVE_COLORS, widths):
        use = np.isfinite(table[name]) & (searched if searched.any() else True)
        if use.any():
            rates = roc_curve(table[name][use], table["memorized"][use] == 1)
            curves.plot(*rates, color=color, lw=width, label=readable(name))
    curves.plot([0, 1], [0, 1], color="0.7", lw=0.6, zorder=0)
    curves.set(xlabel="false positives", ylabel="memorized examples found")
    curves.legend(loc="lower right")
    on = "searched" if searched.any() else "all"
    curves.set_title(f"{on} examples, seed {family.config.seed}")
    _draw_areas(areas, family, on)
    entitle(figure, "Memorized examples found by each score", family.about)
    return figure


def _draw_areas(axes: Axes, family: Family, on: str) -> None:
    """Draw a row of dots for every score, a dot a seed; diamonds are the paper's."""
    rows = [row for row in family.rows(AREAS) if row["on"] == on]
    of = {n: [r["auc"] for r in rows if r["score"] == n] for n in SCORES}
    names = sorted((n for n in SCORES if np.isfinite(of[n]).any()), key=lambda n: np.mean(of[n]))
    for place, name in enumerate(names):
        axes.plot(of[name], [place] * len(of[name]), "o", color=COLORS["clean"])
        if paper := PAPER_AUC.get(readable(name)):
            axes.plot(paper, place, "D", color=COLORS["noisy"], fillstyle="none")
    axes.plot([], [], "o", color=COLORS["clean"], label="ours")
    axes.plot([], [], "D", color=COLORS["noisy"], fillstyle="none", label="paper, CIFAR-10")
    axes.axvline(0.5, color="0.7", lw=0.6, zorder=0)
    axes.set_yticks(range(len(names)), [readable(name) for name in names])
    axes.set(xlabel=f"AUC, {on} examples")
    axes.legend()


# ---------------------------------------------------------------- scores against one another


def plot_score_correlations(family: Family) -> Figure:
    """Draw the rank correlation of every pair: over all examples above, over clean ones below."""
    rows = family.rows(CORRELATIONS)
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["score"], row["with"], row["on"]), []).append(row["rho"])
    with_numbers = {n for (a, b, _), rho in found.items() if np.isfinite(rho).all() for n in (a, b)}
    names = [name for name in SCORES if name in with_numbers]
    if not names:
        raise DataError("no two scores have a rank correlation")
    matrix = np.eye(len(names))
    for i, name in enumerate(names):
        for j, other in enumerate(names[i + 1 :], start=i + 1):
            matrix[i, j] = np.mean(found[name, other, "all"])
            matrix[j, i] = np.mean(found[name, other, "clean"])
    figure, axes = plt.subplots(figsize=(PAGE, PAGE * 0.85))
    image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr")
    for (i, j), rho in np.ndenumerate(matrix):
        if i != j:
            number = f"{rho:.2f}" if np.isfinite(rho) else "-"
            dark = {"color": "white"} if abs(rho) > 0.7 else {}
            axes.text(j, i, number, ha="center", va="center", size=6.5, **dark)
    words = [readable(name) for name in names]
    axes.set_xticks(range(len(names)), words, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), words)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="Spearman's rank correlation", shrink=0.8)
    about = "above the diagonal: all examples, below: clean ones"
    entitle(figure, "Rank correlations of scores", f"{family.about}; {about}")
    return figure


FIGURES = (
    FigureKind(
        ("data-map",), "data_map", "scores", EXAMPLES.name, plot_data_map,
        "Data map of the training examples.",
        "Low confidence: labels that the network does not fit until late. Left of them, and high, "
        "are the examples that it fits early and keeps.",
        beyond=True,
    ),
    FigureKind(
        ("roc",), "roc", "scores", AREAS.name, plot_roc,
        "Memorized examples found by each score.",
        "Which score finds the memorized examples, on the same weights and examples.",
        beyond=True,
    ),
    FigureKind(
        ("score-correlations",), "score_correlations", "scores", CORRELATIONS.name,
        plot_score_correlations, "Rank correlations of scores.",
        "Scores that agree over all examples may agree on nothing but which labels are wrong: "
        "below the diagonal only clean examples are left.",
        beyond=True,
    ),
    FigureKind(
        ("depth",), "prediction_depth", "scores", EXAMPLES.name, plot_depth,
        "Prediction depth of clean and noisy examples.",
        "Where the noisy bars lie: by this measure the layers there decide the memorized examples. "
        "Compare rewinding of the same weights.",
        beyond=True,
    ),
)  # fmt: skip
