"""Number of neurons that hold an example, and their layers (Figure 5)."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data import DataError
from engine.config.schema import ModelConfig
from engine.runs import files
from engine.runs.run import Run
from engine.stats import count_neurons
from models import MODELS
from neuron_flipping import FLIPPING
from plotting.families import Family, describe, name_models
from plotting.figure_kind import FigureKind
from plotting.style import COLORS, DASHES, PAGE, SMALL, entitle, in_percent, names_of, wrapped


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


def _draw_shares(
    axes: Axes, values: dict[str, list[float]], bins: np.ndarray, names: dict[str, str]
) -> None:
    """Histograms of both kinds, each adding up to 1, with dashed lines at their means.

    The outermost bars count what lies beyond them.
    """
    for kind, own in values.items():
        weights = np.full(len(own), 1 / max(1, len(own)))
        inside = np.clip(own, (bins[0] + bins[1]) / 2, (bins[-2] + bins[-1]) / 2)
        axes.hist(inside, bins, weights=weights, alpha=0.55, color=COLORS[kind], label=names[kind])
        _draw_average(axes, own, kind)
    beyond = sum(not bins[0] <= value <= bins[-1] for own in values.values() for value in own)
    if beyond:
        axes.text(0.5, 1, f"{beyond} beyond the axis", transform=axes.transAxes, size=SMALL,
                  ha="center", va="bottom")  # fmt: skip


def _draw_average(axes: Axes, values: Sequence[float], kind: str) -> None:
    if len(values):
        axes.axvline(np.mean(values), color=COLORS[kind], ls="--", lw=0.8)


def plot_flipping(family: Family) -> Figure:
    """Neurons to flip, accuracy on the rest afterwards, and the layers that the neurons are in."""
    rows = [row for run in family.runs for row in read_searched(run)]
    if not rows:
        raise DataError("no example was searched")
    names = names_of(family.config.data.split)
    figure, (counts, after, layers) = plt.subplots(1, 3, figsize=(PAGE, 2))
    by_kind = dict(_of_both_kinds(rows))

    def of_kind(column: str) -> dict[str, list[float]]:
        return {kind: [row[column] for row in own] for kind, own in by_kind.items()}

    most = np.ceil(np.quantile([row["neurons"] for row in rows], 0.99))
    step = max(1, -(-most // 30))
    _draw_shares(counts, of_kind("neurons"), np.arange(-0.5, most + step, step), names)
    lowest = min(np.quantile([row["acc_remaining_after"] for row in rows], 0.01), 0.95)
    _draw_shares(after, of_kind("acc_remaining_after"), np.linspace(lowest, 1, 21), names)
    for kind, own in of_kind("groups").items():
        chosen = [int(group) for groups in own for group in groups.split()]
        share = np.bincount(chosen, minlength=1) / max(1, len(chosen))
        place = np.arange(len(share)) + (0.2 if kind == "noisy" else -0.2)
        layers.bar(place, share, 0.4, color=COLORS[kind], label=names[kind])
        _draw_average(layers, chosen, kind)
    counts.set(xlabel="neurons zeroed to flip it", ylabel="share of examples")
    after.set(xlabel="accuracy on the\nremaining set")
    layers.set(xlabel="layer", ylabel="share of neurons")
    after.xaxis.set_major_locator(MaxNLocator(4))
    after.xaxis.set_major_formatter(in_percent)
    for axes in (counts, after, layers):
        axes.yaxis.set_major_formatter(in_percent)
    counts.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    layers.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    unflipped = sum(row["flipped"] == 0 for row in rows)
    more = f", {unflipped} of {len(rows)} never flipped" if unflipped else ""
    about = f"{family.about}{more}; dashed: means"
    entitle(figure, "Neurons that hold an example, and their layers", about, key=layers)
    return figure


def plot_flipping_compared(families: Sequence[Family]) -> Figure:
    """Neurons to flip, and accuracy on the rest afterwards, for models of several sizes."""
    families = sorted(families, key=lambda family: _size(family.config.model))
    figure, (counts, after) = plt.subplots(1, 2, figsize=(PAGE, 2.2))
    names = names_of(families[0].config.data.split)
    joined = len({family.config.model.name for family in families}) == 1
    for axes, column in ((counts, "neurons"), (after, "acc_remaining_after")):
        for kind, place in (("clean", -0.05), ("noisy", 0.05)):
            of_seeds = [
                [np.mean([r[column] for r in rows]) for rows in _each_seed(family, kind)]
                for family in families
            ]
            axes.errorbar(
                np.arange(len(families)) + place,
                [np.mean(values) for values in of_seeds],
                [np.std(values, ddof=1) if len(values) > 1 else np.nan for values in of_seeds],
                fmt="o" if kind == "clean" else "s", color=COLORS[kind],
                ls=DASHES[kind] if joined else "none", capsize=2, label=names[kind],
            )  # fmt: skip
        models, room = name_models(families), PAGE / 2.8 / len(families)
        if any("\n" in wrapped(word, room, 7) for name in models for word in name.split()):
            axes.set_xticks(range(len(models)), models, rotation=20, ha="right")
        else:
            axes.set_xticks(range(len(models)), [wrapped(name, room, 7) for name in models])
        axes.margins(x=0.25)
    counts.legend()
    counts.set(ylabel="neurons zeroed to flip it, mean", ylim=(0, None))
    after.set(ylabel="accuracy on the remaining set")
    after.yaxis.set_major_formatter(in_percent)
    bars = (
        "; bars: a standard deviation over seeds" if max(len(f.runs) for f in families) > 1 else ""
    )
    entitle(figure, "Neurons that hold an example, by network", describe(families) + bars)
    return figure


def _size(model: ModelConfig) -> tuple[float, int]:
    return model.width, [*MODELS, model.name].index(model.name)


def _each_seed(family: Family, kind: str) -> list[list[dict]]:
    return [dict(_of_both_kinds(read_searched(run)))[kind] for run in family.runs]


FIGURES = (
    FigureKind(
        ("5",), "neurons", "flipping", FLIPPING.name, plot_flipping,
        "Neurons that hold an example, and their layers.",
        "In the paper memorized examples flip with fewer neurons, their removal costs the others "
        "less, and the neurons lie in several layers.",
    ),
    FigureKind(
        ("5",), "neurons_compared", "flipping", FLIPPING.name, plot_flipping_compared,
        "Neurons that hold an example, by network.",
        "How the number of neurons that hold an example grows with the network.",
        compares=r"model\..+",
    ),
)  # fmt: skip
