"""Batches: rows of tensors that are already on the device, normalized on the fly.

There is no data loader. All random draws are made on the CPU, so that the same seed gives the same
batches on every device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data.random_streams import random_stream
from data.split import Split

CROP_MARGIN = 4  # pixels


@dataclass(frozen=True)
class Batch:
    """Examples of one step."""

    image: torch.Tensor  # float32 [b, channels, height, width] in [-1, 1]
    label: torch.Tensor
    memorized: torch.Tensor
    index: torch.Tensor  # in the data set's original order


@dataclass(frozen=True)
class Examples:
    """Images with their labels and, if they pass under example-tied masks, whose masks these are.

    An example may be several images: noisy copies.
    """

    images: torch.Tensor  # [n, channels, height, width] or [n, copies, channels, height, width]
    label: torch.Tensor  # [n]
    index: torch.Tensor | None = None  # [n]

    @classmethod
    def of(cls, split: Split, rows: torch.Tensor) -> "Examples":
        """Return training examples, normalized."""
        return cls(normalize(split.images[rows]), split.label[rows], split.index[rows])

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: torch.Tensor | slice) -> "Examples":
        index = None if self.index is None else self.index[rows]
        return Examples(self.images[rows], self.label[rows], index)

    def under_masks_of(self, index: torch.Tensor) -> "Examples":
        """Return the same images and labels under other examples' masks."""
        return Examples(self.images, self.label, index.expand(len(self)))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float32 in [-1, 1], to the same bits on every device.

    The divisor is a tensor: a GPU would multiply by the reciprocal of a Python number.
    """
    return images.to(torch.float32) / torch.full((), 127.5, device=images.device) - 1


def batch_rows(n: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the bounds (start, stop) of the batches that cover n examples.

    A last batch of a single example joins the one before it: batch norm cannot train on one value
    per channel.
    """
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, starts[1:] + [n]))


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of the rows in an epoch, int64 on the CPU, decided by (seed, epoch)."""
    return torch.from_numpy(random_stream("batch order", seed, epoch).permutation(n))


def batches(
    split: Split,
    batch_size: int,
    order: torch.Tensor | None = None,
    augment_generator: torch.Generator | None = None,
    first: int = 0,
) -> Iterator[Batch]:
    """Yield the split in batches, in the given order (default: ascending), from batch `first`.

    With a generator (on the CPU), images are augmented.
    """
    device = split.images.device
    order = torch.arange(split.n) if order is None else order
    order = order.to(device)
    for start, stop in batch_rows(len(order), batch_size)[first:]:
        row = order[start:stop]
        images = split.images.index_select(0, row)
        if augment_generator is not None:
            images = augment(images, augment_generator)
        yield Batch(
            image=normalize(images),
            label=split.label.index_select(0, row),
            memorized=split.memorized.index_select(0, row),
            index=split.index.index_select(0, row),
        )


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to 4 pixels, reflecting at its borders, and mirror about half of them.

    This is the usual random crop and horizontal flip as one gather over all pixels.
    """
    n, channels, height, width = images.shape
    device = images.device
    shift = torch.randint(-CROP_MARGIN, CROP_MARGIN + 1, (n, 2, 1), generator=generator)
    mirrored = torch.rand((n, 1), generator=generator) < 0.5
    shift, mirrored = (drawn.to(device, non_blocking=True) for drawn in (shift, mirrored))
    column = torch.arange(width, device=device).expand(n, -1)
    column = torch.where(mirrored, column.flip(1), column)
    y = _reflect(torch.arange(height, device=device) + shift[:, 0], height)
    x = _reflect(column + shift[:, 1], width)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return images[image, channel, y[:, None, :, None], x[:, None, None, :]]


def _reflect(position: torch.Tensor, size: int) -> torch.Tensor:
    """Mirror positions outside of 0..size-1 at the first and the last pixel."""
    last = size - 1
    return (last - (last - position.abs()).abs()).clamp(0, last)
