"""Contact sheets: what the memorized examples look like, for a person to judge."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from data import Split
from engine.setup import load_split
from plotting.runs import Family
from plotting.style import PAGE

ACROSS, DOWN = 12, 3  # images on each half of a sheet


def choose_examples(split: Split, kind: str) -> list[tuple[str, np.ndarray]]:
    """Two halves of a sheet, each with its heading and its rows of the split.

    Where typicality is known: the most and the least typical. Else: clean examples and memorized
    ones, the first of each.
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
    split = load_split(family.config)
    halves = choose_examples(split, family.config.data.split)
    figure = plt.figure(figsize=(PAGE, 5.6))
    for part, (heading, rows) in zip(figure.subfigures(2, 1), halves):
        part.suptitle(heading, fontsize=8, x=0.01, ha="left")
        panels = part.subplots(DOWN, ACROSS)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, row in zip(panels.flat, rows):
            image = split.images[row].permute(1, 2, 0).cpu().numpy()
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(_caption(split, row, family.config.data.split), fontsize=5.5, pad=2)
    return figure


def _caption(split: Split, row: int, kind: str) -> str:
    given, true = (split.class_names[int(label[row])] for label in (split.label, split.true_label))
    if kind == "atypical":
        return f"{given}, {split.typicality[row]:.2f}"
    return given if given == true else f"{given}\n({true})"
