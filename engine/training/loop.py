"""The one training loop: SGD under a schedule, with everything recorded after every epoch.

What an epoch leaves behind is written in an order that a kill at any moment cannot hurt: first the
weights (`checkpoints/`), then all that is needed to go on from there (`resume/`), then the tables
for people, which are made from the same record. The next start goes on from the newest epoch that
has both. A thread of its own writes copies while the next epoch trains.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, Split, batch_rows, batches, epoch_order, file_digest
from engine.config.schema import Config, TrainConfig
from engine.errors import RunFailed
from engine.progress import progress_bar
from engine.runs import files, provenance
from engine.runs.identity import deciding_settings
from engine.runs.run import Run
from engine.runs.stopping import finishing_steps, safe_point
from engine.runs.tables import LAYERS
from engine.training import resume
from engine.training.background import BackgroundWriter
from engine.training.build import load_split
from engine.training.compiling import compiled
from engine.training.devices import (
    compute_precision,
    derive_seed,
    isolated_rng,
    random_states,
    set_random_states,
)
from engine.training.record import Accountant, PlainBackward, Record
from engine.training.resume import Cut
from models.dropout import examples, tied_layers
from models.layer_groups import StagedModel, layer_groups

STEPS_UNSEEN = 50  # on a GPU, where looking at a loss means waiting for it


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
    resume.save_epoch(run, epoch, state, record)
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


def layer_rows(model: StagedModel) -> list[dict[str, object]]:
    """Return number, name and parameters of each layer, for readers of the tables."""
    return [
        {
            "layer": group.index,
            "name": group.name,
            "parameters": sum(p.numel() for p in group.parameters(model).values()),
        }
        for group in layer_groups(model)
    ]


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
    LAYERS.write(run.directory, layer_rows(model))
    source = provenance.describe(device) | {
        "identity": run.identity,
        "settings": deciding_settings(config),
        "finished": False,
    }
    files.write_json(run.provenance_path, source)

    record = Record()
    last = resume.resume_epoch(run, model, optimizer, record)
    cut = resume.resume_within(run, last + 1, model, optimizer, accountant.sums)
    began = time.perf_counter() - record.seconds
    steps = len(batch_rows(split.n, train.batch_size))
    bar = progress_bar(
        f"{run.directory.parent.name[:40]}/{run.directory.name}",
        train.epochs * steps,
        "step",
        initial=max(last, 0) * steps + (cut.done if cut else 0),
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
                resume.save_within(run, epoch, model, optimizer, accountant.sums, here)
                return
            except RunFailed as error:
                raise RunFailed(
                    f"{error}; epoch {epoch - 1} is kept. "
                    f"A lower train.peak_lr than {train.peak_lr:g} may help"
                ) from None
            record.seconds = time.perf_counter() - began
            copies = resume.snapshot(model, optimizer), record.snapshot()
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
    accounts = accountant.table.name if accountant.table else ""
    missing = run.missing_results(accounts)
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
    run.require_intact(accounts)


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: file_digest(path) for path in paths}
