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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

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
from beyond.channel_planting import HELD, plant_channel
from beyond.erasure import without_accounting
from beyond.localizers import LOCALIZERS, Examples, UnitGates, rank_units
from data import Split, normalize
from data.random_streams import random_stream
from engine.errors import UserError
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.identity import title
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import evaluate
from models.layer_groups import StagedModel
from plotting.families import Family
from plotting.figures import draw_figure
from plotting.planted import (
    CHANNEL_COLUMNS,
    CHANNEL_FILE_NAME,
    DELETION_COLUMNS,
    DELETION_FILE_NAME,
    TRUTH_COLUMNS,
    TRUTH_FILE_NAME,
    TRUTH_TEXT,
    plot_deletion,
    plot_localizers,
)

SUBSETS = ("noisy", "clean")
TRUTHS = ("own", "permuted", "other_mask")  # the last is not measured for the slow search
COST_AT = (0, 1, 10)
SITES = ("residual2", "conv8")  # where single channels are planted

# ---------------------------------------------------------------- examples


@dataclass(frozen=True)
class Bench:
    """A trained network with gates, and the examples that localizers are asked about."""

    model: StagedModel
    gates: UnitGates
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
    return Bench(
        model=model,
        gates=UnitGates(model, run.config.dropout.sites),
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
    for name, subset in tqdm(pairs, "localizers", None, unit="localizer"):
        for truth in TRUTHS[:2] if name == "flipping" else TRUTHS:
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
    planting = plant_channel(bench.model, site, channel, chosen, keep)
    found = {"learned": planting.learned, "steps": planting.steps, "channel": channel}
    with UnitGates(planting.model) as gates, torch.no_grad():
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
        inside = nullcontext(bench.gates) if model is bench.model else UnitGates(model)
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
    for site in SITES:
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


def tables(run: Run) -> dict[str, Measurement]:
    """Return the measurements of a run; the settings of one decide nothing in another."""
    own = run.config.planted
    of_examples = {"examples": own.examples, "reference": own.reference}
    of_channels = {**of_examples, "others": own.others, "chosen": own.chosen, "held": HELD}
    return {
        "truth": Measurement(run, TRUTH_FILE_NAME, TRUTH_COLUMNS, of_examples),
        "deletion": Measurement(
            run, DELETION_FILE_NAME, DELETION_COLUMNS, {**of_examples, "others": own.others}
        ),
        "channel": Measurement(
            run, CHANNEL_FILE_NAME, CHANNEL_COLUMNS, of_channels, {"channels": own.channels}
        ),
    }


def measure(run: Run, device: torch.device) -> None:
    """Write every table that is missing."""
    split = load_split(run.config).to(device)
    model = load_final_model(run, split, device).eval().requires_grad_(False)
    found, seed = tables(run), run.config.seed
    with compute_precision(run.config.precision, device):
        bench = make_bench(run, split, model)
        rows_of = {
            "truth": partial(truth_rows, bench, found["truth"], seed),
            "deletion": partial(deletion_rows, bench, found["deletion"], found["truth"], seed),
            "channel": partial(channel_rows, bench, found["channel"], run),
        }
        if any(len(rows) == 0 for rows in bench.rows.values()):
            raise UserError(
                f"{run.directory}: no noisy or no clean example is predicted as trained"
            )
        with bench.gates:
            for name, table in found.items():
                if not table.finished:
                    table.finish(list(rows_of[name]()), device)


def describe(run: Run) -> str:
    """Return recall and AUC of flipping in one line, beside chance."""
    rows = files.read_csv(run.directory / TRUTH_FILE_NAME, TRUTH_COLUMNS, TRUTH_TEXT)
    parts = []
    for row in rows:
        if (row["truth"], row["layer"], row["localizer"]) == ("own", "all", "flipping"):
            parts.append(
                f"{row['subset']}: recall {row['recall']:.2f} (chance "
                f"{row['expected_by_chance']:.2f}), AUC {row['auc']:.2f} "
                f"[{row['low']:.2f}, {row['high']:.2f}]"
            )
    return f"flipping finds own memorization neurons: {'; '.join(parts)}"


def main(run: Run) -> str:
    """Measure one run, unless that is done; its results in one line."""
    run.require_finished()
    if run.config.dropout.kind != "example_tied":
        raise UserError(
            f"dropout.kind: {run.config.dropout.kind!r} is not allowed: planted memorization needs "
            "example_tied"
        )
    if not is_done(run):
        measure(run, resolve_device(run.config))
    return f"{title(run.config)}: {describe(run)}"


def is_done(run: Run) -> bool:
    return run.finished and all(table.finished for table in tables(run).values())


def plan(run: Run) -> str:
    """Return the state of the measurement, and the disk that it takes."""
    state = "done" if is_done(run) else f"{2 * run.config.planted.examples} examples to rank"
    if not run.finished:
        state += f" once trained ({run.state})"
    return f"{title(run.config)}: {state}, 2 MB"


def conclude(runs: Sequence[Run]) -> Iterator[tuple[str, Path]]:
    """Draw each setting's deletion curves, and recall over all settings."""
    families = []
    for folder in dict.fromkeys(run.directory.parent for run in runs):
        family = Family(folder, tuple(run for run in runs if run.directory.parent == folder))
        families.append(family)
        place = folder / "figures" / "planted_memorization_deletion"
        paths = draw_figure(plot_deletion, family, place)
        yield f"{family.seeds}: {' '.join(path.name for path in paths)}", folder / "figures"
    if families:
        folder = families[0].folder if len(families) == 1 else families[0].folder.parent
        paths = draw_figure(plot_localizers, families, folder / "figures" / "planted_memorization")
        yield f"{len(families)} settings: {' '.join(p.name for p in paths)}", folder / "figures"


if __name__ == "__main__":
    sys.exit(run_script(__doc__, main, plan, training=without_accounting, conclude=conclude))
