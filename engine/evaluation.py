"""What a model does with every single example, and accuracies over subsets of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split, normalize

BATCH_SIZE = 500
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Loss (float32) and correctness (bool) of each example, in order."""

    loss: Tensor
    correct: Tensor


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each is back in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Tensor, label: Tensor, batch_size: int = BATCH_SIZE
) -> Outcome:
    """Loss and correctness of every image (uint8) under its label, in eval mode."""
    losses, correct = [], []
    with eval_mode(model):
        for image, target in zip(images.split(batch_size), label.split(batch_size)):
            logits = model(normalize(image)).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            correct.append(logits.argmax(1) == target)
    return Outcome(torch.cat(losses), torch.cat(correct))


def evaluate_split(model: nn.Module, split: Split) -> tuple[Outcome, Outcome]:
    """Every training example under the label it is trained on, and every test example."""
    return (
        evaluate(model, split.images, split.label),
        evaluate(model, split.test_images, split.test_label),
    )


def mean_by_subset(values: Tensor, memorized: Tensor, name: str) -> dict[str, float]:
    """Means over the clean, the noisy and all training examples; nan for an empty subset."""
    values = values.double()
    return {
        f"{name}_clean": values[~memorized].mean().item(),
        f"{name}_noisy": values[memorized].mean().item(),
        f"{name}_total": values.mean().item(),
    }
