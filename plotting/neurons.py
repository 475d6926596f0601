"""Number of neurons that hold an example, and their layers (Figure 5)."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data import DataError
from engine.config.schema import ModelConfig
from engine.runs import files
from engine.runs.identity import short_name
from engine.runs.run import Run
from engine.stats import count_neurons
from models import MODELS, model_options
from neuron_flipping import FLIPPING
from plotting.families import Family
from plotting.figure_kind import FigureKind
from plotting.style import COLORS, DASHES, PAGE, names_of, wrapped


def read_searched(run: Run) -> list[dict]:
    """The searched examples, each with the number of neurons that it counts for.

    How many a search was allowed stands beside the table: it may be measured with other settings
    than those that the run was begun with.
    """
    path = FLIPPING.path(run.directory)
    most = files.read_json(path.with_suffix(".json"))["settings"]["max_neurons"]
    rows = FLIPPING.read(run.directory)
    return [row | {"neurons": count_neurons(row, most)} for row in rows]


def _of_both_kinds(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    for kind, memorized in (("clean", 0), ("noisy", 1)):
        yield kind, [row for row in rows if row["memorized"] == memorized]


def _histogram(axes: Axes, values: list[float], bins: np.ndarray, kind: str, name: str) -> None:
    weights = np.full(len(values), 1 / max(1, len(values)))
    axes.hist(values, bins, weights=weights, alpha=0.55, color=COLORS[kind], label=name)


def plot_flipping(family: Family) -> Figure:
    """Neurons to flip, accuracy on the rest afterwards, and the layers that the neurons are in."""
    rows = [row for run in family.runs for row in read_searched(run)]
    if not rows:
        raise DataError("no example was searched")
    names = names_of(family.config.data.split)
    figure, (counts, after, layers) = plt.subplots(1, 3, figsize=(PAGE, 2.3))
    most = int(max(row["neurons"] for row in rows))
    steps = np.arange(-0.5, most + 1.5, max(1, most // 30))
    lowest = min(row["acc_remaining_after"] for row in rows)
    groups = [int(g) for row in rows for g in row["groups"].split()]
    for kind, chosen in _of_both_kinds(rows):
        neurons = [row["neurons"] for row in chosen]
        _histogram(counts, neurons, np.append(steps, most + 1.5), kind, names[kind])
        if chosen:
            counts.axvline(np.mean(neurons), color=COLORS[kind], ls="--", lw=0.8)
        remaining = [row["acc_remaining_after"] for row in chosen]
        _histogram(after, remaining, np.linspace(lowest, 1, 21), kind, names[kind])
        own = [int(g) for row in chosen for g in row["groups"].split()]
        share = np.bincount(own, minlength=max(groups, default=0) + 1) / max(1, len(own))
        place = np.arange(len(share)) + (0.2 if kind == "noisy" else -0.2)
        layers.bar(place, share, 0.4, color=COLORS[kind], label=names[kind])
    counts.set(xlabel="neurons zeroed to flip it", ylabel="share of examples")
    after.set(xlabel="accuracy on the remaining set")
    layers.set(xlabel="layer", ylabel="share of neurons")
    after.xaxis.set_major_formatter(PercentFormatter(1))
    for axes in (counts, after, layers):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend()
    layers.xaxis.set_major_locator(MaxNLocator(integer=True))
    unflipped = sum(row["flipped"] == 0 for row in rows)
    more = f", {unflipped} of {len(rows)} never flipped" if unflipped else ""
    words = f"{family.title} ({family.seeds}{more}; dashed: means)"
    figure.suptitle(wrapped(words, PAGE), fontsize=8)
    return figure


def plot_flipping_compared(families: Sequence[Family]) -> Figure:
    """Neurons to flip, and accuracy on the rest afterwards, for models of several sizes."""
    families = sorted(families, key=lambda family: _size(family.config.model))
    models = [family.config.model for family in families]
    seeds = [len(family.runs) for family in families]
    figure, (counts, after) = plt.subplots(1, 2, figsize=(PAGE, 2.3))
    names = names_of(families[0].config.data.split)
    for axes, column in ((counts, "neurons"), (after, "acc_remaining_after")):
        for kind, place in (("clean", -0.05), ("noisy", 0.05)):
            of_seeds = [
                [np.mean([r[column] for r in rows]) for rows in _each_seed(family, kind)]
                for family in families
            ]
            axes.errorbar(
                np.arange(len(families)) + place,
                [np.mean(values) for values in of_seeds],
                [np.std(values, ddof=1) if len(values) > 1 else 0 for values in of_seeds],
                fmt="o" if kind == "clean" else "s", color=COLORS[kind],
                ls=DASHES[kind] if len({model.name for model in models}) == 1 else "none",
                capsize=2, label=names[kind],
            )  # fmt: skip
        axes.set_xticks(range(len(models)), [_model_label(model) for model in models])
        axes.margins(x=0.25)
        axes.legend()
    counts.set(ylabel="neurons zeroed to flip it, mean", ylim=(0, None))
    after.set(ylabel="accuracy on the remaining set")
    after.yaxis.set_major_formatter(PercentFormatter(1))
    data = families[0].title.partition(f" {models[0].name}")[0]
    n = families[0].seeds if len(set(seeds)) == 1 else f"n = {', '.join(map(str, seeds))} seeds"
    bars = "; bars: a standard deviation" if max(seeds) > 1 else ""
    figure.suptitle(f"{data} ({n}{bars})", fontsize=8)
    return figure


def _size(model: ModelConfig) -> tuple[float, int]:
    return model.width, [*MODELS, model.name].index(model.name)


def _model_label(model: ModelConfig) -> str:
    return short_name(model.name) + (
        f"\nwidth {model.width:g}" if "width" in model_options(model.name) else ""
    )


def _each_seed(family: Family, kind: str) -> list[list[dict]]:
    return [dict(_of_both_kinds(read_searched(run)))[kind] for run in family.runs]


FIGURES = (
    FigureKind(
        ("5",), "neurons", "flipping", FLIPPING.name, plot_flipping,
        "Memorized examples flip with fewer neurons, their removal costs the others less, and the "
        "neurons lie in several layers.",
    ),
    FigureKind(
        ("5",), "neurons_compared", "flipping", FLIPPING.name, plot_flipping_compared,
        "How the number of neurons that hold an example grows with the network.",
        compares=r"model\..+",
    ),
)  # fmt: skip
