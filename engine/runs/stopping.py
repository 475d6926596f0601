"""Ending early without losing anything: a budget of time, and signals that ask to end.

All files are written whole, so a program may end anywhere; these two ends lose the least work, and
say how to go on.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# A cluster sends the last of them as a warning before it takes a machine away.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class OutOfTime(Exception):
    """The time budget is spent, and what was done until now is on disk."""


class Terminated(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, nothing may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def time_budget(seconds: float | None) -> Iterator[None]:
    """What runs inside ends with OutOfTime at the first safe point after so many seconds."""
    if seconds is None:
        yield
        return
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def time_left() -> float:
    """Seconds of the time budget; infinity where there is none."""
    return _deadline.get() - time.monotonic()


def safe_point(next_piece: float = 0.0) -> None:
    """End here if the next piece of work, of so many seconds, would be too much.

    All is saved, or is saved on the way out of the training (engine/training/background.py).
    """
    if next_piece > time_left():
        raise OutOfTime


@contextmanager
def _handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Signals that ask to end become exceptions, so that everything is cleaned up."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    with _handling_signals(end):
        yield


@contextmanager
def finishing_steps() -> Iterator[Callable[[], bool]]:
    """Inside, a signal only raises a flag: what runs there asks for it, saves, and leaves.

    The signal takes its effect then; a second one does so at once.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    try:
        with _handling_signals(note):
            yield lambda: bool(asked)
    finally:
        if asked:
            signal.raise_signal(asked[0])
