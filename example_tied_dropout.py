"""Example-tied dropout (Section 6.2): memorization on a leash.

Claims: (i) when every example has a few neurons of its own beside those that all examples share,
what is memorized goes there: dropping them takes mislabeled examples from near 100% to a few
percent, at little cost to the others (Table 1; over p_gen and p_mem, Table 2); (ii) equally sparse
networks without that tie fit the wrong labels (Table 3); (iii) the clean examples that are lost on
dropping are atypical ones (Figure 7).

    python example_tied_dropout.py configs/paper/table_2.yaml

Trains a run with the configured dropout for every combination of the sweep, and measures it before
and after dropping. Beyond the paper: what rescaling and new batch-norm statistics change after
dropping, and what becomes of everybody when the neurons of a few chosen examples are dropped. All
that is cheap beside the training.
"""

import copy
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from data import Split, batch_rows, expanded, normalize
from data.random_streams import random_stream
from engine.config.schema import Config
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.identity import digest_of, title
from engine.runs.measurement import Measurement
from engine.runs.run import Run
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
from engine.training.record import PlainBackward
from models.dropout import dropout_mode, forget, tied_layers

ACCURACIES = ("acc_clean", "acc_noisy", "acc_test")
COLUMNS = ("dropout", "p_gen", "p_mem", "state", *ACCURACIES)
FORGOTTEN_COLUMNS = ("index", "label", "prediction_after", "typicality")
TYPICALITY_COLUMNS = (
    "forgotten", "kept", "mean_forgotten", "mean_kept", "difference", "low", "high",
)  # fmt: skip
ABLATION_COLUMNS = ("rescale", "batchnorm", *ACCURACIES)
UNLEARNING_COLUMNS = ("examples", "draw", "neurons", "acc_chosen", *ACCURACIES)
BOOTSTRAP_DRAWS = 2000

# ---------------------------------------------------------------- without memorization neurons


@contextmanager
def recalibrated(model: nn.Module, images: Tensor, batch_size: int = 500) -> Iterator[None]:
    """Batch norms with the statistics of these images (uint8), as the model now is.

    No label is used. Afterwards, every batch norm is as it was.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(copy.deepcopy(norm.state_dict()), norm.momentum) for norm in norms]
    try:
        with eval_mode(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over all batches
                norm.train()
            for start, stop in batch_rows(len(images), batch_size):
                model(normalize(images[start:stop]))
        yield
    finally:
        for norm, (state, momentum) in zip(norms, before):
            norm.load_state_dict(state)
            norm.momentum = momentum


@contextmanager
def dropped(model: nn.Module, split: Split, rescale: str, batchnorm: str) -> Iterator[None]:
    """The model without its memorization neurons; one that has none stays what it is."""
    with ExitStack() as stack:
        if tied_layers(model):
            stack.enter_context(dropout_mode(model, "drop", rescale=rescale == "paper"))
            if batchnorm == "recalibrated":
                stack.enter_context(recalibrated(model, split.images))
        yield


def accuracies(split: Split, train: Outcome, test: Outcome) -> dict[str, float]:
    found = mean_by_subset(train.correct, split.memorized, "acc")
    found["acc_test"] = test.correct.double().mean().item()
    return {name: found[name] for name in ACCURACIES}


# ---------------------------------------------------------------- who is forgotten


def forgotten_rows(split: Split, before: Outcome, after: Outcome) -> Tensor:
    """The clean examples that are right before dropping and wrong after, most wrong first."""
    lost = (~split.memorized & before.correct & ~after.correct).nonzero().flatten()
    return lost[after.loss[lost].argsort(descending=True, stable=True)]


def table_of_forgotten(
    split: Split, before: Outcome, after: Outcome, scores: Tensor | None
) -> list[dict[str, object]]:
    rows = forgotten_rows(split, before, after)
    if scores is None:
        scores = torch.full_like(split.label, float("nan"), dtype=torch.float64)
    columns = (split.index, split.label, after.prediction, scores)
    return [
        dict(zip(FORGOTTEN_COLUMNS, values))
        for values in zip(*(column[rows].tolist() for column in columns))
    ]


def compute_typicality(forgotten: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """How much less typical the forgotten are: difference of the means, with a 95% interval.

    A percentile bootstrap, each side drawn anew from itself; negative is what the paper says.
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
    """One row, or none where there is nobody to compare or no score."""
    right = ~split.memorized & before.correct
    lost, kept = right & ~after.correct, right & after.correct
    if scores is None or not lost.any() or not kept.any():
        return []
    return [compute_typicality(scores[lost].cpu().numpy(), scores[kept].cpu().numpy())]


# ---------------------------------------------------------------- unlearning chosen examples


def choose_examples(split: Split, before: Outcome, size: int, draw: int) -> Tensor:
    """Rows of `size` noisy examples that the model has learned; fewer if there are not so many."""
    learned = (split.memorized & before.correct).nonzero().flatten()
    order = random_stream("examples to forget", size, draw).permutation(len(learned))
    return learned[torch.from_numpy(order[:size]).to(learned.device)]


def compute_unlearning(model: nn.Module, split: Split, rows: Tensor) -> dict[str, float]:
    """Accuracies without the neurons tied to these examples: theirs, the others', and on test."""
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


