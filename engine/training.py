"""The one training loop: SGD under a schedule, with everything recorded after every epoch.

What an epoch leaves behind is written in an order that a kill at any moment cannot hurt: first the
weights (`checkpoints/`), then all that is needed to go on from there (`resume/`), then the tables
for people, which are made from the same record. The next start goes on from the newest epoch that
has both. A thread of its own writes copies while the next epoch trains.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Batch, Split, batch_rows, batches, epoch_order, file_digest
from engine import files, provenance, resuming
from engine.background import BackgroundWriter
from engine.compiling import compiled
from engine.devices import (
    compute_precision,
    derive_seed,
    isolated_rng,
    random_states,
    set_random_states,
)
from engine.errors import RunFailed
from engine.evaluation import evaluate_split, mean_by_subset
from engine.resuming import Cut
from engine.runs import HISTORY_COLUMNS, Run, deciding_settings
from engine.settings import Config, TrainConfig
from engine.setup import load_split
from engine.stopping import finishing_steps, safe_point
from models.dropout import examples, tied_layers

STEPS_UNSEEN = 50  # on a GPU, where looking at a loss means waiting for it


class Accountant(Protocol):
    """Takes over the backward pass, and has something to say about every epoch."""

    file_name: str
    columns: tuple[str, ...]

    def backward(self, losses: Tensor, batch: Batch) -> None:
        """Leave in every parameter's .grad the gradient of losses.mean()."""

    def epoch_rows(self, epoch: int) -> list[dict[str, float]]:
        """What was accounted since the last call, as rows of the file."""

    @property
    def sums(self) -> list[Tensor]:
        """What was summed up since then, to be saved and filled in again within an epoch."""


class PlainBackward:
    """The backward pass of everybody who accounts nothing."""

    file_name = ""
    columns = ()
    sums = ()

    def backward(self, losses: Tensor, batch: Batch) -> None:
        losses.mean().backward()

    def epoch_rows(self, epoch: int) -> list[dict[str, float]]:
        return []


def learning_rate(step: int, steps_per_epoch: int, train: TrainConfig) -> float:
    """The rate of a step, counted from 0 over the whole training.

    The last step of `peak_epoch` has `peak_lr`, the last step of all has 0.
    """
    epoch = (step + 1) / steps_per_epoch
    if epoch <= train.peak_epoch:
        return train.peak_lr * epoch / train.peak_epoch
    done = (epoch - train.peak_epoch) / (train.epochs - train.peak_epoch)
    if train.schedule == "warmup_cosine":
        return train.peak_lr * 0.5 * (1 + float(np.cos(np.pi * done)))
    return train.peak_lr * (1 - done)


@dataclass
class Record:
    """All that a run has measured so far; whole in memory, small on disk."""

    history: list[dict[str, float]] = field(default_factory=list)
    accounts: list[dict[str, float]] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)  # per epoch from 1 on: bits, packed
    loss: list[Tensor] = field(default_factory=list)  # per epoch from 1 on: float16 [n]
    seconds: float = 0.0

    def measure(self, model: nn.Module, split: Split, epoch: int, lr: float) -> dict[str, float]:
        """Evaluate every example, and append what comes out."""
        train, test = evaluate_split(model, split)
        row = {"epoch": epoch, "lr": lr}
        row |= mean_by_subset(train.loss, split.memorized, "loss")
        row["loss_test"] = test.loss.double().mean().item()
        row |= mean_by_subset(train.correct, split.memorized, "acc")
        row["acc_test"] = test.correct.double().mean().item()
        self.history.append(row)
        if epoch > 0:
            self.correct.append(torch.from_numpy(np.packbits(train.correct.cpu().numpy())))
            self.loss.append(train.loss.clamp(max=65504).half().cpu())  # float16's largest
        return row

    def snapshot(self) -> "Record":
        """A record to which later epochs add nothing."""
        return Record(**{name: copy.copy(value) for name, value in vars(self).items()})

    def tables(self, run: Run, accountant: Accountant) -> dict[Path, Callable[[], None]]:
        """The CSV files that are kept up to date while a run trains, and what writes each."""
        found = {
            run.history_path: partial(
                files.write_csv, run.history_path, HISTORY_COLUMNS, self.history
            )
        }
        if accountant.columns:
            path = run.directory / accountant.file_name
            found[path] = partial(files.write_csv, path, accountant.columns, self.accounts)
        return found

    def results(self, run: Run, accountant: Accountant) -> dict[Path, Callable[[], None]]:
        """All files but weights that a finished training leaves behind, and what writes each."""
        examples = {run.examples_path: partial(self.write_examples, run.examples_path)}
        return self.tables(run, accountant) | examples

    def write_examples(self, path: Path) -> None:
        bits, loss = torch.stack(self.correct).numpy(), torch.stack(self.loss).numpy()
        files.write_arrays(
            path,
            epoch=np.arange(1, len(bits) + 1),
            correct=np.unpackbits(bits, axis=1, count=loss.shape[1]).astype(bool),
            loss=loss,
        )


