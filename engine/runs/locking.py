"""A lock on a folder: one process at a time, on one machine or on many that share a file system.

The lock is a file in the folder that names its holder (host, pid, start), for people and programs.
It is created in one atomic step, which network file systems have too (and file locks often not),
and its holder touches it every few seconds. The lock of a dead holder is taken over: on the same
machine the holder's pid tells, from another host a file that was long not touched does.
"""

import errno
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile

from engine.errors import RunFailed
from engine.runs.stopping import safe_point

FILE_NAME = "claim.json"
BEAT = 10.0  # seconds between signs of life
DEAD_AFTER = 180.0  # seconds without one, for a holder on another host
UNREADABLE_AFTER = 2.0  # seconds in which a damaged lock may still be being written
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a folder in which nothing can be written
TOKEN_SHOWN = 12  # characters of a lock's token in the names of temporary files
POLL = 1.0  # seconds between two looks at a lock that is waited for

# Folders that this process holds, and the content of their locks.
_own: dict[Path, "Holder"] = {}


class Held(RunFailed):
    """Another process holds the lock. A caller may wait, or continue with other work."""

    def __init__(self, by: "Holder") -> None:
        super().__init__(f"held by {by}; wait for it (--wait) or end it")
        self.by = by


def _machine() -> str:
    """Name the space in which a pid is unique: this boot of this kernel, this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _birth(pid: int) -> str | None:
    """Return the start time of a process of this machine, "" if unknown, None if it is dead.

    A pid may have been reused, also by another user, or belong to a dead process that its parent
    did not reap.
    """
    try:
        with suppress(PermissionError):  # alive, but another user's
            os.kill(pid, 0)
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except OSError:  # a system that hides others' processes, or without /proc
        return ""
    return None if state in "ZX" else rest[18]


@dataclass(frozen=True)
class Holder:
    """The holder of a lock, as its file describes it."""

    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"
    machine: str = ""
    birth: str = ""
    token: str = ""
    seen: float = 0.0  # when the file was last touched: not part of its content
    hidden: bool = False  # the file may not be read by this user: not part of its content

    def __str__(self) -> str:
        if self.hidden:
            return "another user's process"
        return f"process {self.pid} on {self.host} since {self.since}"

    @classmethod
    def me(cls) -> "Holder":
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        birth = _birth(os.getpid()) or ""
        return cls(socket.gethostname(), os.getpid(), since, _machine(), birth, uuid.uuid4().hex)

    @classmethod
    def of(cls, path: Path) -> "Holder | None":
        """Read a lock's file; without a pid if it is damaged, hidden or still being written."""
        seen = 0.0
        try:
            seen = path.stat().st_mtime
            found = cls(**json.loads(path.read_bytes()), seen=seen) if path.is_file() else None
        except FileNotFoundError:
            return None
        except PermissionError:
            return cls(seen=seen, hidden=True)
        except (ValueError, TypeError, RecursionError):
            found = None
        return found if found and found._possible() else cls(seen=seen)

    def _possible(self) -> bool:
        words = (self.host, self.since, self.machine, self.birth, self.token)
        printable = all(isinstance(word, str) and word.isprintable() for word in words)
        return printable and type(self.pid) is int and 0 < self.pid < 2**31

    def write(self, path: Path) -> None:
        """Create the lock's file; raise FileExistsError if there is one."""
        content = {k: v for k, v in asdict(self).items() if k not in ("seen", "hidden")}
        with open(path, "x", encoding="utf-8") as file:
            try:
                json.dump(content, file, indent=2)
                file.flush()
            except OSError as error:  # a full disk
                path.unlink()
                raise OSError(error.errno, error.strerror, str(path)) from None

    def alive(self, folder: Path) -> bool:
        if self.machine == _machine():
            return _birth(self.pid) in (self.birth, "")
        try:
            with TemporaryFile(dir=folder) as file:  # by the file system's clock, which all share
                now = os.fstat(file.fileno()).st_mtime
        except OSError as error:
            if error.errno not in CLOSED:
                raise
            now = time.time()
        silent = now - self.seen
        return silent < (DEAD_AFTER if self.pid or self.hidden else UNREADABLE_AFTER)


def holder_of(directory: Path) -> Holder | None:
    """Return the living holder of a folder's lock, if there is one."""
    holder = Holder.of(directory / FILE_NAME)
    return holder if holder and holder.alive(directory) else None


def known_holder(directory: Path) -> Holder | None:
    """Return the living holder of a folder's lock; None too where the disk does not tell."""
    with suppress(OSError):
        return holder_of(directory)
    return None


