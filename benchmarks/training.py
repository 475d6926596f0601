"""What accounting and feeding cost, as ratios measured in one process.

    python benchmarks/training.py [key.path=value ...] [--rounds 5]

Alternates an epoch of plain training with an epoch that accounts gradients, and reports the median
of the rounds' ratios; then times what it takes to make the batches of an epoch, here and with a
torchvision-style DataLoader of two workers. README.md beside this file says how to read it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from data import Split, batches, epoch_order  # noqa: E402
from engine.config import load_configs  # noqa: E402
from engine.devices import compute_precision, describe_device, resolve_device  # noqa: E402
from engine.runs import without_dropout  # noqa: E402
from engine.settings import Config  # noqa: E402
from engine.setup import load_split, make_model  # noqa: E402
from engine.training import PlainBackward, train_epoch  # noqa: E402
from gradient_accounting import GradientAccountant  # noqa: E402


def seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class ImageDataset(Dataset):
    """The usual way: an image is a Python object, transformed one at a time."""

    def __init__(self, split: Split) -> None:
        self.images = [transforms.functional.to_pil_image(image) for image in split.images.cpu()]
        self.label = split.label.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        return self.transform(self.images[row]), self.label[row], row


def epoch_of(
    config: Config, split: Split, model: nn.Module, backward: Callable
) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.train.momentum)
    return lambda: train_epoch(model, optimizer, split, config, 1, backward)


def consume(found: Iterator) -> None:
    for _ in found:
        pass


def measure(config: Config, rounds: int) -> None:
    device = resolve_device(config)
    split = load_split(config).to(device)
    model = make_model(config, split).to(device)
    size = config.train.batch_size
    ways = {
        "plain": epoch_of(config, split, model, PlainBackward().backward),
        "accounting": epoch_of(config, split, model, GradientAccountant(model).backward),
        "feeding": lambda: consume(batches(split, size, epoch_order(split.n, config.seed, 1))),
    }
    loader = DataLoader(ImageDataset(split), size, shuffle=True, num_workers=2)
    ways["loader"] = lambda: consume((x.to(device), y.to(device)) for x, y, _ in loader)

    for work in ways.values():
        work()
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work, device))

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times["plain"]))

    print(f"{describe_device(device)}, torch {torch.__version__}, {rounds} rounds")
    print(f"{config.model.name} {config.model.options}, {split.n} images of {split.shape}")
    print(f"plain epoch                        {statistics.median(times['plain']):8.3f} s")
    print(f"accounting / plain                 {ratio('accounting'):8.3f}    (floor 1.667)")
    print(f"feeding batches / plain epoch      {ratio('feeding'):8.3%}")
    print(f"DataLoader, 2 workers / plain      {ratio('loader'):8.3%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    (config,) = load_configs(REPOSITORY / "configs" / "quickstart.yaml", given.overrides)
    with compute_precision(config.precision, resolve_device(config)):
        measure(without_dropout(config), given.rounds)


if __name__ == "__main__":
    main()
