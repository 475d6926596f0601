"""Published scores of every example on the same weights: which finds the memorized ones?

Section 6.1 offers the number of neurons that flip an example as a way to find mislabeled ones, and
compares it with two other scores. Here stand a dozen published scores of every training example
side by side, judged by the true labels.

    python -m beyond.example_scores configs/small/mnist.yaml

Reads finished runs. Most scores come from what the training recorded; prediction depth takes one
pass over the training set and all distances within it, at every stage. Those of neuron_flipping.py
(neurons; forgetting time with `flipping.second_split`) and of example_tied_dropout.py (dropped) are
taken over where they were measured. Writes example_scores.csv, example_scores_auc.csv,
example_scores_correlation.csv and example_scores_with_neurons.csv into every run, from which
plot_results.py draws the figures.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beyond import scores
from data import Split, normalize
from data.random_streams import random_stream
from engine.config.schema import Config, DropoutConfig
from engine.flipping.second_split import forgetting_measurement, read_forgetting
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples
from engine.progress import with_progress
from engine.runs import files
from engine.runs.experiment import Experiment
from engine.runs.identity import measuring_precision, measuring_settings, scores_given, title
from engine.runs.locking import lock
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import ResultTable
from engine.stats import (
    INTERVAL,
    RESAMPLES,
    compute_area,
    compute_auc,
    first_epoch_for_good,
    mean_ranks,
    rank_correlation,
)
from engine.training.build import load_final_model, load_split, load_typicality
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import batch_size, eval_mode, evaluate
from engine.training.record import read_examples
from models.dropout import dropout_mode, examples, tied_layers
from models.layer_groups import StagedModel, layer_groups
from plotting.families import measured
from plotting.neurons import FLIPPING, read_searched

SCORES = (
    "learning_time", "forgetting_events", "summed_loss", "aum", "el2n", "confidence",
    "variability", "prediction_depth", "forgetting_time", "neurons", "c_score", "dropped",
)  # fmt: skip
ABOUT = ("index", "label", "true_label", "memorized")
EXAMPLES = ResultTable("example_scores.csv", (*ABOUT, *SCORES), text=SCORES)
AREAS = ResultTable(
    "example_scores_auc.csv",
    ("score", "on", "memorized", "clean", "auc", "low", "high"),
    text=("score", "on"),
)
CORRELATIONS = ResultTable(
    "example_scores_correlation.csv",
    ("score", "with", "on", "n", "rho"),
    text=("score", "with", "on"),
)
WITH_NEURONS = ResultTable(
    "example_scores_with_neurons.csv",
    ("score", "memorized", "clean", "auc", "auc_with_neurons", "gain", "low", "high", "partial"),
    text=("score",),
)

Scores = dict[str, np.ndarray]  # of each score, float64 [n]

# ---------------------------------------------------------------- scores from the training's record


def el2n_epoch(config: Config) -> int:
    """Return the epoch of EL2N: by default a tenth of the training (Paul et al.: 20 of 200)."""
    return config.scores.el2n_epoch or math.ceil(config.train.epochs / 10)


def recorded_scores(run: Run) -> Scores:
    """Compute the scores for which the training has recorded all that they need."""
    record = read_examples(run)
    return {
        "learning_time": first_epoch_for_good(record["correct"]).astype(float),
        "forgetting_events": scores.forgetting_events(record["correct"]),
        "summed_loss": scores.summed_loss(record["loss"]),
        "aum": scores.area_under_margin(record["margin"]),
        "el2n": scores.el2n(record["error_norm"], el2n_epoch(run.config)),
        "confidence": scores.confidence(record["loss"]),
        "variability": scores.variability(record["loss"]),
    }


# ---------------------------------------------------------------- scores from the final weights


@torch.no_grad()
def stage_features(model: StagedModel, split: Split) -> Iterator[Tensor]:
    """Yield the images and what flows out of every layer, [n, d]; the logits come last.

    One stage's activations of the whole training set are in memory at a time.
    """
    rows = torch.arange(split.n, device=split.label.device).split(batch_size(split.label.device))
    states = [normalize(split.images[batch]) for batch in rows]
    yield _features([(images,) for images in states])
    with eval_mode(model):
        for group in layer_groups(model):
            for number, batch in enumerate(rows):
                with examples(model, split.index[batch]):
                    states[number] = group.forward(states[number])
            values = type(model).values_behind  # a network may have a module of this name
            yield _features([values(model, group.index, state) for state in states])


def _features(states: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Flatten what flows out of a stage: float32 [n, d], both branches of a residual block."""
    rows = [torch.cat([part.flatten(1) for part in parts], dim=1).float() for parts in states]
    return torch.cat(rows)


