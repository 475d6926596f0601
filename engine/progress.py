"""Progress of one piece of work on stderr: a bar in a terminal, else plain lines with the time."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

LINE_INTERVAL = 30.0  # seconds between plain lines
WIDE = 120  # columns of a terminal in which a bar has room for results
Item = TypeVar("Item")


class PlainLines:
    """Stand-in for a tqdm bar that prints a line at the start, then at most every half minute."""

    def __init__(self, name: str, total: int, initial: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.n = self.initial = initial
        self.results = ""
        self.began = self.written = time.monotonic()
        self._print(self.began)

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now - self.written >= LINE_INTERVAL:
            self.written = now
            self._print(now)

    def set_postfix_str(self, results: str, refresh: bool = True) -> None:
        self.results = results

    def set_postfix(self, results: Mapping[str, str]) -> None:
        self.results = ", ".join(f"{name} {value}" for name, value in results.items())

    def _print(self, now: float) -> None:
        share = self.n / self.total if self.total else 1.0
        line = f"{self.name}: {share:.0%} ({self.n}/{self.total} {self.unit})"
        line += f" {tqdm.format_interval(now - self.began)} elapsed"
        if done := self.n - self.initial:
            rest = (now - self.began) * (self.total - self.n) / done
            line += f", ~{tqdm.format_interval(rest)} remaining"
        print(f"{line}, {self.results}" if self.results else line, file=sys.stderr, flush=True)


def progress_bar(name: str, total: int, unit: str, initial: int = 0) -> "tqdm | PlainLines":
    """Make a bar that suits stderr; in a narrow terminal the name is cut and results are left out.

    It vanishes when done if another bar stays above it.
    """
    if not sys.stderr.isatty():
        return PlainLines(name, total, initial, unit)
    columns = shutil.get_terminal_size().columns
    results = "{postfix}" if columns >= WIDE else ""
    most = max(12, columns // 3)
    return tqdm(
        desc=name if len(name) <= most else f"{name[: most - 3]}...",
        total=total,
        initial=initial,
        unit=unit,
        leave=None,
        dynamic_ncols=True,
        mininterval=0.5,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}, "
        f"{{remaining}} remaining{results}",
    )


def with_progress(items: Iterable[Item], name: str, total: int, unit: str) -> Iterator[Item]:
    """Yield the items under a progress bar."""
    with progress_bar(name, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
