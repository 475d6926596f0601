"""What it takes to go on with a training: after a whole epoch, or in the middle of one."""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.runs import files
from engine.runs.run import Run, load_weights


class Cut(Exception):
    """A place between two steps of an epoch: how many are done, and the random streams there."""

    def __init__(self, done: int, random: dict[str, Tensor]) -> None:
        super().__init__(f"after step {done}")
        self.done, self.random = done, random


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Copies on the CPU of a model's weights and their momentum, which no later step changes."""

    def copy_of(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to("cpu", copy=True)

    momentum = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    return {
        "model": {name: copy_of(value) for name, value in model.state_dict().items()},
        "momentum": [copy_of(value) for value in momentum],
    }


def save_epoch(run: Run, epoch: int, state: Mapping[str, object], record: object) -> None:
    """This epoch's weights and what it takes to go on; the epoch before it stays as a reserve."""
    run.write_checkpoint(epoch, state["model"])
    content = {"identity": run.identity, "epoch": epoch, "momentum": state["momentum"]}
    files.write_tensors(run.resume_path(epoch), content | vars(record))
    run.discard(run.resumable_epochs()[2:])


def resume_epoch(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, record: object
) -> int:
    """Restore the newest epoch whose files are whole; -1 where there is nothing to go on from."""
    for epoch in run.resumable_epochs():
        try:
            content = run.read_own(run.resume_path(epoch), epoch)
            state = run.read_checkpoint(epoch)
        except UserError as error:
            print(f"{error}; going back an epoch", file=sys.stderr)
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
    cut: Cut,
) -> None:
    """What it takes to go on in the middle of an epoch; the epochs before it stay as they are."""
    content = {
        "identity": run.identity,
        "epoch": epoch,
        **snapshot(model, optimizer),
        "sums": [value.cpu() for value in sums],
        **vars(cut),
    }
    files.write_tensors(run.within_path, content)


def resume_within(
    run: Run, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, sums: Sequence[Tensor]
) -> Cut | None:
    """Where this epoch goes on, if a signal ended it in its middle."""
    if not run.within_path.exists():
        return None
    try:
        content = run.read_own(run.within_path, epoch)
    except UserError as error:
        print(f"{error}; epoch {epoch} begins anew", file=sys.stderr)
        return None
    load_weights(model, content["model"], run.within_path)
    _set_momentum(model, optimizer, content["momentum"])
    for own, saved in zip(sums, content["sums"]):
        own.copy_(saved)
    return Cut(content["done"], content["random"])


def _set_momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Sequence[Tensor | None]
) -> None:
    for parameter, momentum in zip(model.parameters(), saved):
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
