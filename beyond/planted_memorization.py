"""Planted memorization: does a localizer find an example's memory where it was put?

Example-tied dropout gives every example memorization neurons of its own. Where it trained a
network, the units that may hold an example's memory are therefore known. Each localizer
(beyond/localizers.py) ranks the units that are on for an example, and the ranking is compared with
that truth. Clean examples, whose labels need no memory, are the control for noisy ones.

    python -m beyond.planted_memorization configs/beyond/planted_glyphs.yaml

Reads finished runs with example-tied dropout, and writes three tables into each. The first,
planted_memorization.csv, has the share of own memorization neurons among the first units, recall,
AUC, and chance. planted_memorization_deletion.csv has the accuracy as the first ranked units are
closed, and its cost. planted_memorization_channel.csv is the control in which the answer is a
single place: a channel that was fine-tuned to hold new labels (beyond/channel_planting.py).
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from beyond.agreement import (
    CLOSED,
    SHARES_AT,
    compute_agreement,
    compute_cost,
    compute_deletion,
    compute_interval,
    make_rows,
    mean,
    order_planted,
    order_units,
    permute_planted,
)
from beyond.channel_planting import HELD, Channels, find_channels, plant_channel
from beyond.localizers import GREEDY_STEPS, LOCALIZERS, Examples, UnitGates, rank_units
from data import Split, normalize
from data.random_streams import random_stream
from engine.errors import RunFailed, UserError
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples
from engine.progress import with_progress
from engine.runs.experiment import Experiment
from engine.runs.identity import title, without_accounting
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import ResultTable
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import evaluate
from models.dropout_places import find_places
from models.layer_groups import StagedModel
from models.wiring import observe

SUBSETS = ("noisy", "clean")
TRUTH_KINDS = ("own", "permuted", "other_mask")  # the last is not measured for the slow search
COST_AT = (0, 1, 10)
PLANTED_SITES = 2  # single channels are planted behind the last ones that allow it

TRUTHS = ResultTable(
    "planted_memorization.csv",
    (
        "localizer", "truth", "layer", "subset", "examples",
        *(f"share_planted_at_{k}" for k in SHARES_AT), "expected_by_chance",
        "recall", "recall_low", "recall_high", "auc", "low", "high",
        *(f"flips_at_{k}" for k in SHARES_AT),
    ),
    text=("localizer", "truth", "layer", "subset"),
)  # fmt: skip
DELETIONS = ResultTable(
    "planted_memorization_deletion.csv",
    (
        "localizer", "subset", "examples", "closed",
        "acc_trained", "low", "high", "acc_true", "acc_others", "acc_test",
    ),
    text=("localizer", "subset"),
)  # fmt: skip
CHANNEL_RANKS = ResultTable(
    "planted_memorization_channel.csv",
    (
        "layer", "localizer", "state", "channels", "examples", "units",
        "found_at_1", "found_at_5", "median_rank", "auc", "low", "high", "acc_others", "acc_test",
    ),
    text=("layer", "localizer", "state"),
)  # fmt: skip

# ---------------------------------------------------------------- examples


@dataclass(frozen=True)
class Bench:
    """A trained network with gates, and the examples that localizers are asked about."""

    model: StagedModel
    gates: UnitGates
    channels: dict[str, Channels]  # of the sites where single channels are planted
    split: Split
    rows: dict[str, Tensor]  # of each subset
    reference: Examples
    others: Examples  # a sample of the training set, for the cost of deletion
    test: Examples

    def batch(self, subset: str, truth: str = "own") -> Examples:
        """Return a subset's examples; for `other_mask`, each under the next one's mask."""
        batch = Examples.of(self.split, self.rows[subset])
        if truth == "other_mask":
            return Examples(batch.images, batch.label, torch.roll(batch.index, 1))
        return batch


def choose_rows(split: Split, correct: Tensor, count: int) -> dict[str, Tensor]:
    """Return rows of `count` noisy and of as many clean examples that are predicted as trained."""
    found = {}
    for subset, memorized in (("noisy", True), ("clean", False)):
        rows = ((split.memorized == memorized) & correct).nonzero().flatten()
        order = random_stream("planted examples", int(memorized)).permutation(len(rows))
        found[subset] = rows[torch.from_numpy(order[:count]).to(rows.device)]
    return found


def draw_rows(purpose: str, n: int, count: int) -> Tensor:
    order = random_stream(purpose).permutation(n)
    return torch.from_numpy(order[:count]).sort().values


def make_bench(run: Run, split: Split, model: StagedModel) -> Bench:
    own = run.config.planted
    correct = evaluate(model, split.images, split.label, index=split.index).correct
    tested = draw_rows("planted test", len(split.test_label), own.others).to(split.label.device)
    test = Examples(normalize(split.test_images[tested]), split.test_label[tested], tested)
    wiring = model.wiring or observe(model, test.images[:2])
    gates = UnitGates(model, find_places(model, run.config.dropout.sites, test.images[:2]))
    known = {site.name: find_channels(model, wiring, site.name) for site in gates.sites}
    planted = [name for name, channels in known.items() if channels][-PLANTED_SITES:]
    return Bench(
        model=model,
        gates=gates,
        channels={name: known[name] for name in planted},
        split=split,
        rows=choose_rows(split, correct, own.examples),
        reference=Examples.of(split, draw_rows("planted reference", split.n, own.reference)),
        others=Examples.of(split, draw_rows("planted others", split.n, own.others)),
        test=test,
    )


# ---------------------------------------------------------------- rankings against the truth


def localize(bench: Bench, table: Measurement, name: str, subset: str, truth: str) -> Tensor:
    """Return scores [examples, units] of one localizer, measured once and kept as a part."""
    key = f"{name}-{subset}-{truth}"
    if (scores := table.part(key)) is None:
        batch = bench.batch(subset, truth)
        scores = LOCALIZERS[name](bench.model, bench.gates, batch, bench.reference).cpu()
        table.save(key, scores)
    return scores


def truth_rows(bench: Bench, table: Measurement, seed: int) -> Iterator[dict[str, object]]:
    """Yield the rows of planted_memorization.csv.

    Truths: `own`, the example's memorization neurons; `permuted`, as many units drawn at random,
    which must give chance; `other_mask`, the neurons of another example, under whose mask this one
    passes: its own memory is off there.
    """
    layer_of, sites = bench.gates.layer_of_units(), bench.gates.sites
    layers = {site.name: layer_of == number for number, site in enumerate(sites)}
    pairs = [(name, subset) for name in LOCALIZERS for subset in SUBSETS]
    for name, subset in with_progress(pairs, "localizers", len(pairs), "localizer"):
        for truth in TRUTH_KINDS[:2] if name == "flipping" else TRUTH_KINDS:
            batch = bench.batch(subset, truth)
            drawn = "own" if truth == "permuted" else truth
            scores = localize(bench, table, name, subset, drawn)
            on, planted = (f(batch.index).cpu() for f in (bench.gates.on, bench.gates.planted))
            if truth == "permuted":
                rows = zip(on, planted, batch.index.tolist())
                planted = torch.stack([permute_planted(*row) for row in rows])
            names = {"localizer": name, "truth": truth, "subset": subset}
            for row in make_rows(names, scores, on, planted, layers, seed):
                if truth == "own" and row["layer"] == "all":
                    row |= flips(bench, batch, scores, on)
                yield row


def flips(bench: Bench, batch: Examples, scores: Tensor, on: Tensor) -> dict[str, float]:
    """Return how many examples are predicted otherwise once their first k units are closed."""
    orders = order_units(scores, on)
    predicted = compute_deletion(bench.model, bench.gates, batch, orders, SHARES_AT)
    shares = (predicted != batch.label).double().mean(1).tolist()
    return {f"flips_at_{k}": share for k, share in zip(SHARES_AT, shares)}


# ---------------------------------------------------------------- deletion curves


def deletion_rows(
    bench: Bench, table: Measurement, truths: Measurement, seed: int
) -> Iterator[dict[str, object]]:
    """Yield the rows of planted_memorization_deletion.csv; `planted` closes own neurons only."""
    for name in ("planted", *LOCALIZERS):
        for subset in SUBSETS:
            key = f"{name}-{subset}"
            if (part := table.part(key)) is None:
                part = delete(bench, truths, name, subset, seed)
                table.save(key, part)
            yield from part


def delete(
    bench: Bench, truths: Measurement, name: str, subset: str, seed: int
) -> list[dict[str, object]]:
    batch = bench.batch(subset)
    if name == "planted":
        orders = order_planted(bench.gates.planted(batch.index), batch.index)
    else:
        scores = localize(bench, truths, name, subset, "own")
        orders = order_units(scores, bench.gates.on(batch.index).cpu())
    predicted = compute_deletion(bench.model, bench.gates, batch, orders)
    true_label, rows = bench.split.true_label[bench.rows[subset]], []
    for count, prediction in zip(CLOSED, predicted):
        held = compute_interval((prediction == batch.label).double().tolist(), seed)
        row = {"localizer": name, "subset": subset, "examples": len(batch), "closed": count}
        row |= dict(zip(("acc_trained", "low", "high"), held))
        row["acc_true"] = (prediction == true_label).double().mean().item()
        cost = (np.nan, np.nan)
        if count in COST_AT:
            closed = [tuple(order[:count]) for order in orders]
            known = {
                numbers: compute_cost(bench.model, bench.gates, numbers, bench.others, bench.test)
                for numbers in set(closed)
            }
            cost = np.mean([known[numbers] for numbers in closed], axis=0).tolist()
        rows.append(row | dict(zip(("acc_others", "acc_test"), cost)))
    return rows


# ---------------------------------------------------------------- a channel that holds new labels


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
    trained; `others`, as many clean examples after fine-tuning, under their own labels.
    """
    clean = bench.rows["clean"]
    chosen = relabel(bench.split, clean, size, draw)
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
            truth = torch.zeros_like(on[0])
            truth[place.first + channel] = True
            for name, localizer in LOCALIZERS.items():
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
        found = []
        for draw in range(own.channels):
            key = f"{site}-{draw}"
            if (part := table.part(key)) is None:
                part = plant_and_localize(bench, site, draw, own.chosen)
                table.save(key, part)
            found.append(part)
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


