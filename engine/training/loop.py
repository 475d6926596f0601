"""The one training loop: SGD under a schedule, with everything recorded after every epoch.

The files of an epoch are written in an order that a kill at any moment cannot hurt: first the
weights (`checkpoints/`), then what resuming takes (`resume/`), then the tables for people, which
are made from the same record. A training resumes from the newest epoch that has both. A background
thread writes copies while the next epoch trains.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Batch, Split, batch_rows
from engine.config.schema import Config, TrainConfig
from engine.errors import RunFailed
from engine.progress import PlainLines, progress_bar
from engine.runs import files, provenance
from engine.runs.identity import deciding_settings, title
from engine.runs.run import Run, images_digest
from engine.runs.stopping import finishing_steps, safe_point
from engine.runs.tables import LAYERS
from engine.training import resume
from engine.training.background import BackgroundWriter
from engine.training.build import load_split
from engine.training.compiling import compiled
from engine.training.devices import compute_precision, require_precision
from engine.training.epoch import Diverged, Position, diverged, learning_rate, walk_epoch
from engine.training.record import Accountant, PlainBackward, Record, plain_backward
from models.dropout import examples, tied_layers
from models.layer_groups import StagedModel, layer_groups


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    config: Config,
    epoch: int,
    backward: Callable[[Tensor, Batch], None] = plain_backward,
    after_step: Callable[[], object] = lambda: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    start: Position | None = None,
) -> Position | None:
    """Train on every example once; return the position if asked to stop before the end."""
    tied = nn.ModuleList(tied_layers(model))  # found here, once, and not at every step
    model.train()
    with walk_epoch(split, config, epoch, asked_to_stop, start) as walk:
        for batch in walk:
            for group in optimizer.param_groups:
                group["lr"] = walk.learning_rate
            with examples(tied, batch.index):
                logits = model(batch.image).float()
            losses = F.cross_entropy(logits, batch.label, reduction="none")
            optimizer.zero_grad(set_to_none=True)
            backward(losses, batch)
            optimizer.step()
            walk.note(losses)
            after_step()
    return walk.stopped_at


# ---------------------------------------------------------------- one run


def write_epoch(
    run: Run,
    epoch: int,
    state: Mapping[str, object],
    record: Record,
    accounting: type[Accountant],
) -> None:
    """Write all files of an epoch: what resuming takes, then the tables."""
    resume.save_epoch(run, epoch, state, record)
    for write in record.tables(run, accounting).values():
        write()


def make_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.SGD:
    """Return SGD, whose learning rate is set at every step.

    Not torch's fused kernel: it computes wrong numbers, without an error, where a gradient does not
    lie in memory as its weight does, which autograd does not exclude.
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
    accounting: type[Accountant] = PlainBackward,
) -> None:
    """Train a run to its end, from scratch or from where it was interrupted."""
    require_precision(run.config, device)
    run.write_settings(split)
    LAYERS.write(run.directory, layer_rows(model))
    record = Record()
    if _train_epochs(run, split, model, device, record, accounting(model)):
        _finish(run, record, accounting)


def _record_start(run: Run, split: Split, device: torch.device, epoch: int, resumed: bool) -> None:
    """Append this start to the provenance of the run, and report what changed since the last."""
    source = provenance.describe(device, run.config.precision)
    starts, start = run.starts(), provenance.describe_start(source, epoch)
    if starts and resumed:
        provenance.report_changes(starts[-1], start)
    source |= {
        "identity": run.identity,
        "settings": deciding_settings(run.config),
        "images": images_digest(split),
        "starts": [*starts, start],
        "finished": False,
    }
    files.write_json(run.provenance_path, source)


