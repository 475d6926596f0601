"""Estimate how long a job takes, well enough to plan with.

The unit of work is a pass: one image forward through the network; a backward pass counts as two.
The seconds per pass come from finished runs of the same shape on the same device, otherwise from
two seconds of training on random images. No data are read or downloaded.
"""

import heapq
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import DataError, Split, expanded, outline
from engine.config.schema import Config, ModelConfig
from engine.errors import UserError
from engine.runs import files
from engine.runs.experiment import Experiment
from engine.runs.provenance import describe_device
from engine.runs.run import Run
from engine.training.build import make_model, outline_model
from engine.training.devices import compute_precision, derive_seed, resolve_device
from engine.training.loop import train_epoch
from models.layer_groups import layer_groups

CALIBRATION = 2.0  # seconds


# ---------------------------------------------------------------- passes


def training_passes(run: Run) -> float:
    """Count the passes of the remaining epochs: forward, one or two backward, and evaluation."""
    train, test = count_examples(run.config)
    done = 0 if run.finished else max(run.resumable_epochs(), default=0)
    step = 5 if run.config.train.account_gradients else 3
    return (run.config.train.epochs - done) * (step * train + train + test)


def count_groups(config: Config) -> int:
    """Return the number of layers of the configured network."""
    return len(layer_groups(outline_model(config)))


def count_examples(config: Config) -> tuple[int, int]:
    """Return the numbers of training and of test examples; the latter is approximate."""
    train = outline(config.data.name, config.data.path).train_count
    return config.data.train_size or train, config.data.test_size or train // 5


# ---------------------------------------------------------------- seconds


@dataclass(frozen=True)
class Shape:
    """Settings that decide the time of a pass on a device."""

    data: tuple[str, str | None]
    model: ModelConfig
    batch_size: int
    precision: str
    dropout: str
    compiled: bool | str

    @classmethod
    def of(cls, config: Config) -> "Shape":
        data, train = (config.data.name, config.data.path), config.train
        kind = config.dropout.kind
        return cls(data, config.model, train.batch_size, config.precision, kind, train.compile)


class Speeds:
    """Seconds per pass with a given number of CPU threads; cached per shape."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.past: dict[tuple[str, str], dict[Shape, list[float]]] = {}
        self.known: dict[tuple[Shape, str], float] = {}

    def seconds(self, experiment: Experiment, run: Run) -> float:
        """Estimate the remaining seconds of an experiment on a run."""
        return experiment.passes(run) * self.of(run.config)

    def of(self, config: Config) -> float:
        key = Shape.of(config), config.device
        if key not in self.known:
            with cpu_threads(self.threads):
                try:
                    self.known[key] = self._find_out(config, resolve_device(config))
                except UserError:  # a GPU is asked for, and this machine has none
                    self.known[key] = math.nan
        return self.known[key]

    def _find_out(self, config: Config, device: torch.device) -> float:
        place = config.output_dir, describe_device(device)
        if place not in self.past:
            output_dir = expanded(config.output_dir)
            self.past[place] = past_runs(output_dir, describe_device(device))
        past = self.past[place].get(Shape.of(config))
        if past:
            return statistics.median(past)
        found = calibrate(config, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # leave the memory to the runs
        return found


def past_runs(output_dir: Path, device: str) -> dict[Shape, list[float]]:
    """Return the seconds per pass of the finished trainings on this device, by shape."""
    found: dict[Shape, list[float]] = {}
    for path in sorted(output_dir.glob("*/*/provenance.json")):
        with suppress(
            UserError, DataError
        ):  # a damaged run is reported by the command that reads it
            run, source = Run.at(path.parent), files.read_json(path)
            seconds, here = source.get("seconds"), source.get("device") == device
            if run.finished and here and type(seconds) in (int, float) and seconds > 0:
                found.setdefault(Shape.of(run.config), []).append(seconds / training_passes(run))
    return found


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def calibrate(config: Config, device: torch.device) -> float:
    """Measure the seconds per pass by training repeatedly on a batch of random images.

    A GPU gets several batches in a row: starting and ending an epoch takes as long as a step there.
    """
    batches = 20 if device.type == "cuda" else 1
    split = random_images(config, batches * config.train.batch_size).to(device)
    # A learning rate so small that the weights do not change.
    config = replace(config, train=replace(config.train, peak_lr=1e-12))
    model = make_model(config, split).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.train.momentum)

    def step(size: int) -> float:
        part = split.subset(torch.arange(split.n, device=device) < size)
        began = time.perf_counter()
        train_epoch(model, optimizer, part, config, 1)
        return time.perf_counter() - began

    least, whole = min(2, split.n), split.n
    with compute_precision(config.precision, device):
        step(least)
        size = whole if device.type == "cuda" else least
        seconds = smallest = step(size)
        # A whole batch of a large network may take a CPU a minute.
        while size < whole and seconds < CALIBRATION:
            size = min(4 * size, whole)
            seconds = step(size)
        times = [seconds]
        while sum(times) < CALIBRATION:
            times.append(step(size))
    seconds = statistics.median(times)
    if least < size < whole:  # the cost per step of the weights does not grow with the batch
        seconds += (whole - size) * max(0.0, seconds - smallest) / (size - least)
        size = whole
    return seconds / (3 * size)


def random_images(config: Config, size: int) -> Split:
    """Make `size` random images of the data set's shape, none memorized, without test images."""
    known = outline(config.data.name, config.data.path)
    random = torch.Generator().manual_seed(derive_seed("calibration"))
    images = torch.randint(256, (size, *known.shape), dtype=torch.uint8, generator=random)
    label, index = torch.arange(size) % known.classes, torch.arange(size)
    names = tuple(map(str, range(known.classes)))
    memorized = torch.zeros(size, dtype=torch.bool)
    return Split(images, label, label, memorized, index, None, images[:0], label[:0], names)


# ---------------------------------------------------------------- text


def makespan(seconds: Sequence[float], slots: int) -> float:
    """Return the total seconds when each free slot takes the next piece of work."""
    ends = [0.0] * slots
    for piece in seconds:
        heapq.heapreplace(ends, ends[0] + piece)
    return max(ends)


def duration(seconds: float) -> str:
    """Format seconds with a unit that fits."""
    if math.isnan(seconds):
        return "an unknown time"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"