def tables(run: Run) -> dict[str, Measurement]:
    """What is measured on a run; all but the first need neurons that are tied to examples."""
    dropout = run.config.dropout
    state = {"rescale": dropout.rescale, "batchnorm": dropout.batchnorm}
    draws = {"forget": dropout.forget, "forget_draws": dropout.forget_draws}
    found = {"main": Measurement(run, "example_tied_dropout.csv", COLUMNS, state)}
    scored = state | scores_given(run.config)
    if dropout.kind == "example_tied":
        found |= {
            "forgotten": Measurement(run, "forgotten.csv", FORGOTTEN_COLUMNS, scored),
            "typicality": Measurement(run, "forgotten_typicality.csv", TYPICALITY_COLUMNS, scored),
            "ablation": Measurement(run, "dropout_ablation.csv", ABLATION_COLUMNS, {}),
            "unlearning": Measurement(run, "unlearning.csv", UNLEARNING_COLUMNS, {}, draws),
        }
    return found


def scores_given(config: Config) -> dict[str, str]:
    """Digest of a file of C-scores that no training of this split reads, only these tables."""
    path = config.data.c_scores
    if path is None or config.data.split == "atypical":
        return {}
    return {"c_scores": digest_of(expanded(path))}


def table_1(config: Config, before: dict, after: dict) -> list[dict[str, object]]:
    """A row for each state; what a kind of dropout does not have is nan."""
    dropout = config.dropout
    settings = {
        "dropout": dropout.kind,
        "p_gen": float("nan") if dropout.kind == "none" else dropout.p_gen,
        "p_mem": dropout.p_mem if dropout.kind == "example_tied" else float("nan"),
    }
    return [settings | {"state": "before"} | before, settings | {"state": "after"} | after]


def ablation(model: nn.Module, split: Split) -> Iterator[dict[str, object]]:
    """After dropping, with each way of rescaling and each of batch norm."""
    for rescale, batchnorm in product(("none", "paper"), ("running", "recalibrated")):
        with dropped(model, split, rescale, batchnorm):
            found = accuracies(split, *evaluate_split(model, split))
        yield {"rescale": rescale, "batchnorm": batchnorm} | found


def unlearning(
    table: Measurement, config: Config, model: nn.Module, split: Split, before: Outcome
) -> Iterator[dict[str, object]]:
    """For each size and draw, what is left; nothing where no noisy example was learned."""
    for size, draw in product(config.dropout.forget, range(config.dropout.forget_draws)):
        rows = choose_examples(split, before, size, draw)
        if len(rows) < size:
            continue
        key = f"{size}-{draw}"
        if (part := table.part(key)) is None:
            part = compute_unlearning(model, split, rows)
            table.save(key, part)
        yield {"examples": size, "draw": draw} | part


def measure(run: Run, device: torch.device) -> None:
    """Every table of a finished run that is not there yet, the cheapest first."""
    config = run.config
    split = load_split(config).to(device)
    model, before = load_evaluated_model(run, split, device)
    scores = load_typicality(config, split)
    with compute_precision(config.precision, device):
        test_before = evaluate(model, split.test_images, split.test_label)
        with dropped(model, split, config.dropout.rescale, config.dropout.batchnorm):
            after, test_after = evaluate_split(model, split)
        states = accuracies(split, before, test_before), accuracies(split, after, test_after)
        rows_of = {
            "main": lambda table: table_1(config, *states),
            "forgotten": lambda table: table_of_forgotten(split, before, after, scores),
            "typicality": lambda table: table_of_typicality(split, before, after, scores),
            "ablation": lambda table: ablation(model, split),
            "unlearning": lambda table: unlearning(table, config, model, split, before),
        }
        for name, table in tables(run).items():
            if not table.finished:
                table.finish(rows_of[name](table), device)


# ---------------------------------------------------------------- a run


def without_accounting(config: Config) -> Config:
    """Gradients are accounted without dropout, by gradient_accounting.py."""
    train = dataclasses.replace(config.train, account_gradients=False)
    return dataclasses.replace(config, train=train)


def train(run: Run, device: torch.device) -> None:
    if run.config.train.account_gradients:
        run.require_finished()  # it is one of gradient_accounting.py
    split = load_split(run.config).to(device)
    train_run(run, split, make_model(run.config, split).to(device), device)


def dropout_title(config: Config) -> str:
    dropout = config.dropout
    shares = {
        "example_tied": f" {dropout.p_gen:g} {dropout.p_mem:g}",
        "none": " dropout",
    }.get(dropout.kind, f" {dropout.p_gen:g}")
    return f"{title(config)}, {dropout.kind}{shares}"


def main(run: Run) -> str:
    """Train and measure one run, whatever of it is not there yet; its results in one line."""
    device = resolve_device(run.config)
    if not run.finished:
        train(run, device)
    restore_results(run, PlainBackward())
    run.discard(run.resumable_epochs())
    found = tables(run)
    if not all(table.finished for table in found.values()):
        measure(run, device)
    before, after = files.read_csv(found["main"].path, COLUMNS, text=("dropout", "state"))
    changes = (
        f"{name.removeprefix('acc_')} {before[name]:.2%} -> {after[name]:.2%}"
        for name in ACCURACIES
    )
    return f"{dropout_title(run.config)}: {', '.join(changes)}"


def is_done(run: Run) -> bool:
    trained = run.finished and not run.missing_results()
    return trained and all(table.finished for table in tables(run).values())


def plan(run: Run) -> str:
    """What `main` would do, and the disk that it takes."""
    state = f"{run.state}, {'measured' if is_done(run) else 'to measure'}"
    return f"{dropout_title(run.config)}: {state}, {files.megabytes(estimate_disk(run))}"


if __name__ == "__main__":
    sys.exit(run_script(__doc__, main, plan, training=without_accounting))
