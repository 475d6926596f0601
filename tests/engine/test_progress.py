"""Progress of one piece of work: plain lines without a terminal, a bar that fits one."""

import io
import os
import re

import pytest

from engine import progress
from engine.progress import progress_bar, with_progress


def test_without_a_terminal_there_is_a_line_at_the_start_and_each_half_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress_bar("a run", 100, "step", initial=20) as bar:
        for _ in range(40):
            clock[0] += 1
            bar.update()
            bar.set_postfix({"clean": "90%"})
    assert capsys.readouterr().err.splitlines() == [
        "a run: 20% (20/100 step) 00:00 elapsed",
        "a run: 50% (50/100 step) 00:30 elapsed, ~00:50 remaining, clean 90%",
    ]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_long_name_leaves_room_for_the_bar(monkeypatch, columns):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: size)
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress_bar("a-run-with-a-long-name/" * 9, 10, "step") as bar:
        bar.ncols, bar.dynamic_ncols = columns, None
        bar.update(5)
        bar.set_postfix({"clean": "99.9%", "noisy": "10.0%", "test": "95.0%"})
    last = [part for part in re.split(r"[\r\n]", terminal.getvalue()) if "5/10" in part][-1]
    assert re.search(r" 50%\|.{4,}\|", last)
    assert len(last) <= columns
    assert ("noisy" in last) == (columns == 120)


def test_items_pass_unchanged(capsys):
    assert list(with_progress(iter("abc"), "letters", 3, "letter")) == ["a", "b", "c"]
