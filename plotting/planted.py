"""Planted memorization: the result files, and figures of localizers against the truth."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plotting.families import Family
from plotting.style import COLORS, PAGE, wrapped

SHARES_AT = (1, 5, 10)
TRUTH_FILE_NAME = "planted_memorization.csv"
TRUTH_TEXT = ("localizer", "truth", "layer", "subset")
TRUTH_COLUMNS = (
    *TRUTH_TEXT, "examples",
    *(f"share_planted_at_{k}" for k in SHARES_AT), "expected_by_chance",
    "recall", "recall_low", "recall_high", "auc", "low", "high",
    *(f"flips_at_{k}" for k in SHARES_AT),
)  # fmt: skip
DELETION_FILE_NAME = "planted_memorization_deletion.csv"
DELETION_TEXT = ("localizer", "subset")
DELETION_COLUMNS = (
    *DELETION_TEXT, "examples", "closed",
    "acc_trained", "low", "high", "acc_true", "acc_others", "acc_test",
)  # fmt: skip
CHANNEL_FILE_NAME = "planted_memorization_channel.csv"
CHANNEL_TEXT = ("layer", "localizer", "state")
CHANNEL_COLUMNS = (
    *CHANNEL_TEXT, "channels", "examples", "units",
    "found_at_1", "found_at_5", "median_rank", "auc", "low", "high", "acc_others", "acc_test",
)  # fmt: skip
ERASURE_FILE_NAME = "erasure.csv"
ERASURE_TEXT = ("method", "layer")
ERASURE_COLUMNS = (
    *ERASURE_TEXT, "examples", "units",
    "acc_erased", "acc_erased_true", "acc_others", "acc_others_clean", "acc_others_noisy",
    "acc_test", "seconds",
)  # fmt: skip

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


def plot_localizers(families: Sequence[Family]) -> Figure:
    """Draw each localizer's recall by setting: a point a seed, with its 95% interval."""
    shape = {"figsize": (max(3.6, min(PAGE, 1.4 + 2 * len(families))), 3.2), "sharey": True}
    figure, panels = plt.subplots(1, len(families), squeeze=False, **shape)
    for axes, family in zip(panels[0], families):
        names = draw_recall(axes, family)
        axes.set_title(f"{wrapped(family.title, 2.2)}\n{family.seeds}", size=7)
        axes.set_xlabel("recall of own memorization neurons")
    panels[0, 0].set_yticks(range(len(names)), [words(name) for name in names])
    panels[0, 0].invert_yaxis()
    panels[0, 0].legend(loc="upper right")
    return figure


def draw_recall(axes: Axes, family: Family) -> list[str]:
    """Draw noisy and clean examples' recall of every seed, and the chance line."""
    rows = family.rows(TRUTH_FILE_NAME, TRUTH_COLUMNS, TRUTH_TEXT)
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


def plot_deletion(family: Family) -> Figure:
    """Draw the share of predictions that survive as the first ranked units are closed."""
    rows = family.rows(DELETION_FILE_NAME, DELETION_COLUMNS, DELETION_TEXT)
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
    figure.suptitle(wrapped(f"{family.title}, {family.seeds}", PAGE), fontsize=8)
    return figure
