"""Save what it takes to resume a training: after a whole epoch, or in the middle of one."""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.runs import files
from engine.runs.run import Run, load_weights
from engine.training.epoch import Position


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Copy a model's weights and their momentum to the CPU, where no later step changes them."""

    def copy_of(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to("cpu", copy=True)

    momentum = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    return {
        "model": {name: copy_of(value) for name, value in model.state_dict().items()},
        "momentum": [copy_of(value) for value in momentum],
    }


def save_epoch(run: Run, epoch: int, state: Mapping[str, object], record: object) -> None:
    """Save an epoch's weights and what resuming takes; keep the epoch before it as a reserve."""
    run.write_checkpoint(epoch, state["model"])
    content = {"identity": run.identity, "epoch": epoch, "momentum": state["momentum"]}
    files.write_tensors(run.resume_path(epoch), content | vars(record))
    run.discard(run.resumable_epochs()[2:])


def resume_epoch(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, record: object
) -> int:
    """Restore the newest epoch whose files are whole and return it; -1 if there is none.

    What is unusable is set aside. A later start would otherwise prefer it to the epochs that this
    one is about to train.
    """
    for epoch in run.resumable_epochs():
        try:
            content = run.read_own(run.resume_path(epoch), epoch)
            state = run.read_checkpoint(epoch)
        except UserError as error:
            print(f"{error}; resuming from the epoch before", file=sys.stderr)
            run.set_aside(epoch)
            continue
        load_weights(model, state, run.checkpoint_path(epoch))
        _set_momentum(model, optimizer, content["momentum"])
        record.restore(content)
        return epoch
    return -1


def save_within(
    run: Run,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: Sequence[Tensor],
    position: Position,
) -> None:
    """Save what resuming in the middle of an epoch takes; keep the epochs before it."""
    content = {
        "identity": run.identity,
        "epoch": epoch,
        **snapshot(model, optimizer),
        "sums": [value.cpu() for value in sums],
        "done": position.done,
        "random": dict(position.random),
    }
    files.write_tensors(run.within_path, content)


def resume_within(
    run: Run, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, sums: Sequence[Tensor]
) -> Position | None:
    """Restore the middle of an epoch that a signal ended there, and return its position."""
    if not run.within_path.exists():
        return None
    try:
        content = run.read_own(run.within_path, epoch)
    except UserError as error:
        print(f"{error}; restarting epoch {epoch}", file=sys.stderr)
        return None
    load_weights(model, content["model"], run.within_path)
    _set_momentum(model, optimizer, content["momentum"])
    for own, saved in zip(sums, content["sums"]):
        own.copy_(saved)
    return Position(content["done"], content["random"])


def _set_momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Sequence[Tensor | None]
) -> None:
    for parameter, momentum in zip(model.parameters(), saved):
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
