"""Measurements of a training, epoch by epoch: accuracies, losses, and accounted gradients."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch, Split
from engine.runs import files
from engine.runs.run import Run
from engine.runs.tables import HISTORY, ResultTable
from engine.training.evaluation import (
    compute_error_norm,
    compute_margin,
    evaluate_split,
    mean_by_subset,
)

PER_EXAMPLE = ("loss", "margin", "error_norm")  # what examples.npz has beside `correct`
LARGEST = 65504  # of float16


def plain_backward(losses: Tensor, batch: Batch) -> None:
    """Plain backward pass, without accounting."""
    losses.mean().backward()


class Accountant(Protocol):
    """Backward pass that sums something up at every step, and reports it after every epoch.

    Implementations are passed as classes; a training makes the instance for its model.
    """

    table: ResultTable | None

    def __init__(self, model: nn.Module) -> None: ...

    def backward(self, losses: Tensor, batch: Batch) -> None:
        """Leave the gradient of losses.mean() in every parameter's .grad."""

    def epoch_rows(self, epoch: int) -> list[dict[str, float]]:
        """Return rows of the file for what was summed up since the last call, and reset it."""

    @property
    def sums(self) -> Sequence[Tensor]:
        """The present sums, to be saved and restored in the middle of an epoch."""


class PlainBackward:
    """Accountant that accounts nothing."""

    table = None
    sums = ()
    backward = staticmethod(plain_backward)

    def __init__(self, model: nn.Module) -> None:
        pass

    def epoch_rows(self, epoch: int) -> list[dict[str, float]]:
        return []


@dataclass
class Record:
    """Everything that a run has measured so far; whole in memory, small on disk."""

    history: list[dict[str, float]] = field(default_factory=list)
    accounts: list[dict[str, float]] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)  # per epoch from 1 on: bits, packed
    loss: list[Tensor] = field(default_factory=list)  # per epoch from 1 on: float16 [n]
    margin: list[Tensor] = field(default_factory=list)  # the same
    error_norm: list[Tensor] = field(default_factory=list)  # the same
    seconds: float = 0.0

    def measure(self, model: nn.Module, split: Split, epoch: int, lr: float) -> dict[str, float]:
        """Evaluate every example, append the results, and return the history's new row."""
        train, test = evaluate_split(model, split)
        row = {"epoch": epoch, "lr": lr}
        row |= mean_by_subset(train.loss, split.memorized, "loss")
        row["loss_test"] = test.loss.double().mean().item()
        row |= mean_by_subset(train.correct, split.memorized, "acc")
        row["acc_test"] = test.correct.double().mean().item()
        self.history.append(row)
        if epoch > 0:
            self.correct.append(torch.from_numpy(np.packbits(train.correct.cpu().numpy())))
            numbers = {
                "loss": train.loss,
                "margin": compute_margin(train.logits, split.label),
                "error_norm": compute_error_norm(train.logits, split.label),
            }
            for name, values in numbers.items():
                getattr(self, name).append(values.clamp(-LARGEST, LARGEST).half().cpu())
        return row

    def snapshot(self) -> "Record":
        """Return a copy to which later epochs add nothing."""
        return Record(**{name: copy.copy(value) for name, value in vars(self).items()})

    def restore(self, content: Mapping[str, object]) -> "Record":
        """Take over what was saved.

        Runs of earlier versions recorded neither margin nor error norm: nan stands for them.
        """
        unknown = [torch.full_like(loss, torch.nan) for loss in content["loss"]]
        for name in vars(self):
            value = content.get(name) if name in PER_EXAMPLE else content[name]
            setattr(self, name, list(unknown) if value is None else value)
        return self

    def tables(self, run: Run, accounting: type[Accountant]) -> dict[Path, Callable[[], None]]:
        """Map each CSV file that training keeps up to date to the function that writes it."""
        found = {run.history_path: partial(HISTORY.write, run.directory, self.history)}
        if accounting.table:
            path = accounting.table.path(run.directory)
            found[path] = partial(accounting.table.write, run.directory, self.accounts)
        return found

    def results(self, run: Run, accounting: type[Accountant]) -> dict[Path, Callable[[], None]]:
        """Map each file of a finished training, except weights, to the function that writes it."""
        examples = {run.examples_path: partial(self.write_examples, run.examples_path)}
        return self.tables(run, accounting) | examples

    def write_examples(self, path: Path) -> None:
        """Write all arrays but those of which an earlier version recorded nothing."""
        bits = torch.stack(self.correct).numpy()
        numbers = {name: torch.stack(getattr(self, name)).numpy() for name in PER_EXAMPLE}
        n = numbers["loss"].shape[1]
        files.write_arrays(
            path,
            epoch=np.arange(1, len(bits) + 1),
            correct=np.unpackbits(bits, axis=1, count=n).astype(bool),
            **{name: v for name, v in numbers.items() if name == "loss" or not np.isnan(v).all()},
        )


def read_examples(run: Run) -> dict[str, np.ndarray]:
    """Read what a training recorded of every example: arrays [epochs, n].

    What an earlier version did not record is nan.
    """
    record = files.read_arrays(run.examples_path, "correct", "loss")
    for name in PER_EXAMPLE[1:]:
        record[name] = np.full_like(record["loss"], np.nan)
    return record | files.read_arrays(run.examples_path, *PER_EXAMPLE[1:], missing=True)
