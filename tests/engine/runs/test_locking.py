"""The lock on a folder: one process at a time, whatever happens to the others."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import RunFailed
from engine.runs import files, locking
from engine.runs.locking import Held, Holder, holder_of, lock

REPOSITORY = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from engine.runs.locking import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys
from pathlib import Path
from engine.runs import files, locking
locking.POLL = 0.001
counter = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with locking.lock(counter.parent / "folder", wait=True):
        value = int(counter.read_text())
        counter.write_text(str(value + 1))
"""


def start(code: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def other(tmp_path):
    """A living process that holds tmp_path/run."""
    process = start(HOLD, tmp_path / "run")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_second_process_learns_who_holds_it(other, tmp_path):
    with pytest.raises(Held) as caught, lock(tmp_path / "run"):
        raise AssertionError("both got in")
    holder = caught.value.by
    assert holder.pid == other.pid
    assert str(caught.value).startswith(f"held by process {other.pid} on {holder.host} since 20")
    assert holder_of(tmp_path / "run") == holder
    with lock(tmp_path / "another run"):
        pass


@pytest.mark.parametrize("reaped", [True, False], ids=["dead", "dead, its parent does not know"])
def test_a_dead_process_is_taken_over(other, tmp_path, reaped):
    other.send_signal(signal.SIGKILL)
    if reaped:
        other.wait()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / "run" / "claim.json").exists()
    assert holder_of(tmp_path / "run") is None
    with lock(tmp_path / "run"):
        assert holder_of(tmp_path / "run").pid == os.getpid()


def test_a_pid_that_became_another_processs_is_a_dead_one(other, tmp_path):
    path = tmp_path / "run" / "claim.json"
    rewrite(path, birth="1")
    with lock(tmp_path / "run"):
        assert holder_of(tmp_path / "run").pid == os.getpid()


def test_another_hosts_process_lives_as_long_as_it_shows_life(other, tmp_path):
    path = tmp_path / "run" / "claim.json"
    rewrite(path, machine="another", host="node7", pid=1)
    with pytest.raises(Held, match=r"process 1 on node7"), lock(tmp_path / "run"):
        pass
    long_ago = time.time() - locking.DEAD_AFTER - 1
    os.utime(path, (long_ago, long_ago))
    with lock(tmp_path / "run"):
        assert holder_of(tmp_path / "run").pid == os.getpid()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"pid": -1}', '{"pid": 1, "host": "two\\nlines"}', '{"pid": "../x"}'],
)
def test_a_damaged_lock_is_taken_over_as_soon_as_it_cannot_be_being_written(
    tmp_path, monkeypatch, content
):
    monkeypatch.setattr(locking, "UNREADABLE_AFTER", 0.3)
    path = tmp_path / "claim.json"
    path.write_text(content)
    began = time.monotonic()
    with lock(tmp_path):
        assert holder_of(tmp_path).pid == os.getpid()
        assert time.monotonic() - began > 0.2, "another process might just have been writing it"


def test_a_lock_that_may_not_be_read_is_alive_as_long_as_its_holder_touches_it(
    tmp_path, monkeypatch
):
    """Another user's, in a folder that both may write to."""
    path = tmp_path / "claim.json"
    path.write_text("{}")

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert locking.BEAT > locking.UNREADABLE_AFTER
    now = time.time()
    for age, alive in ((0, True), (locking.BEAT, True), (locking.DEAD_AFTER + 1, False)):
        os.utime(path, (now - age, now - age))
        assert (holder_of(tmp_path) is not None) == alive
    monkeypatch.setattr(Path, "stat", refuse)
    assert holder_of(tmp_path) is None


@pytest.mark.parametrize(("number", "told"), [(errno.EROFS, True), (errno.EIO, False)])
def test_a_lock_in_a_closed_folder_is_judged_by_this_machines_clock(
    tmp_path, monkeypatch, number, told
):
    Holder("elsewhere", 1, "today", "another machine").write(path := tmp_path / "claim.json")

    def refuse(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locking, "TemporaryFile", refuse)
    if told:
        assert holder_of(tmp_path).host == "elsewhere"
        os.utime(path, (0, 0))
        assert holder_of(tmp_path) is None
    else:
        with pytest.raises(OSError, match="Input/output"):
            holder_of(tmp_path)


def test_a_reused_pid_of_another_user_is_a_dead_one(other, tmp_path, monkeypatch):
    """The start time, which every user may read, tells; a signal may not be sent."""

    def refuse(pid, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert holder_of(tmp_path / "run").pid == other.pid
    rewrite(tmp_path / "run" / "claim.json", birth="1")
    assert holder_of(tmp_path / "run") is None


def test_a_lock_that_is_being_written_is_read_when_it_is_whole(other, tmp_path):
    path = tmp_path / "run" / "claim.json"
    content = path.read_text()
    path.write_text("")
    writing = threading.Timer(0.1, path.write_text, [content])
    writing.start()
    with pytest.raises(Held, match=f"process {other.pid} on"), lock(tmp_path / "run"):
        pass
    writing.join()


def test_a_holder_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "BEAT", 0.01)
    with lock(tmp_path):
        os.utime(tmp_path / "claim.json", (0, 0))
        deadline = time.monotonic() + 10
        while Holder.of(tmp_path / "claim.json").seen < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_process_that_lost_the_lock_stops_and_leaves_the_new_holder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "BEAT", 0.05)

    def sleep_too_long():
        with lock(tmp_path):
            rewrite(tmp_path / "claim.json", token="of another", pid=1)
            time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    try:
        with pytest.raises(RunFailed, match="lock lost; now held by process 1 on"):
            sleep_too_long()
    finally:
        signal.signal(signal.SIGINT, before)
    assert Holder.of(tmp_path / "claim.json").token == "of another"


