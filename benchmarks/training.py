"""Cost of accounting, feeding and record keeping, as ratios measured in one process.

    python benchmarks/training.py [key.path=value ...] [--rounds 5]

Alternates an epoch of plain training with an epoch that accounts gradients, with what it takes to
make the batches of an epoch, here and with a torchvision-style DataLoader of two workers, and with
what follows every epoch: evaluating all examples, copying what is to be written, and writing it.
Reports the medians of the rounds' ratios. README.md beside this file says how to read it.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from common import make_parser, print_head, quickstart, ratio, take_turns
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data import Split, batches, epoch_order
from engine.config.schema import Config
from engine.runs import files
from engine.runs.identity import without_dropout
from engine.runs.run import Run
from engine.training import resume
from engine.training.build import load_split, make_model
from engine.training.devices import compute_precision, resolve_device
from engine.training.loop import make_optimizer, train_epoch, write_epoch
from engine.training.record import PlainBackward, Record, plain_backward
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


def consume(found: Iterator) -> None:
    for _ in found:
        pass


def after_epoch(
    run: Run, split: Split, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Mapping[str, Callable[[], object]]:
    """Time the work after the last epoch of a training, which has the longest record."""
    files.write_json(run.provenance_path, {"identity": run.expected})  # or it counts as removed
    record, epochs = Record(), run.config.train.epochs
    train_epoch(model, optimizer, split, run.config, 1)  # for momentum
    record.measure(model, split, epoch=1, lr=0.0)
    for rows in vars(record).values():
        if isinstance(rows, list):
            rows *= epochs
    copies = resume.snapshot(model, optimizer), record.snapshot()
    return {
        "evaluating": lambda: Record().measure(model, split, epoch=1, lr=0.0),
        "copying": lambda: (resume.snapshot(model, optimizer), record.snapshot()),
        "writing": lambda: write_epoch(run, epochs, *copies, PlainBackward),
    }


def measure(config: Config, rounds: int) -> None:
    device = resolve_device(config)
    split = load_split(config).to(device)
    model = make_model(config, split).to(device)
    size = config.train.batch_size
    still = replace(config, train=replace(config.train, peak_lr=1e-12))  # steps that lead nowhere
    optimizer = make_optimizer(model.parameters(), still.train)

    def epoch_with(backward: Callable) -> Callable[[], object]:
        return lambda: train_epoch(model, optimizer, split, still, 1, backward)

    ways = {
        "plain": epoch_with(plain_backward),
        "accounting": epoch_with(GradientAccountant(model).backward),
        "feeding": lambda: consume(batches(split, size, epoch_order(split.n, config.seed, 1))),
    }
    loader = DataLoader(ImageDataset(split), size, shuffle=True, num_workers=2)
    ways["loader"] = lambda: consume((x.to(device), y.to(device)) for x, y, _ in loader)

    with tempfile.TemporaryDirectory() as folder:
        run = Run.of(replace(still, output_dir=Path(folder).as_posix()))
        ways |= after_epoch(run, split, model, optimizer)
        times = take_turns(ways, rounds, device)
    print_head(config, split, rounds)
    share = {name: ratio(times, name, "plain") for name in ways}
    forward = (split.n + len(split.test_label)) / split.n / 3
    print(f"plain epoch                        {statistics.median(times['plain']):8.3f} s")
    print(f"accounting / plain                 {share['accounting']:8.3f}    (floor 1.667)")
    print(f"feeding batches / plain epoch      {share['feeding']:8.3%}")
    print(f"DataLoader, 2 workers / plain      {share['loader']:8.3%}")
    print(f"evaluating every example / plain   {share['evaluating']:8.3%}    (floor {forward:.1%})")
    print(f"copying what is written / plain    {share['copying']:8.3%}")
    print(f"writing, in the background / plain {share['writing']:8.3%}")


def main() -> None:
    given = make_parser(__doc__).parse_intermixed_args()
    config = without_dropout(quickstart(given.overrides))
    with compute_precision(config.precision, resolve_device(config)):
        measure(config, given.rounds)


if __name__ == "__main__":
    main()