def _train_epochs(
    run: Run,
    split: Split,
    model: nn.Module,
    device: torch.device,
    record: Record,
    accountant: Accountant,
) -> bool:
    """Train and save the remaining epochs; return False if asked to stop before the last one."""
    config, train = run.config, run.config.train
    optimizer = make_optimizer(model.parameters(), train)
    last = resume.resume_epoch(run, model, optimizer, record)
    start = resume.resume_within(run, last + 1, model, optimizer, accountant.sums)
    _record_start(run, split, device, last + 1, resumed=last >= 0 or start is not None)
    began = time.perf_counter() - record.seconds
    steps = len(batch_rows(split.n, train.batch_size))
    with (
        _progress(run, max(last, 0) * steps + (start.done if start else 0), steps) as bar,
        compute_precision(config.precision, device),
        compiled(model, train.compile) as network,
        finishing_steps() as asked_to_stop,
        BackgroundWriter() as writer,
        _with_advice(train),
    ):
        for epoch in range(last + 1, train.epochs + 1):
            rate, started = 0.0, time.perf_counter()
            if epoch > 0:
                backward, control = accountant.backward, (bar.update, asked_to_stop, start)
                stopped = train_epoch(network, optimizer, split, config, epoch, backward, *control)
                if stopped:
                    _require_finite_weights(model, epoch, stopped, steps, train)
                    writer.wait()  # the epoch before removes what an earlier stop left behind
                    resume.save_within(run, epoch, model, optimizer, accountant.sums, stopped)
                    return False
                start, rate = None, learning_rate(epoch * steps - 1, steps, train)
                record.accounts += accountant.epoch_rows(epoch)
            row = record.measure(network, split, epoch, rate)
            if epoch > 0 and not math.isfinite(row["loss_total"]):
                raise diverged(row["loss_total"], epoch, steps - 1, steps, train)
            record.seconds = time.perf_counter() - began
            copies = resume.snapshot(model, optimizer), record.snapshot()
            writer.hand_over(partial(write_epoch, run, epoch, *copies, type(accountant)))
            bar.set_postfix({k: f"{row[f'acc_{k}']:.1%}" for k in ("clean", "noisy", "test")})
            if asked_to_stop():
                return False
            if epoch < train.epochs:
                safe_point(next_piece=time.perf_counter() - started)
    return True


def _progress(run: Run, done: int, steps: int) -> tqdm | PlainLines:
    return progress_bar(
        f"{title(run.config)}: training",
        run.config.train.epochs * steps,
        "step",
        initial=done,
    )


@contextmanager
def _with_advice(train: TrainConfig) -> Iterator[None]:
    """Complete the message of a training that diverged."""
    try:
        yield
    except Diverged as error:
        raise RunFailed(
            f"{error}; epoch {error.epoch - 1} is kept. "
            f"A lower train.peak_lr than {train.peak_lr:g} may help"
            + (", or train.compile=false" if train.compile else "")
        ) from None


def _require_finite_weights(
    model: nn.Module, epoch: int, position: Position, steps: int, train: TrainConfig
) -> None:
    """Refuse to save weights that the last step made infinite, while its loss was still finite."""
    largest = [parameter.detach().abs().max() for parameter in model.parameters()]
    worst = torch.stack(largest).max().item()  # NaN if any is; Python's max would lose it
    if not math.isfinite(worst):
        raise diverged(worst, epoch, position.done - 1, steps, train, name="largest weight")


def _finish(run: Run, record: Record, accounting: type[Accountant]) -> None:
    """Write the results of a finished training; remove what only resuming needed."""
    for write in record.results(run, accounting).values():
        write()
    content = {"identity": run.identity, "epoch": run.config.train.epochs, **vars(record)}
    files.write_tensors(run.record_path, content)
    finished = {"seconds": round(record.seconds, 1), "finished": True}
    finished["files"] = files.digests_of([run.split_path, *record.results(run, accounting)])
    files.write_json(run.provenance_path, files.read_json(run.provenance_path) | finished)
    run.discard(run.resumable_epochs())


def restore_results(run: Run, accounting: type[Accountant] = PlainBackward) -> None:
    """Restore deleted results of a finished training from its record."""
    accounts = accounting.table.name if accounting.table else ""
    missing = run.missing_results(accounts)
    if missing and run.record_path.exists():
        content = run.read_own(run.record_path, run.config.train.epochs)
        record = Record().restore(content)
        results = record.results(run, accounting)
        results[run.split_path] = lambda: run.write_settings(load_split(run.config))
        again = [path for path in missing if path in results]
        for path in again:
            results[path]()
        source = files.read_json(run.provenance_path)
        # Another version of NumPy may write the same arrays in other bytes.
        if (digests := source.get("files", {}) | files.digests_of(again)) != source.get("files"):
            files.write_json(run.provenance_path, source | {"files": digests})
    run.require_intact(accounts)