def test_many_at_once_lose_no_count(other, tmp_path):
    """Also when the first of them finds a dead process's lock."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    (tmp_path / "run").rename(tmp_path / "folder")
    other.send_signal(signal.SIGKILL)
    other.wait()
    processes = [start(COUNT, counter, 40) for _ in range(4)]
    assert [process.wait(timeout=240) for process in processes] == [0] * 4
    assert counter.read_text() == "160"


def test_only_what_the_dead_holder_was_writing_is_removed(other, tmp_path):
    """Strangers' files stay, and those of a living process in a folder below."""
    run = tmp_path / "run"
    token = json.loads((run / "claim.json").read_text())["token"]
    (run / "checkpoints").mkdir()
    half = run / "checkpoints" / f".epoch_003.pt.{token[:12]}.tmp"
    others = [run / ".thesis.docx.tmp", run / "checkpoints" / ".epoch_004.pt.0123456789ab.tmp"]
    for path in [half, *others]:
        path.touch()
    other.send_signal(signal.SIGKILL)
    other.wait()
    with lock(run):
        assert not half.exists()
        assert all(path.exists() for path in others)


def test_a_lock_on_a_folder_leaves_all_temporary_files_below_it(tmp_path):
    """A data folder may be a home directory, with trainings below it."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    strangers = [tmp_path / ".thesis.docx.tmp", tmp_path / "runs" / "a" / ".record.pt.1a2b3c4d.tmp"]
    for path in strangers:
        path.touch()
    with lock(tmp_path):
        pass
    assert all(path.exists() for path in strangers)


def test_temporary_files_carry_the_token_of_the_lock(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "replace", lambda source, path: names.append(Path(source).name))
    with lock(tmp_path):
        token = Holder.of(tmp_path / "claim.json").token
        files.write_text(tmp_path / "parts" / "a.txt", "content")
    assert names == [f".a.txt.{token[:12]}.tmp"]


DIE_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from engine.runs import files
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_text(Path(sys.argv[1]), "half")
"""


def test_what_a_dead_process_wrote_without_a_lock_is_removed_by_the_next_write(tmp_path):
    """A figure has no lock: its temporary file names the process, which is dead."""
    figure = tmp_path / "figure.png"
    assert start(DIE_WHILE_WRITING, figure).wait() == -signal.SIGKILL
    (half,) = tmp_path.iterdir()
    pid = f"-{os.getpid()}-{locking._birth(os.getpid())}."
    of_a_living = tmp_path / re.sub(r"-\d+-\d+\.", pid, half.name)
    others = [tmp_path / ".figure.png.0123456789ab-1-1.tmp", tmp_path / ".figure.png.tmp"]
    of_another_file = tmp_path / half.name.replace("figure", "other")
    for path in [of_a_living, of_another_file, *others]:
        path.touch()
    files.write_text(figure, "whole")
    assert not half.exists()
    assert not of_a_living.exists(), "this process wrote it, and renamed it"
    assert all(path.exists() for path in [of_another_file, *others])


def test_what_another_living_process_writes_stays(other, tmp_path):
    figure = tmp_path / "figure.png"
    writer = locking._process_token(Holder.of(tmp_path / "run" / "claim.json"))
    half = tmp_path / f".figure.png.{writer}.tmp"
    half.touch()
    files.write_text(figure, "whole")
    assert half.exists()
    other.kill()
    other.wait()
    files.write_text(figure, "whole")
    assert not half.exists()


def test_a_process_that_died_while_it_removed_a_lock_leaves_nothing(other, tmp_path):
    guard = tmp_path / "run" / "claim.json.burial"
    (tmp_path / "run" / "claim.json").rename(guard)
    with lock(tmp_path / "run"):
        assert guard.exists(), "it is alive"
    other.kill()
    other.wait()
    with lock(tmp_path / "run"):
        assert not guard.exists()


def test_a_process_that_lost_the_lock_writes_nothing_more(tmp_path):
    with lock(tmp_path):
        files.write_text(tmp_path / "table.csv", "mine")
        rewrite(tmp_path / "claim.json", token="of another", pid=1)
        with pytest.raises(RunFailed, match="lock lost; now held by process 1 on"):
            files.write_text(tmp_path / "table.csv", "late")
    assert (tmp_path / "table.csv").read_text() == "mine"


def test_a_lock_lost_while_a_file_is_written_gives_it_no_name(tmp_path, monkeypatch):
    fsync = os.fsync

    def lose(descriptor):
        rewrite(tmp_path / "claim.json", token="of another", pid=1)
        fsync(descriptor)

    with lock(tmp_path):
        monkeypatch.setattr(os, "fsync", lose)
        with pytest.raises(RunFailed, match="lock lost"):
            files.write_text(tmp_path / "table.csv", "late")
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]


def test_nothing_is_left_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "runs" / "a" / "seed0"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with lock(tmp_path / "runs" / "a" / "seed0"):
        (tmp_path / "runs" / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    def refuse(self, path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Holder, "write", refuse)
    with lock(tmp_path):
        assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="Read-only"), lock(tmp_path / "new"):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder like /proc")
def test_a_folder_that_cannot_be_made_is_not_held_by_another(monkeypatch):
    monkeypatch.setattr(locking, "UNREADABLE_AFTER", -0.9)
    with pytest.raises(FileNotFoundError), lock(Path("/proc/no/such/folder")):
        pass
