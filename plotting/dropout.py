"""Masks of a trained model (Figure 6), and the examples that dropping forgets (7)."""

import re

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from data import DataError, Split
from engine.runs.tables import DROPOUT_SITES
from engine.training.build import load_split_at_hand, make_model
from example_tied_dropout import FORGOTTEN
from models import network_file
from models.any_network import example_images
from models.dropout import ExampleTiedDropout, tied_layers
from models.dropout_places import find_places
from plotting.examples import draw_sheets
from plotting.families import Family
from plotting.figure_kind import FigureKind
from plotting.style import CLEAN, NOISY, PAGE, entitle

EXAMPLES, NEURONS = 24, 64  # of each layer, at the most, evenly spread: more cannot be seen
ACROSS, DOWN = 6, 4


def remake_layers(family: Family, split: Split) -> dict[str, ExampleTiedDropout]:
    """Return the dropout layers of the first run by site, made without the network's code.

    A run of an earlier version has no table of sites: its network is built, unless it is a file.
    """
    directory, own = family.runs[0].directory, family.config.dropout
    if not DROPOUT_SITES.path(directory).exists():
        if network_file(family.config.model.name) is not None:
            raise DataError(f"{directory}: has no {DROPOUT_SITES.name}, as of an earlier version")
        model = make_model(family.config, split, proof=False)
        places = find_places(model, own.sites, example_images(split.shape[0], split.shape[1:], 2))
        return dict(zip(places, tied_layers(model)))
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
    numbers = {name: f"layer {number}\n" for number, name in family.layers}
    figure, panels = plt.subplots(1, len(layers), figsize=(PAGE, 2.1), sharey=True, squeeze=False)
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
        place = re.sub(r"^(transformer|layer_outputs)\.", "", site)
        axes.set_title(numbers.get(site, "behind\n") + place)
        axes.set_xlabel("neuron")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.spines[:].set_visible(True)
    panels[0, 0].set_ylabel("training example")
    words = ("off", "on for all examples", "on for this example")
    patches = [Patch(fc=c, ec="0.5", lw=0.5, label=w) for c, w in zip(colors.colors, words)]
    figure.legend(handles=patches[1:] + patches[:1], loc="outside lower center", ncols=3)
    about = f"{family.title}; the first {len(rows)} examples, {NEURONS} neurons a layer at most"
    entitle(figure, "Masks of example-tied dropout", about)
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
        f"{names[int(row['label'])]}\n({names[int(row['prediction_after'])]})" for row in shown
    ]
    figure = draw_sheets([("label (prediction after dropping)", images, captions)], ACROSS)
    about = f"{family.title}, {run.directory.name}; {len(shown)} of {len(rows)} examples"
    entitle(figure, "Clean examples forgotten without the memorization neurons", about)
    return figure


FIGURES = (
    FigureKind(
        ("6",), "masks", "dropout", FORGOTTEN.name, plot_masks,
        "Masks of example-tied dropout.",
        "Each row is a training example, each column a neuron; red ones differ between examples.",
    ),
    FigureKind(
        ("7",), "forgotten", "dropout", FORGOTTEN.name, plot_forgotten,
        "Clean examples forgotten without the memorization neurons.",
        "Clean examples that only the memorization neurons held; in the paper mostly odd or "
        "ambiguous ones.",
    ),
)  # fmt: skip