# ---------------------------------------------------------------- a run


def measurements(run: Run) -> tuple[Measurement, Measurement, Measurement]:
    """Return the tables of a run: rankings against the truth, deletion, and single channels."""
    own = run.config.planted
    of_examples = {"examples": own.examples, "reference": own.reference}
    of_channels = {**of_examples, "others": own.others, "chosen": own.chosen, "held": HELD}
    return (
        Measurement(run, TRUTHS, of_examples),
        Measurement(run, DELETIONS, {**of_examples, "others": own.others}),
        Measurement(run, CHANNEL_RANKS, of_channels, {"channels": own.channels}),
    )


def require_tied(run: Run) -> None:
    if run.config.dropout.kind != "example_tied":
        raise UserError(
            f"dropout.kind: {run.config.dropout.kind!r} is not allowed: planted memorization needs "
            "example_tied"
        )


def measure(run: Run) -> None:
    """Write every table that is missing."""
    require_tied(run)
    device = resolve_device(run.config)
    split = load_split(run.config).to(device)
    model = load_final_model(run, split, device).eval().requires_grad_(False)
    truths, deletions, channels = measurements(run)
    seed = run.config.seed
    with compute_precision("fp32", device):  # less holds no gradient of a fitted example
        bench = make_bench(run, split, model)
        for subset, rows in bench.rows.items():
            if len(rows) == 0:
                raise RunFailed(f"no {subset} example is predicted as trained")
        rows_of = {
            truths: partial(truth_rows, bench, truths, seed),
            deletions: partial(deletion_rows, bench, deletions, truths, seed),
            channels: partial(channel_rows, bench, channels, run),
        }
        with bench.gates:
            for table, make in rows_of.items():
                if not table.finished:
                    table.finish(list(make()), device, "fp32")


