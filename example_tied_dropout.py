"""Example-tied dropout (Section 6.2): confine memorization to chosen neurons, then drop them.

Claims: (i) when every example has a few neurons of its own beside those that all examples share,
memorization is confined to them: dropping them lowers the noisy accuracy from near 100% to a few
percent, at little cost to clean accuracy (Table 1; over p_gen and p_mem, Table 2); (ii) equally
sparse networks without such ties fit the wrong labels (Table 3); (iii) the clean examples that are
forgotten on dropping are atypical (Figure 7).

    python example_tied_dropout.py configs/quickstart.yaml      # minutes on two CPU cores
    python example_tied_dropout.py configs/paper/table_2.yaml   # the paper's size: a GPU

Trains a run with the configured dropout for every combination of the sweep, and measures it before
and after dropping. Beyond the paper: the effect of rescaling and of new batch-norm statistics after
dropping, and of dropping only the neurons of a few chosen examples. These measurements are cheap
compared with training.
"""

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from data import Split, normalize
from data.random_streams import random_stream
from engine.config.schema import Config
from engine.errors import UserError
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples, training_passes
from engine.progress import with_progress
from engine.runs.experiment import Experiment
from engine.runs.identity import (
    measuring_precision,
    measuring_settings,
    scores_given,
    title,
    without_accounting,
)
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import DROPOUT_SITES, ResultTable
from engine.training.build import (
    estimate_disk,
    load_evaluated_model,
    load_split,
    load_typicality,
    make_model,
)
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import Outcome, eval_mode, evaluate, evaluate_split, mean_by_subset
from engine.training.loop import restore_results, train_run
from models.dropout import StandardDropout, dropout_mode, forget, tied_layers
from models.dropout_places import find_places

ACCURACIES = ("acc_clean", "acc_noisy", "acc_test")
DROPOUT = ResultTable(
    "example_tied_dropout.csv",
    ("dropout", "p_gen", "p_mem", "state", *ACCURACIES),
    text=("dropout", "state"),
)
FORGOTTEN = ResultTable("forgotten.csv", ("index", "label", "prediction_after", "typicality"))
TYPICALITY = ResultTable(
    "forgotten_typicality.csv",
    ("forgotten", "kept", "mean_forgotten", "mean_kept", "difference", "low", "high"),
)
ABLATION = ResultTable(
    "dropout_ablation.csv",
    ("rescale", "batchnorm", *ACCURACIES),
    text=("rescale", "batchnorm"),
)
UNLEARNING = ResultTable(
    "unlearning.csv", ("examples", "draw", "neurons", "acc_chosen", *ACCURACIES)
)
BOOTSTRAP_DRAWS = 2000

# ---------------------------------------------------------------- without memorization neurons


@contextmanager
def recalibrated(model: nn.Module, images: Tensor, batch_size: int = 500) -> Iterator[None]:
    """Recompute batch-norm statistics on these images (uint8) in the model's current state.

    The batches have `batch_size` images or somewhat fewer, all about equally many, as each counts
    the same. No label is used. Restores every batch norm on exit.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(copy.deepcopy(norm.state_dict()), norm.momentum) for norm in norms]
    try:
        with eval_mode(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over all batches
                norm.train()
            for batch in images.tensor_split(math.ceil(len(images) / batch_size)):
                model(normalize(batch))
        yield
    finally:
        for norm, (state, momentum) in zip(norms, before):
            norm.load_state_dict(state)
            norm.momentum = momentum


@contextmanager
def dropped(model: nn.Module, split: Split, rescale: str, batchnorm: str) -> Iterator[None]:
    """Drop the memorization neurons of the model, if it has any.

    Standard dropout changes the statistics of activations between training and evaluation, so that
    recalibrated statistics matter there too.
    """
    standard = any(isinstance(module, StandardDropout) for module in model.modules())
    with ExitStack() as stack:
        if tied_layers(model):
            stack.enter_context(dropout_mode(model, "drop", rescale=rescale == "paper"))
        if batchnorm == "recalibrated" and (tied_layers(model) or standard):
            stack.enter_context(recalibrated(model, split.images))
        yield


def accuracies(split: Split, train: Outcome, test: Outcome) -> dict[str, float]:
    """Return the clean, the noisy and the test accuracy."""
    found = mean_by_subset(train.correct, split.memorized, "acc")
    found["acc_test"] = test.correct.double().mean().item()
    return {name: found[name] for name in ACCURACIES}


# ---------------------------------------------------------------- forgotten examples


def forgotten_rows(split: Split, before: Outcome, after: Outcome) -> Tensor:
    """Return the clean examples that dropping makes wrong, highest loss first."""
    lost = (~split.memorized & before.correct & ~after.correct).nonzero().flatten()
    return lost[after.loss[lost].argsort(descending=True, stable=True)]


def table_of_forgotten(
    split: Split, before: Outcome, after: Outcome, scores: Tensor | None
) -> list[dict[str, object]]:
    """Make the table of forgotten examples; typicality is nan where unknown."""
    rows = forgotten_rows(split, before, after)
    if scores is None:
        scores = torch.full_like(split.label, float("nan"), dtype=torch.float64)
    columns = (split.index, split.label, after.prediction, scores)
    return [
        dict(zip(FORGOTTEN.columns, values))
        for values in zip(*(column[rows].tolist() for column in columns))
    ]


def compute_typicality(forgotten: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Compare the typicality of forgotten and kept examples: difference of means, 95% interval.

    A percentile bootstrap that resamples both sides; the paper implies a negative difference.
    """
    random = random_stream("typicality bootstrap")

    def means(scores: np.ndarray) -> np.ndarray:
        draws = (random.choice(scores, len(scores)).mean() for _ in range(BOOTSTRAP_DRAWS))
        return np.fromiter(draws, dtype=float)

    low, high = np.quantile(means(forgotten) - means(kept), [0.025, 0.975])
    return {
        "forgotten": len(forgotten),
        "kept": len(kept),
        "mean_forgotten": float(forgotten.mean()),
        "mean_kept": float(kept.mean()),
        "difference": float(forgotten.mean() - kept.mean()),
        "low": float(low),
        "high": float(high),
    }


