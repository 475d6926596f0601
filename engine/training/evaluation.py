"""Evaluate a model on every single example; average over subsets of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split, normalize
from models.dropout import examples

LARGE_GPU = 14 << 30  # bytes; what such a GPU may hold does not depend on what is free

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Loss (float32), correctness (bool) and predicted class of each example, in order."""

    loss: Tensor
    correct: Tensor
    prediction: Tensor
    logits: Tensor | None = None  # float32 [n, classes]


def batch_size(device: torch.device) -> int:
    """Return how many images go forward at once: a CPU's caches hold few, a small GPU fewer."""
    if device.type == "cpu":
        return 100
    large = device.type != "cuda" or _memory_of(device) >= LARGE_GPU
    return 2000 if large else 500


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode; afterwards restore the mode that each had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Tensor,
    label: Tensor,
    index: Tensor | None = None,
    size: int | None = None,
) -> Outcome:
    """Evaluate every image (uint8) under its label, in eval mode.

    With their `index`, training examples go through example-tied dropout under their own masks.
    """
    size = size or batch_size(label.device)
    losses, parts = [], []
    with eval_mode(model):
        for start in range(0, len(label), size):
            batch = slice(start, start + size)
            with examples(model, None if index is None else index[batch]):
                logits = model(normalize(images[batch])).float()
            losses.append(F.cross_entropy(logits, label[batch], reduction="none"))
            parts.append(logits)
    logits = torch.cat(parts)
    prediction = logits.argmax(1)
    return Outcome(torch.cat(losses), prediction == label, prediction, logits)


def evaluate_split(model: nn.Module, split: Split) -> tuple[Outcome, Outcome]:
    """Evaluate every training example under the label it is trained on, and every test example."""
    return (
        evaluate(model, split.images, split.label, index=split.index),
        evaluate(model, split.test_images, split.test_label),
    )


def compute_margin(logits: Tensor, label: Tensor) -> Tensor:
    """Subtract the largest other logit from the label's [n]."""
    own = label[:, None]
    others = logits.scatter(1, own, -torch.inf)
    return logits.gather(1, own).squeeze(1) - others.amax(1)


def compute_error_norm(logits: Tensor, label: Tensor) -> Tensor:
    """Return the L2 norm [n] of softmax minus one-hot."""
    error = logits.softmax(1)
    error[torch.arange(len(label), device=label.device), label] -= 1
    return error.norm(dim=1)


def mean_by_subset(values: Tensor, memorized: Tensor, name: str) -> dict[str, float]:
    """Return means over the clean, the noisy and all training examples; nan for an empty subset."""
    values = values.double()
    return {
        f"{name}_clean": values[~memorized].mean().item(),
        f"{name}_noisy": values[memorized].mean().item(),
        f"{name}_total": values.mean().item(),
    }
