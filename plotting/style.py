"""Style of all figures: sized for a printed column, readable without colour vision."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes

COLUMN, PAGE = 3.3, 6.9  # inches: one column, and both
CHARACTER = 0.066  # inches, of a title

# From the palette of Okabe and Ito, which keeps its differences for colour-blind readers.
CLEAN, NOISY, TOTAL, TEST = "#0072B2", "#D55E00", "#444444", "#009E73"
DASHES = {"clean": "-", "noisy": "--", "total": ":", "test": "-."}
COLORS = {"clean": CLEAN, "noisy": NOISY, "total": TOTAL, "test": TEST}

SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # letters stay letters in the PDF
}


@contextmanager
def paper_style() -> Iterator[None]:
    """The settings above for what is drawn inside; no window is ever opened."""
    matplotlib.use("Agg")
    with matplotlib.rc_context(SETTINGS):
        yield


def wrapped(title: str, inches: float) -> str:
    """A title in lines that are no wider than its figure."""
    return "\n".join(textwrap.wrap(title, int(inches / CHARACTER), break_on_hyphens=False))


def names_of(split: str) -> dict[str, str]:
    """Return the names of the two kinds of examples; atypical splits have no mislabeled ones."""
    if split == "atypical":
        return {"clean": "typical", "noisy": "atypical", "total": "all", "test": "test"}
    return {name: name for name in COLORS}


def draw_band(axes: Axes, x: np.ndarray, values: np.ndarray, kind: str, label: str) -> None:
    """The mean over the first axis (seeds) as a line, and a standard deviation around it."""
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None
    axes.plot(x, mean, DASHES[kind], color=COLORS[kind], label=label)
    if spread is not None:
        axes.fill_between(x, mean - spread, mean + spread, color=COLORS[kind], alpha=0.2, lw=0)
