"""Masks of a trained model (Figure 6), and the examples that dropping forgets (7)."""

import re

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from data import DataError, Split
from engine.runs.tables import DROPOUT_SITES
from engine.training.build import load_split_at_hand
from example_tied_dropout import FORGOTTEN
from models.dropout import ExampleTiedDropout
from plotting.examples import draw_sheet
from plotting.families import Family
from plotting.figure_kind import FigureKind
from plotting.style import CLEAN, NOISY, PAGE, wrapped

EXAMPLES, NEURONS = 24, 64  # of each layer, at the most, evenly spread: more cannot be seen
ACROSS, DOWN = 8, 3


def remake_layers(family: Family, split: Split) -> dict[str, ExampleTiedDropout]:
    """Return the dropout layers of the first run by site, made without the network's code."""
    directory, own = family.runs[0].directory, family.config.dropout
    if not DROPOUT_SITES.path(directory).exists():
        raise DataError(f"{directory}: has no {DROPOUT_SITES.name}, as of an earlier version")
    n = int(split.index.max()) + 1
    return {
        row["site"]: ExampleTiedDropout(
            int(row["channels"]), n, own.p_gen, own.p_mem, own.seed, layer=number
        )
        for number, row in enumerate(DROPOUT_SITES.read(directory))
    }


def plot_masks(family: Family) -> Figure:
    """Figure 6: the masks that a model was trained with; each row is an example."""
    split = load_split_at_hand(family.config)
    layers = remake_layers(family, split)
    rows = split.index[:EXAMPLES]
    colors = ListedColormap(["white", CLEAN, NOISY])
    figure, panels = plt.subplots(1, len(layers), figsize=(PAGE, 2.2), sharey=True, squeeze=False)
    for axes, (site, layer) in zip(panels[0], layers.items()):
        kept = np.ones((len(rows), layer.generalization), int)
        tied = 2 * layer.masks[rows].numpy().astype(int)
        gates = np.concatenate([kept, tied], axis=1)
        channels = gates.shape[1]
        shown = np.linspace(0, channels - 1, min(channels, NEURONS)).round().astype(int)
        axes.imshow(
            gates[:, shown], colors, vmin=0, vmax=2, aspect="auto", interpolation="nearest",
            extent=(0, channels, len(rows), 0),
        )  # fmt: skip
        axes.set(title=re.sub(r"^(transformer|layer_outputs)\.", "", site), xlabel="neuron")
        axes.spines[:].set_visible(True)
    panels[0, 0].set_ylabel("training example")
    words = f"{family.title}: on for everybody (blue), for this example (red), off (white)"
    figure.suptitle(wrapped(words, PAGE), fontsize=8)
    return figure


def plot_forgotten(family: Family) -> Figure:
    """Figure 7: clean examples that are no longer right without the memorization neurons."""
    split = load_split_at_hand(family.config)
    run = family.runs[0]
    rows = FORGOTTEN.read(run.directory)
    place = {int(index): row for row, index in enumerate(split.index.tolist())}
    names = split.class_names
    shown = rows[: ACROSS * DOWN]
    images = split.images[[place[int(row["index"])] for row in shown]]
    captions = [
        f"{names[int(row['label'])]}\n(now {names[int(row['prediction_after'])]})" for row in shown
    ]
    figure, axes = plt.subplots(figsize=(PAGE, 3.6))
    draw_sheet(axes, images, captions, ACROSS, size=6)
    words = f"{family.title}, {run.directory.name}: {len(rows)} clean examples forgotten"
    axes.set_title(f"{wrapped(words, PAGE)}\nlabel (prediction after dropping)")
    return figure


FIGURES = (
    FigureKind(
        ("6",), "masks", "dropout", FORGOTTEN.name, plot_masks,
        "The masks that this model was trained with: blue for everybody, red for one example.",
    ),
    FigureKind(
        ("7",), "forgotten", "dropout", FORGOTTEN.name, plot_forgotten,
        "Clean examples that only the memorization neurons held: mostly odd or ambiguous ones.",
    ),
)  # fmt: skip