def summarize(run: Run) -> str:
    """Return recall and AUC of flipping in one line, beside chance."""
    parts = []
    for row in TRUTHS.read(run.directory):
        if (row["truth"], row["layer"], row["localizer"]) == ("own", "all", "flipping"):
            parts.append(
                f"{row['subset']}: recall {row['recall']:.2f} (chance "
                f"{row['expected_by_chance']:.2f}), AUC {row['auc']:.2f} "
                f"[{row['low']:.2f}, {row['high']:.2f}]"
            )
    about = f"{title(run.config)}: flipping finds own memorization neurons"
    return f"{about}: {'; '.join(parts)}"


def estimate_passes(run: Run) -> float:
    """Count forward and backward passes, most of them of the greedy search's reference batch."""
    own = run.config.planted
    train, _ = count_examples(run.config)
    search = 3 * GREEDY_STEPS * own.reference
    deletion = len(LOCALIZERS) * len(COST_AT) * 2 * own.others
    planting = own.channels * PLANTED_SITES * (300 * own.reference + 3 * own.chosen * search)
    return train + 2 * own.examples * (search + deletion) + planting


EXPERIMENT = Experiment(
    key="planted",
    command="python -m beyond.planted_memorization",
    section="",
    question="Does a localizer find an example's memory where example-tied dropout put it?",
    tables=(TRUTHS, DELETIONS, CHANNEL_RANKS),
    figures=("plotting.beyond.planted_memorization",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    disk=lambda run: 2e6,
    measurements=measurements,
    training=without_accounting,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
