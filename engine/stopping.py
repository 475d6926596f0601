"""Ending early without losing anything: a budget of time, and signals that ask to end.

All files are written whole, so a program may end anywhere; these two ends lose the least work, and
say how to go on.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
    """All is saved; end here if the next piece of work, of so many seconds, would be too much."""
    if next_piece > time_left():
        raise OutOfTime


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 (a cluster's warning before it takes a machine away) end the program."""

    def end(number: int, frame: object) -> None:
        raise Terminated(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
