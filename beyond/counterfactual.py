"""Is an example memorized? Train with it, train without it (Feldman and Zhang, 2020).

The memorization of an example is the accuracy on it of networks that trained on it minus that of
networks that did not. Many networks are trained, each on a random half of the training set with the
run's own schedule and with an initialization and batch order of its own.

    python -m beyond.counterfactual configs/quickstart.yaml counterfactual.trainings=9  # minutes
    python -m beyond.counterfactual configs/beyond/counterfactual_glyphs.yaml   # 200 trainings

Reads finished runs. Does `counterfactual.trainings` trainings for each, and writes
counterfactual.csv: the yardstick for the scores of beyond/example_scores.py. Each training is saved
when it ends; asking for more trainings keeps those that are there. The same command, started again
or on other machines with a common file system, shares the trainings; the last to end writes the
table.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from beyond.halves import Counts, draw_half
from data import Split
from engine.config.schema import Config
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples
from engine.progress import progress_bar
from engine.runs import files
from engine.runs.experiment import Experiment
from engine.runs.identity import title
from engine.runs.locking import Held, is_held, lock
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import ResultTable
from engine.training.build import load_split, make_model
from engine.training.devices import compute_precision, derive_seed, resolve_device
from engine.training.evaluation import evaluate
from engine.training.loop import make_optimizer, train_epoch

COUNTERFACTUAL = ResultTable(
    "counterfactual.csv",
    ("index", "memorization", "standard_error", "trained_in", "trained_out"),
)


def train_on(config: Config, split: Split, half: np.ndarray, number: int) -> np.ndarray:
    """Train a network on half of the examples; return which of all it predicts as labeled."""
    seed = derive_seed("counterfactual training", config.seed, number) % 2**31
    config = replace(config, seed=seed)
    own = split.subset(torch.from_numpy(half).to(split.label.device))
    model = make_model(config, split).to(split.label.device)
    optimizer = make_optimizer(model.parameters(), config.train)
    for epoch in range(1, config.train.epochs + 1):
        train_epoch(model, optimizer, own, config, epoch)
    outcome = evaluate(model, split.images, split.label, index=split.index)
    return outcome.correct.cpu().numpy()


def make_measurement(run: Run) -> Measurement:
    selection = {"trainings": run.config.counterfactual.trainings}
    return Measurement(run, COUNTERFACTUAL, {}, selection)


def key_of(number: int) -> str:
    return f"training_{number:05d}"


def train_missing(run: Run, measurement: Measurement, split: Split) -> list[int]:
    """Do every training that no other process does; return those that others are doing."""
    config, left = run.config, []
    keys = [key_of(number) for number in range(measurement.settings["trainings"])]
    to_do = [number for number, key in enumerate(keys) if measurement.part(key) is None]
    about, done = f"{title(config)}: counterfactual", len(keys) - len(to_do)
    bar = progress_bar(about, len(keys), "training", initial=done)
    with bar, compute_precision(config.precision, split.label.device):
        for number in to_do:
            try:
                with lock(measurement.folder / keys[number]):
                    if measurement.part(keys[number]) is None:
                        half = draw_half(split.n, config.seed, number)
                        correct = train_on(config, split, half, number)
                        packed = torch.from_numpy(np.packbits(correct))
                        measurement.save(keys[number], packed)
            except Held:
                left.append(number)
            bar.update()
    return [number for number in left if measurement.part(keys[number]) is None]


def count(run: Run, measurement: Measurement, n: int) -> Counts:
    """Count all trainings of a measurement, each of which is there."""
    counts = Counts.zeros(n)
    for number in range(measurement.settings["trainings"]):
        correct = np.unpackbits(measurement.part(key_of(number)).numpy(), count=n).astype(bool)
        counts.add(draw_half(n, run.config.seed, number), correct)
    return counts


def make_rows(index: np.ndarray, counts: Counts) -> Iterator[dict[str, object]]:
    columns = {
        "index": index.tolist(),
        "memorization": counts.memorization().tolist(),
        "standard_error": counts.standard_error().tolist(),
        "trained_in": counts.trained_in.tolist(),
        "trained_out": counts.trained_out.tolist(),
    }
    for values in zip(*columns.values()):
        yield dict(zip(COUNTERFACTUAL.columns, values))


def read_counterfactual(run: Run) -> dict[str, np.ndarray]:
    rows = COUNTERFACTUAL.read(run.directory)
    return {c: np.array([row[c] for row in rows]) for c in COUNTERFACTUAL.columns}


def measure(run: Run) -> None:
    """Do the trainings that no other process does; write the table once all are there."""
    measurement, device = make_measurement(run), resolve_device(run.config)
    split = load_split(run.config).to(device)
    run.check_split(split)
    if train_missing(run, measurement, split):
        return
    with nullcontext() if is_held(run.directory) else lock(run.directory, wait=True):
        if not measurement.finished:
            counts = count(run, measurement, split.n)
            measurement.finish(make_rows(split.index.cpu().numpy(), counts), device)


def summarize(run: Run) -> str:
    """Give the mean memorization of both kinds of examples, in one line."""
    if not make_measurement(run).finished:
        return f"{title(run.config)}: other processes do the remaining trainings"
    table = read_counterfactual(run)
    memorized = files.read_arrays(run.split_path, "memorized")["memorized"]
    parts = []
    for name, kind in (("memorized", memorized), ("clean", ~memorized)):
        values = table["memorization"][kind & np.isfinite(table["memorization"])]
        parts.append(f"{name} {values.mean():.3f}" if len(values) else f"{name} none")
    errors = table["standard_error"][np.isfinite(table["standard_error"])]
    error = f"{np.median(errors):.3f}" if len(errors) else "none"
    words = f"{', '.join(parts)}; median standard error {error}"
    return f"{title(run.config)}: counterfactual memorization: {words}"


def estimate_passes(run: Run) -> float:
    """Forward and backward for half of the examples at every epoch, then one evaluation."""
    train, _ = count_examples(run.config)
    return run.config.counterfactual.trainings * train * (1.5 * run.config.train.epochs + 1)


EXPERIMENT = Experiment(
    key="counterfactual",
    command="python -m beyond.counterfactual",
    section="",
    question=(
        "How much more often is an example predicted as labeled by networks that trained on it "
        "than by networks that did not, and which score follows that?"
    ),
    tables=(COUNTERFACTUAL,),
    figures=("plotting.beyond.counterfactual",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    disk=lambda run: (
        run.config.counterfactual.trainings * (count_examples(run.config)[0] / 8 + 2e3)
    ),
    measurements=lambda run: [make_measurement(run)],
    shared=True,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
