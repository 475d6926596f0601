"""Second-split forgetting (Maini et al. 2022): learn one half, then the other; what is forgotten?

Mislabeled examples are forgotten soon once they are no longer trained on. Every example is in the
first half once: the two halves are trained on in both orders, from the same initialization, each
phase with the whole schedule of the run.
"""

import numpy as np
import torch
from torch import Tensor

from data import Split
from data.random_streams import random_stream
from engine.config.schema import Config
from engine.progress import progress_bar
from engine.runs.identity import title
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import ResultTable
from engine.stats import first_epoch_for_good
from engine.training.build import make_model
from engine.training.devices import compute_precision
from engine.training.evaluation import evaluate
from engine.training.loop import make_optimizer, train_epoch

# `forgotten` is the epoch from which an example stays wrong; epochs + 1 where there is none.
SECOND_SPLIT = ResultTable("second_split.csv", ("example", "forgotten"))


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(random_stream("second split", seed).permutation(n))
    return order[: n // 2].sort().values, order[n // 2 :].sort().values


def compute_forgetting(config: Config, split: Split, own: Tensor, other: Tensor) -> np.ndarray:
    """The epoch of the second phase from which each example of the first half stays wrong."""
    model = make_model(config, split).to(split.label.device)
    first, second = (split.subset(rows.to(split.label.device)) for rows in (own, other))
    train = config.train
    wrong = []
    with progress_bar(f"{title(config)}: forgetting time", 2 * train.epochs, "epoch") as bar:
        for phase, half in enumerate((first, second)):
            optimizer = make_optimizer(model.parameters(), train)
            for epoch in range(1, train.epochs + 1):
                train_epoch(model, optimizer, half, config, epoch)
                if phase == 1:
                    correct = evaluate(model, first.images, first.label, index=first.index).correct
                    wrong.append(~correct.cpu().numpy())
                bar.update()
    return first_epoch_for_good(np.stack(wrong))


def forgetting_measurement(run: Run) -> Measurement:
    return Measurement(run, SECOND_SPLIT, {})


def measure_forgetting(run: Run, split: Split) -> None:
    """Train both orders, unless that is done; each is saved when it ends."""
    measurement, device = forgetting_measurement(run), split.label.device
    if measurement.finished:
        return
    parts = halves(split.n, run.config.seed)
    forgotten = np.zeros(split.n, dtype=int)
    for order, (own, other) in {"first": parts, "second": parts[::-1]}.items():
        times = measurement.part(order)
        if times is None:
            with compute_precision(run.config.precision, device):
                times = compute_forgetting(run.config, split, own, other).tolist()
            measurement.save(order, times)
        forgotten[own.numpy()] = times
    rows = zip(split.index.tolist(), forgotten.tolist())
    measurement.finish((dict(zip(SECOND_SPLIT.columns, row)) for row in rows), device)


def read_forgetting(run: Run) -> np.ndarray:
    """The forgetting time of every training example, in order."""
    rows = SECOND_SPLIT.read(run.directory)
    return np.array([row["forgotten"] for row in rows])
