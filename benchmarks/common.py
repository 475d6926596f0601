"""Shared by the benchmarks: imports, arguments, a clock, and alternating runs."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # for this module's imports, and those of whoever imports it

from data import Split  # noqa: E402
from engine.config.load import load_configs  # noqa: E402
from engine.config.schema import Config  # noqa: E402
from engine.runs.provenance import describe_device  # noqa: E402

Times = Mapping[str, list[float]]


def make_parser(description: str, rounds: int | None = 5) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def quickstart(overrides: list[str]) -> Config:
    """The first run of the quickstart's configuration, changed."""
    return load_configs(REPOSITORY / "configs" / "quickstart.yaml", overrides)[0]


def timed(
    work: Callable[[], object], device: torch.device, own: bool = True
) -> tuple[float, object]:
    """Seconds and result; on a CPU this process's own, so that a busy machine does not count.

    With `own` False they are the clock's: where other processes do a part of the work.
    """
    clock = time.process_time if own and device.type == "cpu" else time.perf_counter
    began = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, result


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> Times:
    """Seconds of each way in each round, after one that does not count."""
    for work in ways.values():
        work()
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(timed(work, device, own=False)[0])
    return times


def ratio(times: Times, name: str, other: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


def print_head(config: Config, split: Split, rounds: int) -> None:
    device = describe_device(split.label.device)
    print(f"{device}, torch {torch.__version__}, {config.precision}, {rounds} rounds")
    print(f"{config.model.name} {config.model.arguments}, {split.n} images of {split.shape}")
