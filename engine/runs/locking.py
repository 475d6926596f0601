"""One process at a time in a folder, on one machine or on many that share a file system.

The claim is a file in the folder: who works there (host, pid, since when), for people and programs.
It is created in one atomic step, which network file systems have too (and file locks often not),
and its holder touches it every few seconds. A claim whose holder is dead is taken over: on the same
machine the holder's pid tells, from elsewhere a claim that was long not touched does.
"""

import errno
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
DEAD_AFTER = 180.0  # seconds without one, for a holder that cannot be asked directly
TOKEN_SHOWN = 12  # characters of a claim's token in the names of temporary files
POLL = 1.0  # seconds between two looks at a claim that is waited for


# Folders that this process holds, and what their claims say.
_own: dict[Path, "Holder"] = {}


class Held(RunFailed):
    """Another process works there. A caller may wait, or go on with something else."""

    def __init__(self, by: "Holder") -> None:
        super().__init__(f"held by {by}; wait for it (--wait) or end it")
        self.by = by


def _machine() -> str:
    """Where a pid means what it means here: this boot of this kernel, this space of pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _birth(pid: int) -> str | None:
    """When a process of this machine began, if that can be known; None for a dead one.

    A pid alone may have become another process's, or be that of a dead one whose parent did not
    take notice.
    """
    try:
        os.kill(pid, 0)
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except OSError:  # alive, but another user's, or on a system without /proc
        return ""
    return None if state in "ZX" else rest[18]


@dataclass(frozen=True)
class Holder:
    """Who holds a claim, as its file says."""

    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"
    machine: str = ""
    birth: str = ""
    token: str = ""
    seen: float = 0.0  # when the file was last touched: no part of what it says

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    @classmethod
    def me(cls) -> "Holder":
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        birth = _birth(os.getpid()) or ""
        return cls(socket.gethostname(), os.getpid(), since, _machine(), birth, uuid.uuid4().hex)

    @classmethod
    def of(cls, path: Path) -> "Holder | None":
        """The holder of a claim's file; one of whom only the age is known, if it is damaged."""
        try:
            seen, content = path.stat().st_mtime, path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = cls(**json.loads(content), seen=seen)
        except (ValueError, TypeError, RecursionError):
            found = None
        # Damaged, unless its holder is just about to write it.
        return found if found and found._possible() else cls(seen=seen)

    def _possible(self) -> bool:
        words = (self.host, self.since, self.machine, self.birth, self.token)
        printable = all(isinstance(word, str) and word.isprintable() for word in words)
        return printable and type(self.pid) is int and 0 < self.pid < 2**31

    def write(self, path: Path) -> None:
        """Create the claim's file; FileExistsError if there is one."""
        content = {key: value for key, value in asdict(self).items() if key != "seen"}
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
        with TemporaryFile(dir=folder) as now:  # by the file system's clock, which all share
            return os.fstat(now.fileno()).st_mtime - self.seen < DEAD_AFTER


def holder_of(directory: Path) -> Holder | None:
    """Who works in a folder now."""
    holder = Holder.of(directory / FILE_NAME)
    return holder if holder and holder.alive(directory) else None


@contextmanager
def lock(directory: Path, wait: bool = False) -> Iterator[None]:
    """Nobody else who claims this folder works in it meanwhile; Held if somebody does already.

    What a dead holder did not finish to write is removed. Folders that are missing are made, and
    removed again if nothing came into them. Where nothing can be written no claim is needed. Only
    the main thread may claim.
    """
    own, path = Holder.me(), directory / FILE_NAME
    with _folder(directory) as was_there:
        showing_life = _holding(path, own)
        try:
            held = _acquire(path, own, wait)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not was_there:
                raise
            held, showing_life = None, nullcontext()
        if held:
            raise Held(held)
        with showing_life:
            yield


def is_held(directory: Path) -> bool:
    """Whether this process holds the folder."""
    return directory.absolute() in _own


def temporary_path(path: Path) -> Path:
    """Name the temporary file that becomes `path`, after the claim under which it is written."""
    held = _claim_over(path)
    token = held[1].token if held else uuid.uuid4().hex
    return path.with_name(f".{path.name}.{token[:TOKEN_SHOWN]}.tmp")


def require_held(path: Path) -> None:
    """Refuse to write below a folder that this process held and lost to another process."""
    if held := _claim_over(path):
        folder, own = held
        if not _is(folder / FILE_NAME, own):
            raise _lost(folder / FILE_NAME)


def _claim_over(path: Path) -> tuple[Path, "Holder"] | None:
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
    """A folder, and whether it was there; what was not goes again, if it is empty."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        yield not missing
    finally:
        with suppress(OSError):
            for part in missing:
                part.rmdir()


def _acquire(path: Path, own: Holder, wait: bool) -> Holder | None:
    """Get the claim, or learn who has it."""
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
    """None if it is ours now, else who has it."""
    held = Holder()
    for _ in range(50):  # whatever changes between two steps, the next round sees it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write(path)
            return None
        except FileNotFoundError:  # another's end removed the folder, which was empty
            continue
        except FileExistsError:
            if found := Holder.of(path):
                held = found
                if not held.alive(path.parent):
                    _bury(path, held)
                elif held.pid:
                    return held
                else:  # its holder is about to write it, or it is damaged
                    time.sleep(0.01)
    return held


def _bury(path: Path, dead: Holder) -> None:
    """Remove the claim of a dead holder, and never one that somebody else made since.

    Who removes it must first create a file that only one process can create at a time.
    """
    guard = path.with_name(f"{path.name}.burial")
    try:
        Holder.me().write(guard)
    except FileExistsError:
        undertaker = Holder.of(guard)
        if undertaker and not undertaker.alive(path.parent):
            guard.unlink(missing_ok=True)
        time.sleep(0.02)
        return
    try:
        if Holder.of(path) == dead:
            _remove_leftovers(path.parent, dead)
            path.unlink()
    finally:
        guard.unlink(missing_ok=True)


def _is(path: Path, own: Holder) -> bool:
    found = Holder.of(path)
    return found is not None and found.token == own.token


def _lost(path: Path) -> RunFailed:
    return RunFailed(f"{path} is gone; now held by {Holder.of(path) or 'nobody'}")


@contextmanager
def _holding(path: Path, own: Holder) -> Iterator[None]:
    """Touch the claim now and then, and remove it in the end.

    Who lost it, for having slept too long, must not go on writing.
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
        with suppress(OSError):  # what stays behind is a dead process's claim
            if _is(path, own):
                path.unlink()
