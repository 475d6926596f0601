"""One pass over the training set: its schedule, its order, and the place where it was stopped."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Batch, Split, batch_rows, batches, epoch_order
from engine.config.schema import Config, TrainConfig
from engine.errors import RunFailed
from engine.training.devices import derive_seed, isolated_rng, random_states, set_random_states

# Steps between two looks at the losses: on a GPU a look means waiting for it.
STEPS_UNSEEN = {"cpu": 1, "cuda": 50}


def learning_rate(step: int, steps_per_epoch: int, train: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 0 over the whole training.

    The last step of `peak_epoch` has `peak_lr`, the last step of all has 0.
    """
    epoch = (step + 1) / steps_per_epoch
    if epoch <= train.peak_epoch:
        return train.peak_lr * epoch / train.peak_epoch
    done = (epoch - train.peak_epoch) / (train.epochs - train.peak_epoch)
    if train.schedule == "warmup_cosine":
        return train.peak_lr * 0.5 * (1 + float(np.cos(np.pi * done)))
    return train.peak_lr * (1 - done)


class Diverged(RunFailed):
    """A training whose loss or weights are no longer finite numbers, in this epoch."""

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


def diverged(
    value: float, epoch: int, step: int, steps: int, train: TrainConfig, name: str = "loss"
) -> Diverged:
    """Return the error for a loss or weight that is not finite after a step of an epoch."""
    rate = learning_rate((epoch - 1) * steps + step, steps, train)
    return Diverged(
        f"the {name} became {value} at epoch {epoch}, step {step + 1} of {steps}, "
        f"learning rate {rate:.4g}",
        epoch,
    )


@dataclass(frozen=True)
class Position:
    """A place between two steps of an epoch: the steps done, and the random states there."""

    done: int
    random: Mapping[str, Tensor]


@contextmanager
def walk_epoch(
    split: Split,
    config: Config,
    epoch: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
    start: Position | None = None,
) -> Iterator["EpochWalk"]:
    """Walk through an epoch with its own random streams; the global ones are restored."""
    walk = EpochWalk(split, config, epoch, asked_to_stop)
    with isolated_rng(derive_seed("layer noise", config.seed, epoch), walk.device):
        if start:
            walk.go_to(start)
        yield walk


class EpochWalk:
    """Iterate over the batches of an epoch; own its order, random states and requests to stop.

    The walk ends after the last step, or after a step during which it was asked to stop; then
    `stopped_at` is the position from which another walk continues with the same numbers. Losses are
    noted at every step, and none but finite ones are walked past: on a CPU at once, on a GPU within
    50 steps, and in any case before the walk ends.
    """

    def __init__(
        self, split: Split, config: Config, epoch: int, asked_to_stop: Callable[[], bool]
    ) -> None:
        self.split, self.config, self.epoch = split, config, epoch
        self.asked_to_stop, self.device = asked_to_stop, split.label.device
        self.steps, self.done = len(batch_rows(split.n, config.train.batch_size)), 0
        self.stopped_at: Position | None = None
        self._augmenting = None
        if config.data.augment:
            seed = derive_seed("augmentation", config.seed, epoch)
            self._augmenting = torch.Generator().manual_seed(seed)
        self._mean_loss = torch.zeros(self.steps, device=self.device)  # 0 for steps to come

    def __iter__(self) -> Iterator[Batch]:
        order = epoch_order(self.split.n, self.config.seed, self.epoch)
        size = self.config.train.batch_size
        for batch in batches(self.split, size, order, self._augmenting, first=self.done):
            yield batch
            if self.done % STEPS_UNSEEN.get(self.device.type, 50) == 0:
                self.require_finite()
            self.done += 1
            if self.asked_to_stop():
                self.require_finite()
                self.stopped_at = Position(self.done, self._random_states())
                return
        self.require_finite()

    @property
    def learning_rate(self) -> float:
        """The rate of the step that comes next."""
        step = (self.epoch - 1) * self.steps + self.done
        return learning_rate(step, self.steps, self.config.train)

    def note(self, losses: Tensor) -> None:
        """Note the losses of the present step's examples."""
        self._mean_loss[self.done] = losses.detach().mean()

    def require_finite(self) -> None:
        """Raise `Diverged`, which names the step, if the mean loss of a step is not finite."""
        bad = (~self._mean_loss.isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            value = self._mean_loss[step].item()
            raise diverged(value, self.epoch, step, self.steps, self.config.train)

    def go_to(self, start: Position) -> None:
        """Continue from a position of this epoch."""
        self.done = start.done
        set_random_states(start.random, self.device)
        if self._augmenting:
            self._augmenting.set_state(start.random["augmentation"])

    def _random_states(self) -> dict[str, Tensor]:
        states = random_states(self.device)
        if self._augmenting:
            states["augmentation"] = self._augmenting.get_state()
        return states
