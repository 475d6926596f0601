"""What accounting and feeding cost, as ratios measured in one process.

    python benchmarks/training.py [key.path=value ...] [--rounds 5]

Alternates an epoch of plain training with an epoch that accounts gradients, and reports the median
of the rounds' ratios; then times what it takes to make the batches of an epoch, here and with a
torchvision-style DataLoader of two workers. README.md beside this file says how to read it.
"""

import statistics
from collections.abc import Callable, Iterator

import torch
from common import make_parser, print_head, quickstart, ratio, take_turns
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data import Split, batches, epoch_order
from engine.devices import compute_precision, resolve_device
from engine.runs import without_dropout
from engine.settings import Config
from engine.setup import load_split, make_model
from engine.training import PlainBackward, train_epoch
from gradient_accounting import GradientAccountant


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

    times = take_turns(ways, rounds, device)
    print_head(config, split, rounds)
    accounting, feeding, loader = (ratio(times, name, "plain") for name in list(ways)[1:])
    print(f"plain epoch                        {statistics.median(times['plain']):8.3f} s")
    print(f"accounting / plain                 {accounting:8.3f}    (floor 1.667)")
    print(f"feeding batches / plain epoch      {feeding:8.3%}")
    print(f"DataLoader, 2 workers / plain      {loader:8.3%}")


def main() -> None:
    given = make_parser(__doc__).parse_intermixed_args()
    config = without_dropout(quickstart(given.overrides))
    with compute_precision(config.precision, resolve_device(config)):
        measure(config, given.rounds)


if __name__ == "__main__":
    main()