# ---------------------------------------------------------------- one epoch


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    config: Config,
    epoch: int,
    backward: Callable[[Tensor, Batch], None],
    after_step: Callable[[], object] = lambda: None,
    asked_to_end: Callable[[], bool] = lambda: False,
    cut: Cut | None = None,
) -> float:
    """One pass over the training set in this epoch's order; the last step's learning rate.

    It ends with a `Cut` after the step in which it was asked to, and goes on from one.
    """
    train, device = config.train, split.label.device
    steps = len(batch_rows(split.n, train.batch_size))
    order = epoch_order(split.n, config.seed, epoch)
    augmenting = None
    if config.data.augment:
        augmenting = torch.Generator().manual_seed(derive_seed("augmentation", config.seed, epoch))
    done = cut.done if cut else 0
    mean_loss = torch.zeros(steps, device=device)
    tied = nn.ModuleList(tied_layers(model))  # found here, once, and not at every step
    model.train()
    with isolated_rng(derive_seed("layer noise", config.seed, epoch), device):
        if cut:
            set_random_states(cut.random, device)
            if augmenting:
                augmenting.set_state(cut.random["augmentation"])
        rest = batches(split, train.batch_size, order, augmenting, first=done)
        for step, batch in enumerate(rest, start=done):
            rate = learning_rate((epoch - 1) * steps + step, steps, train)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with examples(tied, batch.index):
                logits = model(batch.image).float()
            losses = F.cross_entropy(logits, batch.label, reduction="none")
            optimizer.zero_grad(set_to_none=True)
            backward(losses, batch)
            optimizer.step()
            mean_loss[step] = losses.detach().mean()
            if device.type == "cpu" or step % STEPS_UNSEEN == 0:
                _require_finite(mean_loss, epoch, train)
            after_step()
            if asked_to_end():
                random = random_states(device)
                if augmenting:
                    random["augmentation"] = augmenting.get_state()
                raise Cut(step + 1, random)
    _require_finite(mean_loss, epoch, train)
    return learning_rate(epoch * steps - 1, steps, train)


def _require_finite(mean_loss: Tensor, epoch: int, train: TrainConfig) -> None:
    """The mean loss of every step of an epoch; those to come are 0."""
    bad = (~mean_loss.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0])
        raise _diverged(mean_loss[step].item(), epoch, step, len(mean_loss), train)


def _diverged(loss: float, epoch: int, step: int, steps: int, train: TrainConfig) -> RunFailed:
    rate = learning_rate((epoch - 1) * steps + step, steps, train)
    return RunFailed(
        f"the loss became {loss} at epoch {epoch}, step {step + 1} of {steps}, "
        f"learning rate {rate:.4g}"
    )


# ---------------------------------------------------------------- one run


def write_epoch(
    run: Run, epoch: int, state: Mapping[str, object], record: Record, accountant: Accountant
) -> None:
    """All files of an epoch: what it takes to go on, then the tables."""
    resuming.save_epoch(run, epoch, state, record)
    for write in record.tables(run, accountant).values():
        write()


def make_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.SGD:
    """SGD, whose rate is set at every step.

    Not torch's fused kernel: it wants gradients that lie in memory as their weights do, which
    autograd does not promise for those that accounting asks for.
    """
    return torch.optim.SGD(
        parameters, lr=0.0, momentum=train.momentum, weight_decay=train.weight_decay
    )


