"""Style of all figures: one text size, readable in print, on a phone, and without colour vision."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 5.5  # inches: one column, and the width of a page
SMALL = 6.5  # points: the smallest text, readable where a page is 400 pixels wide
CHARACTER = 0.0083  # inches of a letter for each point of its size
LINE = 0.0175  # inches of a line for each point of its size

# From the palette of Okabe and Ito, which keeps its differences for colour-blind readers.
CLEAN, NOISY, TOTAL, TEST = "#0072B2", "#D55E00", "#444444", "#009E73"
DASHES = {"clean": "-", "noisy": "--", "total": ":", "test": "-."}
COLORS = {"clean": CLEAN, "noisy": NOISY, "total": TOTAL, "test": TEST}

SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.labelsize": 8,
    "figure.titlesize": 8,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
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
    """Apply the settings above to figures drawn inside; never open a window."""
    matplotlib.use("Agg")
    with matplotlib.rc_context(SETTINGS):
        yield


def wrapped(text: str, inches: float, points: float = 8) -> str:
    """Break a text into lines that are no wider than this."""
    characters = int(inches / (CHARACTER * points))
    return "\n".join(textwrap.wrap(text, characters, break_on_hyphens=False))


def entitle(figure: Figure, subject: str, about: str, key: Axes | None = None) -> None:
    """Write the subject above a figure and, in small letters, the runs that it shows.

    The figure grows by the height of these lines. The legend of the axes `key` stands beside them.
    """
    width, height = figure.get_size_inches()
    room = width
    if key is not None:
        handles, labels = key.get_legend_handles_labels()
        room -= 0.7 * len(labels)
        look = {"ncols": len(labels), "borderaxespad": 0.2, "columnspacing": 1}
        figure.legend(handles, labels, loc="upper right", **look).set_in_layout(False)
    texts = [
        (wrapped(subject, room, 8), {"size": 8}),
        (wrapped(about, room, SMALL), {"size": SMALL, "color": "#555555"}),
    ]
    sizes = [(text.count("\n") + 1) * LINE * style["size"] for text, style in texts]
    whole = height + sum(sizes) + 0.06
    figure.set_size_inches(width, whole)
    top = 0.02
    for (text, style), size in zip(texts, sizes):
        figure.text(0.06 / width, 1 - top / whole, text, va="top", linespacing=1.15, **style)
        top += size
    figure.get_layout_engine().set(rect=(0, 0, 1, height / whole))


def names_of(split: str) -> dict[str, str]:
    """Return the names of the two kinds of examples; atypical splits have no mislabeled ones."""
    if split == "atypical":
        return {"clean": "typical", "noisy": "atypical", "total": "all", "test": "test"}
    return {name: name for name in COLORS}


def in_percent(value: float, place: int | None = None) -> str:
    """Return a tick's label, with decimals only where it has them: '40%', '2.5%'."""
    return f"{100 * value:.4g}%"


def draw_mean(axes: Axes, x: np.ndarray, values: np.ndarray, style: str, **settings) -> None:
    """Draw the mean over the first axis (seeds) as a line, and a standard deviation around it."""
    mean = values.mean(0)
    (line,) = axes.plot(x, mean, style, **settings)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, lw=0)


def draw_band(axes: Axes, x: np.ndarray, values: np.ndarray, kind: str, label: str) -> None:
    """Draw mean and spread over seeds in the line style of a kind of examples."""
    draw_mean(axes, x, values, DASHES[kind], color=COLORS[kind], label=label)