def compute_depth(
    model: StagedModel,
    split: Split,
    k: int,
    once: Callable[[str, Callable[[], Tensor]], Tensor] = lambda key, make: make(),
) -> np.ndarray:
    """Return the first stage from which on the k-NN probes say what the network says.

    `once` makes the votes of a stage, or returns those that it has kept under the same key.
    """
    stages, votes = len(layer_groups(model)) + 1, []
    features = with_progress(stage_features(model, split), "prediction depth", stages, "stage")
    for number, own in enumerate(features):
        votes.append(once(f"votes-{number}", partial(_votes, own, split, k)))
    return scores.depth_of_agreement(votes, own.argmax(dim=1).cpu())


def _votes(features: Tensor, split: Split, k: int) -> Tensor:
    return scores.neighbour_votes(features, split.label, k, split.classes).cpu()


def compute_dropped(model: StagedModel, split: Split) -> np.ndarray:
    """Return 1 where dropping the memorization neurons changes a right prediction, else 0.

    nan for examples that are misclassified with them, too.
    """
    arguments = (split.images, split.label, split.index)
    before = evaluate(model, *arguments).correct.cpu().numpy()
    with dropout_mode(model, "drop"):
        after = evaluate(model, *arguments).correct.cpu().numpy()
    return np.where(before, ~after, np.nan).astype(float)


def dropout_run(run: Run) -> Run | None:
    """Find the finished run with example-tied dropout that `dropped` is measured on.

    A run that has such dropout is its own; else it is the same training with the default dropout.
    """
    if run.config.dropout.kind == "example_tied":
        return run
    if run.config.dropout.kind != "none":
        return None
    config = replace(
        run.config,
        dropout=DropoutConfig(kind="example_tied"),
        train=replace(run.config.train, account_gradients=False),
        output_dir=str(run.directory.parent.parent),
    )
    other = Run.of(config)
    return other if other.finished else None


# ---------------------------------------------------------------- all scores of a run


def compute_scores(run: Run, measurement: Measurement, device: torch.device) -> Scores:
    """Collect every score [n]; nan where it was not measured."""
    split = load_split(run.config).to(device)
    found = recorded_scores(run)
    with compute_precision(measuring_precision(run.config, device), device):
        if run.config.scores.neighbours is not None:
            found["prediction_depth"] = np.array(_depth(run, measurement, split))
        if other := measurement.settings["dropped"] and dropout_run(run):
            found["dropped"] = np.array(_dropped(other, measurement, split))
    if measurement.settings["forgetting_time"]:
        found["forgetting_time"] = -read_forgetting(run)
    if measurement.settings["neurons"]:
        found["neurons"] = np.full(split.n, np.nan)
        rows = read_searched(run)
        place = np.searchsorted(split.index.cpu().numpy(), [row["example"] for row in rows])
        found["neurons"][place.astype(int)] = [-row["neurons"] for row in rows]
    typicality = load_typicality(run.config, split)
    if typicality is not None:
        found["c_score"] = -typicality.cpu().numpy()
    return {name: found.get(name, np.full(split.n, np.nan)) for name in SCORES}


def _depth(run: Run, measurement: Measurement, split: Split) -> list[float]:
    """Measure the prediction depth once, and keep it and every stage's votes as parts."""

    def make() -> list[float]:
        model, k = load_final_model(run, split, split.label.device), run.config.scores.neighbours
        return compute_depth(model, split, k, measurement.once).tolist()

    return measurement.once("prediction_depth", make)


