"""Where a result came from: code, versions, machine, command, time."""

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.runs.machine import describe_gpu

REPOSITORY = Path(__file__).resolve().parents[2]


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None where there is no git or no repository."""
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
