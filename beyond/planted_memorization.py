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
single place: a channel that was fine-tuned to hold new labels (beyond/channel_planting.py); it is
left out if `planted.channels` is 0.
"""

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from beyond.agreement import (
    CLOSED,
    SHARES_AT,
    compute_cost,
    compute_deletion,
    compute_interval,
    make_rows,
    order_planted,
    order_units,
    permute_planted,
)
from beyond.bench import PLANTED_SITES, SUBSETS, Bench, make_bench
from beyond.channel_control import CHANNEL_RANKS, channel_rows
from beyond.channel_planting import HELD
from beyond.localizers import GREEDY_STEPS, LOCALIZERS
from data import Examples
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

TRUTH_KINDS = ("own", "permuted", "other_mask")  # the last is not measured for the slow search
COST_AT = (0, 1, 10)

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
# ---------------------------------------------------------------- rankings against the truth


def localize(bench: Bench, table: Measurement, name: str, subset: str, truth: str) -> Tensor:
    """Return scores [examples, units] of one localizer, measured once and kept as a part."""

    def score() -> Tensor:
        batch = bench.batch(subset, truth)
        return LOCALIZERS[name](bench.model, bench.gates, batch, bench.reference).cpu()

    return table.once(f"{name}-{subset}-{truth}", score)


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
            make = partial(delete, bench, truths, name, subset, seed)
            yield from table.once(f"{name}-{subset}", make)


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


# ---------------------------------------------------------------- a run


def measurements(run: Run) -> tuple[Measurement, ...]:
    """Return the tables of a run: rankings against the truth, deletion, and single channels."""
    own = run.config.planted
    of_examples = {"examples": own.examples, "reference": own.reference}
    of_channels = {**of_examples, "others": own.others, "chosen": own.chosen, "held": HELD}
    tables = (
        Measurement(run, TRUTHS, of_examples),
        Measurement(run, DELETIONS, {**of_examples, "others": own.others}),
        Measurement(run, CHANNEL_RANKS, of_channels, {"channels": own.channels}),
    )
    return tables if own.channels else tables[:2]


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
    truths, deletions, *channels = measurements(run)
    seed = run.config.seed
    with compute_precision("fp32", device):  # less holds no gradient of a fitted example
        bench = make_bench(run, split, model)
        for subset, rows in bench.rows.items():
            if len(rows) == 0:
                raise RunFailed(f"no {subset} example is predicted as trained")
        rows_of = {
            truths: partial(truth_rows, bench, truths, seed),
            deletions: partial(deletion_rows, bench, deletions, truths, seed),
            **{table: partial(channel_rows, bench, table, run) for table in channels},
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
