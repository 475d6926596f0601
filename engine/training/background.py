"""Write files in the background, while the program continues."""

from collections.abc import Callable
from concurrent import futures
from types import TracebackType


class BackgroundWriter:
    """Thread that does one piece of work at a time; at most one piece is pending.

    An error of a piece is raised where that piece is waited for: when the next one is handed over,
    or at the end. Leaving the context always waits, so that nothing is written afterwards; the
    error of a piece then replaces later ones.
    """

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(1, "writer")
        self._pending: futures.Future | None = None

    def hand_over(self, write: Callable[[], object]) -> None:
        """Begin a piece of work as soon as the previous one is done."""
        self.wait()
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until everything that was handed over is done."""
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