def _dropped(run: Run, measurement: Measurement, split: Split) -> list[float]:
    """Measure what dropping forgets once, and keep it as a part."""

    def make() -> list[float]:
        model = load_final_model(run, split, split.label.device)
        assert tied_layers(model)
        return compute_dropped(model, split).tolist()

    return measurement.once(f"dropped-{run.identity[:12]}", make)


def make_rows(split: Mapping[str, np.ndarray], found: Scores) -> Iterator[dict[str, object]]:
    """Yield the table's rows; a cell without a number is empty."""
    whole = {name: split[name].astype(int).tolist() for name in ABOUT}
    cells = {name: ["" if np.isnan(v) else float(v) for v in found[name]] for name in SCORES}
    for values in zip(*(whole | cells).values()):
        yield dict(zip(EXAMPLES.columns, values))


# ---------------------------------------------------------------- how the scores compare


def subsets(found: Scores) -> dict[str, np.ndarray]:
    """Name the examples that scores are compared on: all, and those searched for neurons."""
    searched = np.isfinite(found["neurons"])
    chosen = {"all": np.ones_like(searched)}
    return chosen | ({"searched": searched} if searched.any() else {})


def make_areas(found: Scores, memorized: np.ndarray, seed: int) -> list[dict[str, object]]:
    """Judge every score by the truth: ROC AUC over all examples and over the searched ones.

    A score that some of them lack is judged on those that have it; the number of neurons on the
    searched ones only.
    """
    rows = []
    for on, chosen in subsets(found).items():
        for name in SCORES:
            use = chosen & np.isfinite(found[name])
            if not use.any() or (name == "neurons" and on == "all"):
                continue
            score, truth = found[name][use], memorized[use]
            counts = {"memorized": int(truth.sum()), "clean": int((~truth).sum())}
            area = compute_area(score[truth], score[~truth], seed)
            rows.append({"score": name, "on": on, **counts, **vars(area)})
    return rows


def make_correlations(found: Scores, memorized: np.ndarray) -> list[dict[str, object]]:
    """Correlate every pair of scores over all and over clean examples (Spearman)."""
    rows = []
    for on, chosen in {"all": np.ones_like(memorized), "clean": ~memorized}.items():
        for number, name in enumerate(SCORES):
            for other in SCORES[number + 1 :]:
                use = chosen & np.isfinite(found[name]) & np.isfinite(found[other])
                rho = rank_correlation(found[name][use], found[other][use])
                pair = {"score": name, "with": other}
                rows.append({**pair, "on": on, "n": int(use.sum()), "rho": rho})
    return rows


def make_with_neurons(found: Scores, memorized: np.ndarray, seed: int) -> list[dict[str, object]]:
    """Say what the number of neurons adds to every other score, on the searched examples.

    The AUC of the score, that of the sum of both scores' ranks, the difference with its 95%
    bootstrap interval, and the rank correlation of neurons with the truth given the score.
    """
    rows, neurons = [], found["neurons"]
    for name in SCORES:
        use = np.isfinite(neurons) & np.isfinite(found[name])
        if name == "neurons" or not use.any():
            continue
        alone, truth = mean_ranks(found[name][use]), memorized[use]
        both = scores.summed_ranks(found[name][use], neurons[use])
        gains = _resampled_gains(alone, both, truth, seed)
        area, with_neurons = (compute_auc(s[truth], s[~truth]) for s in (alone, both))
        rows.append(
            {
                "score": name,
                "memorized": int(truth.sum()),
                "clean": int((~truth).sum()),
                "auc": area,
                "auc_with_neurons": with_neurons,
                "gain": with_neurons - area,
                **dict(zip(("low", "high"), map(float, np.percentile(gains, INTERVAL)))),
                "partial": scores.partial_correlation(
                    neurons[use], truth.astype(float), found[name][use]
                ),
            }
        )
    return rows


