"""The origin of a result: code, versions, machine, command, time; and every start of a training."""

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.errors import RunFailed
from engine.machine import describe_gpu

REPOSITORY = Path(__file__).resolve().parents[2]
# What decides a training, beside its configuration and its data.
CODE = ("data", "engine", "models", "gradient_accounting.py", "example_tied_dropout.py")

_strict: ContextVar[bool] = ContextVar("strict", default=False)


def _git(*arguments: str) -> str | None:
    """Return git's answer about this checkout; None without git or without a repository."""
    try:
        result = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(device: torch.device, precision: str) -> dict[str, object]:
    """Return where a result comes from: code, versions, device, precision, command, time."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "torchvision", "numpy")},
        },
        "device": describe_device(device),
        "precision": precision,
        **({"gpu": describe_gpu(device)} if device.type == "cuda" else {}),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.get_num_threads()} threads)"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- the starts of a training


@contextmanager
def strict(refuse: bool) -> Iterator[None]:
    """Refuse, inside, to resume a training with other code, versions, device or threads."""
    token = _strict.set(refuse)
    try:
        yield
    finally:
        _strict.reset(token)


def code_digest(places: Iterable[str] = CODE) -> str:
    """SHA-256 of source files, by default of those that decide a training.

    Git does not see what uncommitted files became.
    """
    digest = hashlib.sha256()
    for place in (REPOSITORY / name for name in places):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            name = str(path.relative_to(REPOSITORY))
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def describe_start(source: Mapping[str, object], epoch: int) -> dict[str, object]:
    """Describe a start of a training that computes from this epoch on."""
    return {
        "from_epoch": epoch,
        "started": source["started"],
        "git_commit": source["git_commit"],
        "git_dirty": source["git_dirty"],
        "code": code_digest(),
        "torch": source["versions"]["torch"],
        "device": source["device"],
        "threads": torch.get_num_threads(),
    }


def earlier_starts(source: Mapping[str, object]) -> list[dict[str, object]]:
    """Read the starts from provenance.json; a version that kept none tells of its last one."""
    if isinstance(starts := source.get("starts"), list):
        return [start for start in starts if isinstance(start, dict)]
    versions = source.get("versions")
    torch_version = versions.get("torch") if isinstance(versions, dict) else None
    known = {key: source.get(key) for key in ("started", "git_commit", "git_dirty", "device")}
    return [{"from_epoch": 0, **known, "torch": torch_version}] if source else []


def changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Name what changed between two starts; what the earlier one did not record is unknown."""

    def changed(*keys: str) -> bool:
        return any(before.get(key) is not None and before[key] != now[key] for key in keys)

    found = []
    # A commit may change what no training runs; an earlier version recorded no digest of the code.
    if changed(*(["code"] if before.get("code") else ["git_commit", "git_dirty"])):
        found.append(f"code ({_code_of(before)} -> {_code_of(now)})")
    found += [f"{key} ({before[key]} -> {now[key]})" for key in ("torch",) if changed(key)]
    if changed("device"):  # a CPU's name says its threads
        found.append(f"device ({before['device']} -> {now['device']})")
    elif changed("threads") and "threads)" in str(now["device"]):
        found.append(f"threads ({before['threads']} -> {now['threads']})")
    return found


def _code_of(start: Mapping[str, object]) -> str:
    commit = str(start.get("git_commit") or "unknown commit")[:10]
    return f"{commit} with changes" if start.get("git_dirty") else commit


def report_changes(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Say in one line what changed since a training's last start; in strict mode, refuse."""
    if not (found := changes(before, now)):
        return
    words = f"from epoch {now['from_epoch']} on with other {', '.join(found)}"
    if _strict.get():
        raise RunFailed(
            f"not resumed {words}: --strict; restore what changed, or resume without --strict"
        )
    print(f"resumed {words}; provenance.json lists every start", file=sys.stderr)