def table_of_typicality(
    split: Split, before: Outcome, after: Outcome, scores: Tensor | None
) -> list[dict[str, float]]:
    """Return one row, or none without scores or without examples on either side."""
    right = ~split.memorized & before.correct
    lost, kept = right & ~after.correct, right & after.correct
    if scores is None or not lost.any() or not kept.any():
        return []
    return [compute_typicality(scores[lost].cpu().numpy(), scores[kept].cpu().numpy())]


# ---------------------------------------------------------------- unlearning chosen examples


def choose_learned(split: Split, before: Outcome, size: int, draw: int) -> Tensor:
    """Choose `size` noisy examples that the model has learned, or all if there are fewer."""
    learned = (split.memorized & before.correct).nonzero().flatten()
    order = random_stream("examples to forget", size, draw).permutation(len(learned))
    return learned[torch.from_numpy(order[:size]).to(learned.device)]


def compute_unlearning(model: nn.Module, split: Split, rows: Tensor) -> dict[str, float]:
    """Measure accuracies without the neurons tied to these examples."""
    with forget(model, split.index[rows]):
        train, test = evaluate_split(model, split)
        off = torch.cat([layer.forgotten for layer in tied_layers(model)])
    others = torch.ones_like(split.memorized)
    others[rows] = False
    found = mean_by_subset(train.correct[others], split.memorized[others], "acc")
    return {
        "neurons": off.double().mean().item(),
        "acc_chosen": train.correct[rows].double().mean().item(),
        "acc_clean": found["acc_clean"],
        "acc_noisy": found["acc_noisy"],
        "acc_test": test.correct.double().mean().item(),
    }


# ---------------------------------------------------------------- the tables of a run


def measurements(run: Run) -> list[Measurement]:
    """Return the tables of a run; all but the first need example-tied neurons."""
    dropout = run.config.dropout
    measured = measuring_settings(run.config)
    state = {"rescale": dropout.rescale, "batchnorm": dropout.batchnorm} | measured
    draws = {"forget": dropout.forget, "forget_draws": dropout.forget_draws}
    found = [Measurement(run, DROPOUT, state)]
    if dropout.kind == "example_tied":
        scored = state | scores_given(run.config)
        found += [
            Measurement(run, FORGOTTEN, scored),
            Measurement(run, TYPICALITY, scored),
            Measurement(run, ABLATION, measured),
            Measurement(run, UNLEARNING, measured, draws),
        ]
    return found


def table_1(config: Config, before: dict, after: dict) -> list[dict[str, object]]:
    """Make a row for each state; settings that the kind of dropout lacks are nan."""
    dropout = config.dropout
    settings = {
        "dropout": dropout.kind,
        "p_gen": float("nan") if dropout.kind == "none" else dropout.p_gen,
        "p_mem": dropout.p_mem if dropout.kind == "example_tied" else float("nan"),
    }
    return [settings | {"state": "before"} | before, settings | {"state": "after"} | after]


def ablation(model: nn.Module, split: Split) -> Iterator[dict[str, object]]:
    """Measure the dropped model with each kind of rescaling and of batch-norm statistics."""
    for rescale, batchnorm in product(("none", "paper"), ("running", "recalibrated")):
        with dropped(model, split, rescale, batchnorm):
            found = accuracies(split, *evaluate_split(model, split))
        yield {"rescale": rescale, "batchnorm": batchnorm} | found