def train_run(
    run: Run,
    split: Split,
    model: nn.Module,
    device: torch.device,
    accountant: Accountant | None = None,
) -> None:
    """Train a run to its end, from its beginning or from where it was interrupted."""
    config, accountant = run.config, accountant or PlainBackward()
    train = config.train
    optimizer = make_optimizer(model.parameters(), train)
    run.write_settings(split)
    source = provenance.describe(device) | {
        "identity": run.identity,
        "settings": deciding_settings(config),
        "finished": False,
    }
    files.write_json(run.provenance_path, source)

    record = Record()
    last = resuming.resume_epoch(run, model, optimizer, record)
    cut = resuming.resume_within(run, last + 1, model, optimizer, accountant.sums)
    began = time.perf_counter() - record.seconds
    steps = len(batch_rows(split.n, train.batch_size))
    bar = tqdm(
        desc=f"{run.directory.parent.name[:40]}/{run.directory.name}",
        total=train.epochs * steps,
        initial=max(last, 0) * steps + (cut.done if cut else 0),
        unit="step",
        leave=None,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with (
        bar,
        compute_precision(config.precision, device),
        compiled(model, train.compile) as network,
        finishing_steps() as asked_to_end,
        BackgroundWriter() as writer,
    ):
        for epoch in range(last + 1, train.epochs + 1):
            rate, started = 0.0, time.perf_counter()
            try:
                if epoch > 0:
                    control = (bar.update, asked_to_end, cut)
                    backward, cut = accountant.backward, None
                    rate = train_epoch(network, optimizer, split, config, epoch, backward, *control)
                    record.accounts += accountant.epoch_rows(epoch)
                row = record.measure(network, split, epoch, rate)
                if epoch > 0 and not math.isfinite(row["loss_total"]):
                    raise _diverged(row["loss_total"], epoch, steps - 1, steps, train)
            except Cut as here:
                writer.wait()  # the epoch before it removes what an earlier cut left
                resuming.save_within(run, epoch, model, optimizer, accountant.sums, here)
                return
            except RunFailed as error:
                raise RunFailed(
                    f"{error}; epoch {epoch - 1} is kept. "
                    f"A lower train.peak_lr than {train.peak_lr:g} may help"
                ) from None
            record.seconds = time.perf_counter() - began
            copies = resuming.snapshot(model, optimizer), record.snapshot()
            writer.hand_over(partial(write_epoch, run, epoch, *copies, accountant))
            bar.set_postfix({k: f"{row[f'acc_{k}']:.1%}" for k in ("clean", "noisy", "test")})
            if asked_to_end():
                return
            if epoch < train.epochs:
                safe_point(next_piece=time.perf_counter() - started)

    for write in record.results(run, accountant).values():
        write()
    content = {"identity": run.identity, "epoch": train.epochs, **vars(record)}
    files.write_tensors(run.record_path, content)
    finished = {"seconds": round(record.seconds, 1), "finished": True}
    finished["files"] = _digests([run.split_path, *record.results(run, accountant)])
    files.write_json(run.provenance_path, source | finished)
    run.discard(run.resumable_epochs())


def restore_results(run: Run, accountant: Accountant) -> None:
    """What of a finished training's results was deleted, made again from its record."""
    missing = run.missing_results(accountant.file_name)
    if missing and run.record_path.exists():
        content = run.read_own(run.record_path, run.config.train.epochs)
        record = Record(**{name: content[name] for name in vars(Record())})
        results = record.results(run, accountant)
        results[run.split_path] = lambda: run.write_settings(load_split(run.config))
        again = [path for path in missing if path in results]
        for path in again:
            results[path]()
        source = files.read_json(run.provenance_path)
        # Another version of NumPy may write the same arrays in other bytes.
        if (digests := source.get("files", {}) | _digests(again)) != source.get("files"):
            files.write_json(run.provenance_path, source | {"files": digests})
    run.require_intact(accountant.file_name)


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: file_digest(path) for path in paths}
