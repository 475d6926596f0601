"""Contact sheets: what the memorized examples look like, for a person to judge."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data import Split
from engine.training.build import load_split_at_hand
from plotting.families import Family
from plotting.figure_kind import FigureKind
from plotting.style import PAGE, SMALL, entitle

ACROSS, DOWN = 8, 3  # images on each half of a sheet
PITCH, ROOM = 1.15, 0.5  # in images: from one to the next, and for a caption above it


def choose_shown(split: Split, kind: str) -> list[tuple[str, np.ndarray]]:
    """Two halves of a sheet, each with its heading and its rows of the split.

    Of atypical examples: the least and the most typical ones. Else: the first memorized examples
    and the first clean ones.
    """
    count = ACROSS * DOWN
    memorized = split.memorized.cpu().numpy()
    if kind != "atypical":
        mislabeled = {"noise": "mislabeled at random", "human": "mislabeled by people"}[kind]
        return [
            (f"{mislabeled}: given label (true label)", np.flatnonzero(memorized)[:count]),
            ("clean: label", np.flatnonzero(~memorized)[:count]),
        ]
    order = split.typicality.argsort(stable=True).cpu().numpy()
    return [
        ("least typical: label, score", order[:count]),
        ("most typical: label, score", order[::-1][:count]),
    ]


def plot_examples(family: Family) -> Figure:
    """The sheet of a run's training set; it is the same for every seed."""
    split = load_split_at_hand(family.config)
    halves = choose_shown(split, family.config.data.split)
    sheets = []
    for heading, rows in halves:
        captions = [_caption(split, row, family.config.data.split) for row in rows]
        sheets.append((heading, split.images[rows.tolist()], captions))
    figure = draw_sheets(sheets, ACROSS)
    entitle(figure, "Training examples", family.title)
    return figure


def draw_sheets(sheets: Sequence[tuple[str, Tensor, Sequence[str]]], across: int) -> Figure:
    """Sheets above one another, each with its heading, its images and their captions."""
    rows = [max(1, -(-len(captions) // across)) for _, _, captions in sheets]
    inches = PAGE / (across * PITCH)  # of an image
    height = inches * (PITCH + ROOM) * sum(rows) + 0.25 * len(sheets)
    figure, panels = plt.subplots(
        len(sheets), 1, figsize=(PAGE, height), height_ratios=rows, squeeze=False
    )
    for axes, (heading, images, captions) in zip(panels.flat, sheets):
        draw_sheet(axes, images, captions, across)
        axes.set_title(heading, loc="left")
    return figure


def draw_sheet(axes: Axes, images: Tensor, captions: Sequence[str], across: int) -> None:
    """Images [n, channels, height, width] in rows of `across`, each below its caption."""
    axes.set_axis_off()
    axes.set_aspect("equal")
    rows = max(1, -(-len(images) // across))
    axes.set(xlim=(0, across * PITCH), ylim=(rows * (PITCH + ROOM), 0))
    for place, (image, caption) in enumerate(zip(images, captions)):
        down, right = divmod(place, across)
        left, top = right * PITCH, down * (PITCH + ROOM) + ROOM
        axes.imshow(
            image.permute(1, 2, 0).cpu().numpy(),
            cmap="gray", vmin=0, vmax=255, interpolation="nearest",
            extent=(left, left + 1, top + 1, top),
        )  # fmt: skip
        axes.text(left + 0.5, top - 0.05, caption, fontsize=SMALL, ha="center", va="bottom")


def _caption(split: Split, row: int, kind: str) -> str:
    given, true = (split.class_names[int(label[row])] for label in (split.label, split.true_label))
    if kind == "atypical":
        return f"{given}, {split.typicality[row]:.2f}"
    return given if given == true else f"{given}\n({true})"


FIGURES = (
    FigureKind(
        ("examples",), "examples", "gradients", "split.npz", plot_examples, "Training examples.",
        "What there is to memorize: judge for yourself whether a person would give these labels.",
    ),
)  # fmt: skip
