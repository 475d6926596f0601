"""Stopping early without losing work: a time budget, and signals that ask to end.

All files are written whole, so that a program may end anywhere; these two ways lose the least work,
and say how to resume.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# A cluster sends SIGUSR1 as a warning before it takes a machine away, a closed terminal SIGHUP.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class OutOfTime(Exception):
    """The time budget is spent; all finished work is on disk."""


class Terminated(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, it must not be swallowed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def time_budget(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTime inside, at the first safe point after this many seconds."""
    if seconds is None:
        yield
        return
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def time_left() -> float:
    """Return the remaining seconds of the time budget; infinity without one."""
    return _deadline.get() - time.monotonic()


def safe_point(next_piece: float = 0.0) -> None:
    """Stop here if the next piece of work, of this many seconds, exceeds the budget.

    Everything is saved, or is saved when the training exits (engine/training/background.py).
    """
    if next_piece > time_left():
        raise OutOfTime


@contextmanager
def _handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    # A process that was started with nohup goes on when its terminal is closed.
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    numbers = [number for number in ENDING_SIGNALS if number not in ignored]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turn signals that ask to end into exceptions, so that everything is cleaned up."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    with _handling_signals(end):
        yield


@contextmanager
def finishing_steps() -> Iterator[Callable[[], bool]]:
    """Let a signal only set a flag inside, for the code there to test, save and return.

    The signal takes effect on exit; a second one takes effect at once.
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
