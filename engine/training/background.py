"""Writing in the background: a program goes on while a thread saves what it did."""

from collections.abc import Callable
from concurrent import futures
from types import TracebackType


class BackgroundWriter:
    """One thread, which does one piece of work at a time; at most one waits to be done.

    What a piece raises comes out, as it is, where it is waited for: when the next piece is handed
    over, or at the end. Leaving the context waits whatever happened inside, so that nothing is
    written any more; if that work failed, its error replaces later ones, which it came before.
    """

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(1, "writer")
        self._pending: futures.Future | None = None

    def hand_over(self, write: Callable[[], object]) -> None:
        """Begin a piece of work as soon as the one before it is done."""
        self.wait()
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Until all that was handed over is done."""
        if self._pending is not None:
            futures.wait([self._pending])  # a signal may end this, and the error is not lost
            done, self._pending = self._pending, None
            done.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._pool:  # which waits for its thread, even if a signal ends the line below
            self.wait()
