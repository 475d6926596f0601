"""What example-tied dropout costs, as a ratio measured in one process, and what its masks take.

    python benchmarks/dropout.py [key.path=value ...] [--rounds 5]

Alternates an epoch without dropout with one of each kind, and reports the median of the rounds'
ratios. README.md beside this file says how to read it.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from data import Split  # noqa: E402
from engine.config import load_configs  # noqa: E402
from engine.devices import compute_precision, describe_device, resolve_device  # noqa: E402
from engine.files import megabytes  # noqa: E402
from engine.settings import Config  # noqa: E402
from engine.setup import load_split, make_model  # noqa: E402
from engine.training import PlainBackward, train_epoch  # noqa: E402
from models import build_model  # noqa: E402
from models.dropout import ExampleTiedDropout, tied_layers  # noqa: E402

KINDS = ("none", "example_tied", "standard", "sparse")


def with_kind(config: Config, kind: str) -> Config:
    return dataclasses.replace(config, dropout=dataclasses.replace(config.dropout, kind=kind))


def epoch_of(config: Config, split: Split) -> Callable[[], object]:
    model = make_model(config, split).to(split.images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.train.momentum)
    return lambda: train_epoch(model, optimizer, split, config, 1, PlainBackward().backward)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def full_size_masks(p_gen: float, sites: str) -> int:
    """Bytes for ResNet-9 at full width and 60,000 examples."""
    model = build_model("resnet9", channels=3, classes=10, image_size=32, seed=0)
    channels = model.dropout_sites(sites).values()
    return sum(ExampleTiedDropout(c, 60_000, p_gen).masks.nbytes for c in channels)


def measure(config: Config, rounds: int) -> None:
    device = resolve_device(config)
    split = load_split(config).to(device)
    ways = {kind: epoch_of(with_kind(config, kind), split) for kind in KINDS}
    for work in ways.values():
        work()
    times = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, work in ways.items():
            times[kind].append(seconds(work, device))

    print(f"{describe_device(device)}, torch {torch.__version__}, {rounds} rounds")
    print(f"{config.model.name} {config.model.options}, {split.n} images of {split.shape}")
    print(f"epoch without dropout              {statistics.median(times['none']):8.3f} s")
    for kind in KINDS[1:]:
        ratio = statistics.median(a / b for a, b in zip(times[kind], times["none"]))
        print(f"{kind + ' / without':<34} {ratio:8.3f}")
    tied = make_model(with_kind(config, "example_tied"), split)
    own = sum(layer.masks.nbytes for layer in tied_layers(tied))
    full = full_size_masks(config.dropout.p_gen, config.dropout.sites)
    print(f"masks here                         {megabytes(own):>12}")
    print(f"masks, ResNet-9, 60,000 examples   {megabytes(full):>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    (config,) = load_configs(REPOSITORY / "configs" / "quickstart.yaml", given.overrides)
    with compute_precision(config.precision, resolve_device(config)):
        measure(config, given.rounds)


if __name__ == "__main__":
    main()