def _resampled_gains(
    alone: np.ndarray, both: np.ndarray, truth: np.ndarray, seed: int
) -> list[float]:
    """Draw the examples of both kinds again with replacement, the same ones for both scores."""
    draw, kinds = random_stream("score gain bootstrap", seed), [truth.nonzero()[0]]
    kinds.append((~truth).nonzero()[0])
    gains = []
    for _ in range(RESAMPLES):
        rows = np.concatenate(
            [kind[draw.integers(len(kind), size=len(kind))] for kind in kinds if len(kind)]
        )
        kind = truth[rows]
        area, with_neurons = (compute_auc(s[rows][kind], s[rows][~kind]) for s in (alone, both))
        gains.append(with_neurons - area)
    return gains


# ---------------------------------------------------------------- a run


def make_measurements(run: Run, dropped: Run | None) -> list[Measurement]:
    """Return the four tables of a run, with what they are made from.

    What differs between seeds is no part of that: figures join runs that were measured alike.
    """
    settings = {"neighbours": run.config.scores.neighbours} | measuring_settings(run.config)
    selection = {
        "el2n_epoch": run.config.scores.el2n_epoch,
        "neurons": measured(run, FLIPPING.name),
        "forgetting_time": forgetting_measurement(run).finished,
        "dropped": dropped is not None,
        **scores_given(run.config),
    }
    return [Measurement(run, table, settings, selection) for table in TABLES]


def measurements(run: Run) -> list[Measurement]:
    """Return the tables with the column of a run with dropout; without it if these are finished.

    That run may be trained after the scores are made: `conclude` adds the column.
    """
    complete = make_measurements(run, dropout_run(run))
    early = make_measurements(run, None)
    finished = all(m.finished for m in early) and not all(m.finished for m in complete)
    return early if finished else complete


def write_tables(run: Run, tables: Sequence[Measurement]) -> None:
    """Score every example of a run, and compare the scores."""
    device = resolve_device(run.config)
    found = compute_scores(run, tables[0], device)
    split = files.read_arrays(run.split_path, *ABOUT)
    memorized, seed = split["memorized"], run.config.data.noise_seed
    rows = (
        make_rows(split, found),
        make_areas(found, memorized, seed),
        make_correlations(found, memorized),
        make_with_neurons(found, memorized, seed),
    )
    for table, own in zip(tables, rows):
        table.finish(own, device, measuring_precision(run.config, device))


def measure(run: Run) -> None:
    write_tables(run, make_measurements(run, dropout_run(run)))


def summarize(run: Run) -> str:
    """Name the scores that find the memorized examples best, in one line."""
    rows = [r for r in AREAS.read(run.directory) if r["on"] == "all" and r["score"] != "dropped"]
    best = sorted(rows, key=lambda row: -row["auc"])[:3]
    words = "AUC " + ", ".join(f"{row['score']} {row['auc']:.3f}" for row in best)
    if not any(np.isfinite(row["auc"]) for row in rows):
        words = "nothing to tell apart: all examples are of one kind"
    return f"{title(run.config)}: {words}"


def conclude(runs: Sequence[Run]) -> Iterator[tuple[str, Path]]:
    """Add the column of a run with dropout that was trained after the scores were made."""
    for run in runs:
        tables = make_measurements(run, dropout_run(run))
        if not all(table.finished for table in tables):
            with lock(run.directory, wait=True):
                write_tables(run, tables)
    yield from ()


def estimate_passes(run: Run) -> float:
    """Two evaluations, and distances to all examples: about a pass for every 500 of them."""
    train, _ = count_examples(run.config)
    return train * (3 + (train / 500 if run.config.scores.neighbours else 0))


TABLES = (EXAMPLES, AREAS, CORRELATIONS, WITH_NEURONS)
EXPERIMENT = Experiment(
    key="scores",
    command="python -m beyond.example_scores",
    section="",
    question=(
        "Which published score finds the memorized examples, on the same weights, and do scores "
        "agree where no label is wrong?"
    ),
    tables=TABLES,
    figures=("plotting.beyond.scores",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    disk=lambda run: 300.0 * count_examples(run.config)[0],
    measurements=measurements,
    conclude=conclude,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