@contextmanager
def lock(directory: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder's lock; raise Held if another process holds it.

    Temporary files of a dead holder are removed. Missing folders are made, and removed again if
    they stay empty. A folder in which nothing can be written needs no lock. Only the main thread
    may take a lock.
    """
    own, path = Holder.me(), directory / FILE_NAME
    with _folder(directory) as was_there:
        showing_life = _holding(path, own)
        try:
            held = _acquire(path, own, wait)
        except OSError as error:
            if error.errno not in CLOSED or not was_there:
                raise
            held, showing_life = None, nullcontext()
        if held:
            raise Held(held)
        with showing_life:
            yield


def is_held(directory: Path) -> bool:
    """Return True if this process holds the folder."""
    return directory.absolute() in _own


def temporary_path(path: Path) -> Path:
    """Name the temporary file that becomes `path`, after the lock or the process that writes it."""
    held = _lock_over(path)
    token = held[1].token[:TOKEN_SHOWN] if held else _process_token(Holder.me())
    return path.with_name(f".{path.name}.{token}.tmp")


def remove_dead_temporaries(path: Path) -> None:
    """Remove what dead processes of this machine left of `path` when they wrote without a lock."""
    if _lock_over(path):  # taking the lock removed them
        return
    me = re.escape(_process_token(Holder(machine=_machine())).partition("-")[0])
    left = re.compile(rf"\.{re.escape(path.name)}\.{me}-(\d{{1,9}})-(\d*)\.tmp")
    for name in os.listdir(path.parent):
        if (found := left.fullmatch(name)) and _birth(int(found[1])) not in (found[2], ""):
            with suppress(OSError):
                path.with_name(name).unlink()


def _process_token(process: "Holder") -> str:
    """Name a process in a temporary file, so that others can tell whether it is dead."""
    machine = hashlib.sha256(process.machine.encode()).hexdigest()[:TOKEN_SHOWN]
    return f"{machine}-{process.pid}-{process.birth}"


def require_held(path: Path) -> None:
    """Refuse to write below a folder that this process held and lost to another process."""
    if held := _lock_over(path):
        folder, own = held
        if not _is(folder / FILE_NAME, own):
            raise _lost(folder / FILE_NAME)


def _lock_over(path: Path) -> tuple[Path, "Holder"] | None:
    """Find the innermost folder that this process holds and `path` lies in."""
    return next(((p, _own[p]) for p in path.absolute().parents if p in _own), None)


def _remove_leftovers(folder: Path, dead: "Holder") -> None:
    """Remove the temporary files that a dead holder of the folder left, and no others."""
    if re.fullmatch("[0-9a-f]{32}", dead.token):
        for place, _, names in os.walk(folder):
            for name in names:
                if name.startswith(".") and name.endswith(f".{dead.token[:TOKEN_SHOWN]}.tmp"):
                    with suppress(OSError):
                        os.unlink(os.path.join(place, name))


@contextmanager
def _folder(folder: Path) -> Iterator[bool]:
    """Yield whether a folder exists; remove parents that were missing, if they are empty."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        yield not missing
    finally:
        with suppress(OSError):
            for part in missing:
                part.rmdir()


def _acquire(path: Path, own: Holder, wait: bool) -> Holder | None:
    """Take the lock, or return its holder."""
    said = False
    while held := _try(path, own):
        if not wait:
            return held
        if not said:
            print(f"{path.parent}: waiting for {held}", file=sys.stderr)
        said = True
        time.sleep(POLL)
        safe_point()
    return None


def _try(path: Path, own: Holder) -> Holder | None:
    """Return None if the lock is ours now, else its holder."""
    held, missing, deadline = None, None, time.monotonic() + UNREADABLE_AFTER + 1
    while time.monotonic() < deadline:  # the next round sees a change between two steps
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write(path)
            _remove_dead_guard(path)
            return None
        except FileNotFoundError as error:  # another process removed the folder, which was empty
            missing = error
            time.sleep(0.01)
        except FileExistsError:
            if found := Holder.of(path):
                held = found
                if not held.alive(path.parent):
                    _bury(path, held)
                elif held.pid or held.hidden:
                    return held
                else:  # being written right now, or damaged: dead in a moment
                    time.sleep(0.01)
    if held is None and missing is not None:
        raise missing  # the folder cannot be made
    return held or Holder()


def _bury(path: Path, dead: Holder) -> None:
    """Remove the lock of a dead holder, and never one that another process made since.

    Before it removes the lock, a process creates a file that only one process can create.
    """
    guard = _guard(path)
    try:
        Holder.me().write(guard)
    except FileExistsError:
        _remove_dead_guard(path)
        time.sleep(0.02)
        return
    try:
        if Holder.of(path) == dead:
            _remove_leftovers(path.parent, dead)
            path.unlink()
    finally:
        guard.unlink(missing_ok=True)


def _guard(path: Path) -> Path:
    return path.with_name(f"{path.name}.burial")


def _remove_dead_guard(path: Path) -> None:
    """Remove the file of a process that died while it removed a lock."""
    guard = _guard(path)
    maker = Holder.of(guard)
    if maker and not maker.alive(path.parent):
        guard.unlink(missing_ok=True)


def _is(path: Path, own: Holder) -> bool:
    found = Holder.of(path)
    return found is not None and found.token == own.token


def _lost(path: Path) -> RunFailed:
    return RunFailed(f"{path}: lock lost; now held by {Holder.of(path) or 'no process'}")


@contextmanager
def _holding(path: Path, own: Holder) -> Iterator[None]:
    """Touch the lock now and then, and remove it in the end.

    A process that lost the lock, by sleeping too long, is interrupted and must not write any more.
    """
    end, lost = threading.Event(), threading.Event()

    def beat() -> None:
        while not end.wait(BEAT):
            with suppress(OSError):  # a network file system that is away for a while
                if not _is(path, own):
                    lost.set()
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    return
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    _own[path.parent.absolute()] = own
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise _lost(path) from None
    finally:
        del _own[path.parent.absolute()]
        end.set()
        thread.join()
        with suppress(OSError):  # a lock left behind is a dead process's
            if _is(path, own):
                path.unlink()