def unlearning(
    table: Measurement, config: Config, model: nn.Module, split: Split, before: Outcome
) -> Iterator[dict[str, object]]:
    """Measure each size and draw; skip sizes for which too few noisy examples were learned."""
    draws = [*product(config.dropout.forget, range(config.dropout.forget_draws))]
    for size, draw in with_progress(draws, f"{title(config)}: forgetting", len(draws), "draw"):
        rows = choose_learned(split, before, size, draw)
        if len(rows) < size:
            continue
        part = table.once(f"{size}-{draw}", partial(compute_unlearning, model, split, rows))
        yield {"examples": size, "draw": draw} | part


def measure_tables(run: Run, device: torch.device) -> None:
    """Measure the missing tables of a finished run, the cheapest first."""
    config = run.config
    split = load_split(config).to(device)
    model, before = load_evaluated_model(run, split, device)
    scores = load_typicality(config, split)
    with compute_precision(precision := measuring_precision(config, device), device):
        test_before = evaluate(model, split.test_images, split.test_label)
        if precision != config.precision:  # before and after are compared example by example
            before = evaluate(model, split.images, split.label, index=split.index)
        with dropped(model, split, config.dropout.rescale, config.dropout.batchnorm):
            after, test_after = evaluate_split(model, split)
        states = accuracies(split, before, test_before), accuracies(split, after, test_after)
        for measurement in measurements(run):
            if measurement.finished:
                continue
            if measurement.table is DROPOUT:
                rows = table_1(config, *states)
            elif measurement.table is FORGOTTEN:
                rows = table_of_forgotten(split, before, after, scores)
            elif measurement.table is TYPICALITY:
                rows = table_of_typicality(split, before, after, scores)
            elif measurement.table is ABLATION:
                rows = ablation(model, split)
            else:
                rows = unlearning(measurement, config, model, split, before)
            measurement.finish(rows, device, precision)


# ---------------------------------------------------------------- a run


def train(run: Run, device: torch.device) -> None:
    """Train a run that is not one of gradient_accounting.py."""
    if run.config.train.account_gradients:
        run.require_finished()  # only gradient_accounting.py trains these
    split = load_split(run.config).to(device)
    model = make_model(run.config, split).to(device)
    train_run(run, split, model, device)


def write_sites(run: Run) -> None:
    """Write where a finished run has dropout: what Figure 6 needs of a network's code."""
    split = load_split(run.config)
    model = make_model(run.config, split, proof=False)  # the training has verified it
    places = find_places(model, run.config.dropout.sites, normalize(split.images[:2]))
    rows = [{"site": name, "channels": place.channels} for name, place in places.items()]
    DROPOUT_SITES.write(run.directory, rows)


def measure(run: Run) -> None:
    """Train one run unless that is done, and measure its missing tables."""
    device = resolve_device(run.config)
    if not run.finished:
        train(run, device)
    restore_results(run)
    run.discard(run.resumable_epochs())
    if not all(measurement.finished for measurement in measurements(run)):
        measure_tables(run, device)  # refuses damaged files, before anything is written
    if run.config.dropout.kind != "none" and not DROPOUT_SITES.path(run.directory).exists():
        write_sites(run)


def summarize(run: Run) -> str:
    """Return the accuracies before and after dropping."""
    before, after = DROPOUT.read(run.directory)
    changes = (
        f"{name.removeprefix('acc_')} {before[name]:.2%} -> {after[name]:.2%}"
        for name in ACCURACIES
    )
    without = " (no dropout: nothing was dropped)" * (run.config.dropout.kind == "none")
    return f"{title(run.config)}: {', '.join(changes)}{without}"


def estimate_passes(run: Run) -> float:
    """Count the remaining training and the evaluations of each table."""
    settings, sizes = run.config.dropout, count_examples(run.config)
    evaluations = 2
    if settings.kind == "example_tied":
        evaluations += 6 + len(settings.forget) * settings.forget_draws
    return (0 if run.finished else training_passes(run)) + evaluations * sum(sizes)


def require_dropout(runs: Sequence[Run]) -> None:
    """Refuse runs without any dropout; a sweep may compare with `none`."""
    if all(run.config.dropout.kind == "none" and not run.finished for run in runs):
        raise UserError(
            "dropout.kind: none leaves nothing to drop; add dropout.kind=example_tied, standard or "
            "sparse"
        )


EXPERIMENT = Experiment(
    key="dropout",
    command="python example_tied_dropout.py",
    section="6.2",
    question=("Can memorization be confined to chosen neurons, and removed with them?"),
    tables=(DROPOUT, FORGOTTEN, TYPICALITY, ABLATION, UNLEARNING),
    figures=("plotting.dropout",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    disk=estimate_disk,
    measurements=measurements,
    training=without_accounting,
    trains=True,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__, check=require_dropout))
