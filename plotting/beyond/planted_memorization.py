"""Planted memorization: localizers against the truth, and deletion curves."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from beyond.planted_memorization import DELETIONS, TRUTHS
from plotting.families import Family, describe, name_models
from plotting.figure_kind import FigureKind
from plotting.style import COLORS, PAGE, SMALL, entitle

# Colour, marker, and width of each line; the colours are those of Okabe and Ito.
LINES = {
    "planted": ("#000000", "o", 2.2),
    "flipping": ("#D55E00", "s", 1.6),
    "gate_gain": ("#E69F00", "^", 0.9),
    "zero_out": ("#CC79A7", "v", 0.9),
    "activation": ("#56B4E9", "D", 0.9),
    "activation_gradient": ("#009E73", "<", 0.9),
    "integrated_gradients": ("#0072B2", ">", 0.9),
    "unitmem": ("#AA9900", "P", 0.9),
    "unitmem_own_masks": ("#777777", "X", 0.9),
    "random": ("#999999", "", 1.2),
}


def words(name: str) -> str:
    return name.replace("_", " ")


def plot_recall(family: Family) -> Figure:
    """Draw each localizer's recall of one setting: a point a seed, with its 95% interval."""
    figure, axes = plt.subplots(figsize=(3.6, 3.2))
    names = draw_recall(axes, family)
    axes.set_xlabel("recall of own memorization neurons")
    axes.set_yticks(range(len(names)), [words(name) for name in names])
    axes.invert_yaxis()
    axes.legend(loc="upper right")
    entitle(figure, "Recall of planted memorization neurons by localizer", family.about)
    return figure


def draw_recall(axes: Axes, family: Family) -> list[str]:
    """Draw noisy and clean examples' recall of every seed, and the chance line."""
    rows = family.rows(TRUTHS)
    rows = [row for row in rows if (row["truth"], row["layer"]) == ("own", "all")]
    names = list(dict.fromkeys(row["localizer"] for row in rows))
    for subset, side in (("noisy", -1), ("clean", 1)):
        for place, name in enumerate(names):
            own = [row for row in rows if (row["localizer"], row["subset"]) == (name, subset)]
            for number, row in enumerate(own):
                below = row["recall"] - row["recall_low"]
                above = row["recall_high"] - row["recall"]
                axes.errorbar(
                    row["recall"], place + side * (0.1 + 0.08 * number), xerr=[[below], [above]],
                    color=COLORS[subset], marker="o" if subset == "noisy" else "s", lw=0.8,
                    label=subset if place == number == 0 else None,
                )  # fmt: skip
    chance = np.mean([row["expected_by_chance"] for row in rows])
    axes.axvline(chance, color="0.3", lw=0.8, ls=":", label="chance")
    axes.set_xlim(0, 1)
    return names


def plot_settings(families: Sequence[Family]) -> Figure:
    """Draw each localizer's recall in a panel of its own, beside chance: a point a setting."""
    tables = [recall_by_setting(family) for family in families]
    places, names = np.arange(len(families)), list(LINES)[1:]
    figure, panels = plt.subplots(3, 3, figsize=(PAGE, 5.6), sharex=True, sharey=True)
    for axes, name in zip(panels.flat, names):
        for subset, shift in (("noisy", -0.12), ("clean", 0.12)):
            mean, below, above, _ = np.array([table[name, subset] for table in tables]).T
            axes.errorbar(
                places + shift, mean, yerr=[below, above], fmt="o" if subset == "noisy" else "s",
                color=COLORS[subset], lw=0.8, label=subset,
            )  # fmt: skip
        chance = [table[name, "noisy"][3] for table in tables]
        axes.hlines(chance, places - 0.4, places + 0.4, color="0.3", lw=0.8, label="chance")
        axes.set_title(words(name))
    panels[0, 0].set(ylim=(0, 1), xlim=(-0.5, len(families) - 0.5))
    for axes in panels[-1]:
        axes.set_xticks(places, name_settings(families), rotation=90, size=SMALL)
    figure.supxlabel("setting; two numbers: p_gen, p_mem")
    figure.supylabel("recall of own memorization neurons")
    subject = "Recall of planted memorization neurons by localizer and setting"
    entitle(figure, subject, describe(families), panels[0, 0])
    return figure


