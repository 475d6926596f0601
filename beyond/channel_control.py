"""The control of planted memorization: do localizers find a channel that was made to hold labels?

Single channels are fine-tuned to hold new labels (beyond/channel_planting.py), one after the other,
and each localizer ranks the planted one among all units, example by example.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from beyond.agreement import compute_agreement, compute_cost, compute_interval, mean
from beyond.bench import Bench
from beyond.channel_planting import plant_channel
from beyond.localizers import LOCALIZERS, UnitGates, rank_units
from data import Examples, Split
from data.random_streams import random_stream
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import ResultTable

CHANNEL_RANKS = ResultTable(
    "planted_memorization_channel.csv",
    (
        "layer", "localizer", "state", "channels", "examples", "units",
        "found_at_1", "found_at_5", "median_rank", "auc", "low", "high", "acc_others", "acc_test",
    ),
    text=("layer", "localizer", "state"),
)  # fmt: skip


def relabel(split: Split, rows: Tensor, count: int, draw: int) -> Examples:
    """Return `count` of these examples, all under one new label that none of them has."""
    stream = random_stream("planted channel", draw)
    new = int(stream.integers(split.classes))
    allowed = rows[(split.label[rows] != new) & (split.true_label[rows] != new)]
    order = torch.from_numpy(stream.permutation(len(allowed))[:count]).to(rows.device)
    batch = Examples.of(split, allowed[order])
    return Examples(batch.images, torch.full_like(batch.label, new), batch.index)


def kept_batches(split: Split, without: Tensor, size: int, draw: int) -> Iterator[Examples]:
    """Yield random batches of the training set without the examples of these indices, for ever."""
    stream = random_stream("planted channel batches", draw)
    allowed = (~torch.isin(split.index, without)).nonzero().flatten()
    while True:
        rows = stream.choice(len(allowed), size=min(size, len(allowed)), replace=False)
        yield Examples.of(split, allowed[torch.from_numpy(rows).to(allowed.device)])


def without(batch: Examples, index: Tensor) -> Examples:
    return batch.take(~torch.isin(batch.index, index))


def plant_and_localize(bench: Bench, site: str, draw: int, size: int) -> dict[str, object]:
    """Plant one channel, and return its rank by every localizer, example by example.

    States: `planted`, the chosen examples after fine-tuning; `before`, the same in the network as
    trained; `others`, as many clean examples after fine-tuning, under their own labels, or as many
    as are left. Without an example that can have the new label nothing is learned.
    """
    clean = bench.rows["clean"]
    chosen = relabel(bench.split, clean, size, draw)
    if not len(chosen):
        return {"learned": False}
    place = next(s for s in bench.gates.sites if s.name == site)
    shared = place.dropout.generalization if place.dropout else place.count
    channel = int(random_stream("planted place", draw).integers(shared))
    keep = kept_batches(bench.split, chosen.index, len(bench.reference), draw)
    planting = plant_channel(bench.model, bench.channels[site], channel, chosen, keep)
    found = {"learned": planting.learned, "steps": planting.steps, "channel": channel}
    places = bench.gates.places
    with UnitGates(planting.model, places) as gates, torch.no_grad():
        found["acc_others"], found["acc_test"] = compute_cost(
            planting.model, gates, (), without(bench.others, chosen.index), bench.test
        )
    others = clean[~torch.isin(bench.split.index[clean], chosen.index)][: len(chosen)]
    asked = {
        "planted": (planting.model, chosen),
        "before": (bench.model, chosen),
        "others": (planting.model, Examples.of(bench.split, others)),
    }
    for state, (model, batch) in asked.items():
        inside = nullcontext(bench.gates) if model is bench.model else UnitGates(model, places)
        with inside as gates:
            on = gates.on(batch.index)
            truth = torch.zeros(gates.count, dtype=torch.bool, device=on.device)
            truth[place.first + channel] = True
            for name, localizer in LOCALIZERS.items():
                if not len(batch):
                    found[f"{name}-{state}"] = []
                    continue
                scores = localizer(model, gates, batch, bench.reference)
                found[f"{name}-{state}"] = [
                    (rank_of(score, units, place.first + channel),
                     int(units.sum()), compute_agreement(score, units, truth).auc)
                    for score, units in zip(scores, on)
                ]  # fmt: skip
    return found


def rank_of(score: Tensor, on: Tensor, unit: int) -> int:
    """Return a unit's place in an example's ranking, 1 for the highest score."""
    return rank_units(score, on).tolist().index(unit) + 1


def channel_rows(bench: Bench, table: Measurement, run: Run) -> Iterator[dict[str, object]]:
    """Yield the rows of planted_memorization_channel.csv, over channels that learned."""
    own = run.config.planted
    for site in bench.channels:
        found = [
            table.once(
                f"{site.replace('/', '.')}-{draw}",
                partial(plant_and_localize, bench, site, draw, own.chosen),
            )
            for draw in range(own.channels)
        ]
        learned = [part for part in found if part["learned"]]
        for name in LOCALIZERS:
            for state in ("planted", "before", "others"):
                each = [entry for part in learned for entry in part[f"{name}-{state}"]]
                row = channel_row(site, name, state, len(learned), each, run.config.seed)
                for accuracy in ("acc_others", "acc_test"):
                    row[accuracy] = mean(part[accuracy] for part in learned)
                yield row


def channel_row(
    site: str, name: str, state: str, channels: int, each: list, seed: int
) -> dict[str, object]:
    rank, units, auc = (np.array([entry[k] for entry in each], dtype=float) for k in range(3))
    row = {"layer": site, "localizer": name, "state": state, "channels": channels}
    row |= {"examples": len(each), "units": units.mean() if len(each) else np.nan}
    row["found_at_1"] = float((rank <= 1).mean()) if len(each) else np.nan
    row["found_at_5"] = float((rank <= 5).mean()) if len(each) else np.nan
    row["median_rank"] = float(np.median(rank)) if len(each) else np.nan
    return row | dict(zip(("auc", "low", "high"), compute_interval(auc, seed)))
