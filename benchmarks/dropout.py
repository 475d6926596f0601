"""Cost of example-tied dropout, as a ratio measured in one process, and its masks' memory.

    python benchmarks/dropout.py [key.path=value ...] [--rounds 5]

Alternates an epoch without dropout with one of each kind, and reports the median of the rounds'
ratios. README.md beside this file says how to read it.
"""

import dataclasses
import statistics
from collections.abc import Callable

import torch
from common import make_parser, print_head, quickstart, ratio, take_turns

from data import Split
from engine.config.schema import Config
from engine.runs.files import megabytes
from engine.training.build import load_split, make_model
from engine.training.devices import compute_precision, resolve_device
from engine.training.loop import train_epoch
from models import build_model
from models.dropout import ExampleTiedDropout, tied_layers

KINDS = ("none", "example_tied", "standard", "sparse")


def with_kind(config: Config, kind: str) -> Config:
    return dataclasses.replace(config, dropout=dataclasses.replace(config.dropout, kind=kind))


def epoch_of(config: Config, split: Split) -> Callable[[], object]:
    model = make_model(config, split).to(split.images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.train.momentum)
    return lambda: train_epoch(model, optimizer, split, config, 1)


def full_size_masks(p_gen: float, sites: str) -> int:
    """Bytes for ResNet-9 at full width and 60,000 examples."""
    model = build_model("resnet9", channels=3, classes=10, image_size=32, seed=0)
    channels = model.dropout_sites(sites).values()
    return sum(ExampleTiedDropout(c, 60_000, p_gen).masks.nbytes for c in channels)


def measure(config: Config, rounds: int) -> None:
    device = resolve_device(config)
    split = load_split(config).to(device)
    ways = {kind: epoch_of(with_kind(config, kind), split) for kind in KINDS}
    times = take_turns(ways, rounds, device)
    print_head(config, split, rounds)
    print(f"epoch without dropout              {statistics.median(times['none']):8.3f} s")
    for kind in KINDS[1:]:
        print(f"{kind + ' / without':<34} {ratio(times, kind, 'none'):8.3f}")
    tied = make_model(with_kind(config, "example_tied"), split)
    own = sum(layer.masks.nbytes for layer in tied_layers(tied))
    full = full_size_masks(config.dropout.p_gen, config.dropout.sites)
    print(f"masks here                         {megabytes(own):>12}")
    print(f"masks, ResNet-9, 60,000 examples   {megabytes(full):>12}")


def main() -> None:
    given = make_parser(__doc__).parse_intermixed_args()
    config = quickstart(given.overrides)
    with compute_precision(config.precision, resolve_device(config)):
        measure(config, given.rounds)


if __name__ == "__main__":
    main()