def recall_by_setting(family: Family) -> dict[tuple[str, str], tuple[float, ...]]:
    """Return (localizer, subset) -> recall, its errors below and above, and chance.

    The errors are the standard deviation over seeds; with one seed, the 95% interval over examples.
    """
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in family.rows(TRUTHS):
        if (row["truth"], row["layer"]) == ("own", "all"):
            rows.setdefault((row["localizer"], row["subset"]), []).append(row)
    found = {}
    for key, own in rows.items():
        recall = [row["recall"] for row in own]
        if len(own) > 1:
            below = above = np.std(recall, ddof=1)
        else:
            below, above = recall[0] - own[0]["recall_low"], own[0]["recall_high"] - recall[0]
        chance = np.mean([row["expected_by_chance"] for row in own])
        found[key] = (np.mean(recall), below, above, chance)
    return found


def name_settings(families: Sequence[Family]) -> list[str]:
    """Return what tells these families apart, in a few words: data set, model, p_gen and p_mem."""
    data = [family.data for family in families]
    if len({words.split()[0] for words in data}) == len(set(data)):
        data = [words.split()[0] for words in data]  # without the number of images
    models = [family.config.model for family in families]
    widths = [f"width {model.arguments.get('width', 1):g}" for model in models]
    one = len({model.name for model in models}) == 1
    each = (
        data,
        widths if one else [family.model for family in families],
        [family.split for family in families],
        [f"{f.config.dropout.p_gen:g}, {f.config.dropout.p_mem:g}" for f in families],
    )
    apart = [of for of in each if len(set(of)) > 1]
    names = [", ".join(words) for words in zip(*apart)] if apart else [""] * len(families)
    if len(set(names)) < len(families):
        rest = zip(names, name_models(families), families)
        names = [", ".join(filter(None, (n, m))) + family.apart for n, m, family in rest]
    return names


def plot_deletion(family: Family) -> Figure:
    """Draw the share of predictions that survive as the first ranked units are closed."""
    rows = family.rows(DELETIONS)
    figure, panels = plt.subplots(1, 2, figsize=(PAGE, 2.9), sharey=True)
    for axes, subset in zip(panels, ("noisy", "clean")):
        for name, (color, marker, width) in LINES.items():
            own = [row for row in rows if (row["localizer"], row["subset"]) == (name, subset)]
            closed = sorted({row["closed"] for row in own})
            held = [np.mean([r["acc_trained"] for r in own if r["closed"] == k]) for k in closed]
            axes.plot(closed, held, marker=marker, color=color, lw=width, label=words(name))
        axes.set_xscale("symlog", linthresh=5)
        axes.set_xticks(closed, [f"{count:g}" for count in closed])
        axes.minorticks_off()
        axes.set(xlabel="units closed, highest score first", title=f"{subset} examples")
    panels[0].set_ylabel("still predicted as trained")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    entitle(figure, "Predictions that survive closing the first ranked units", family.about)
    return figure


FIGURES = (
    FigureKind(
        ("planted-memorization",), "planted_memorization", "planted", TRUTHS.name, plot_recall,
        "Recall of planted memorization neurons by localizer.",
        "Recall above chance for noisy examples and not for clean ones: a localizer that finds "
        "memory. Own masks alone make every memorization neuron selective.",
        beyond=True,
    ),
    FigureKind(
        ("planted-memorization-compared",), "planted_memorization_compared", "planted",
        TRUTHS.name, plot_settings,
        "Recall of planted memorization neurons, by localizer and setting.",
        "Whether a localizer rises above chance in some setting, and their order in each. "
        "Error bars: standard deviation over seeds; with one seed, the 95% interval over examples.",
        compares=r"(data|model|train|dropout)\..+", page=18, beyond=True,
    ),
    FigureKind(
        ("planted-memorization-deletion",), "planted_memorization_deletion", "planted",
        DELETIONS.name, plot_deletion,
        "Predictions that survive closing the first ranked units.",
        "The planted neurons cost noisy examples their labels and clean ones nothing; ranked units "
        "cost both.",
        beyond=True,
    ),
)  # fmt: skip
