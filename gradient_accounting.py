"""Gradient accounting (Section 4): how much do clean and noisy examples move each layer?

Claims: (i) in every layer, the 10% noisy examples contribute as much gradient norm as all clean
examples together (Figures 1, 10-14); (ii) the two gradients point in opposite directions, with
cosines below -0.75 while the noisy examples are learned (Figure 2).

    python gradient_accounting.py configs/quickstart.yaml             # minutes on two CPU cores
    python gradient_accounting.py configs/paper/figures_1_2_10.yaml   # the paper's size: a GPU

Trains a run for every combination of the sweep, with a checkpoint after every epoch for the other
scripts, and writes gradient_accounting.csv beside them. Accounting takes a second backward pass at
every step: 5/3 of the time of plain training. `train.account_gradients: false` trains without.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data import Batch
from engine.launch.cli import run_script
from engine.launch.estimates import training_passes
from engine.runs.experiment import Experiment
from engine.runs.identity import title
from engine.runs.run import Run
from engine.runs.tables import HISTORY, ResultTable
from engine.training.build import estimate_disk, load_split, make_model
from engine.training.devices import resolve_device
from engine.training.loop import restore_results, train_run
from engine.training.record import PlainBackward
from models.layer_groups import layer_groups

ACCOUNTS = ResultTable(
    "gradient_accounting.csv",
    ("epoch", "group", "norm_clean", "norm_noisy", "norm_total", "cosine", "parameters"),
)


def compute_row(clean: Sequence[Tensor], noisy: Sequence[Tensor]) -> dict[str, float]:
    """Compute the norms and the cosine of one layer's two accumulated gradients.

    Norms are divided by the square root of the number of parameters. The total is the norm of the
    sum of both gradients, so that total^2 = clean^2 + noisy^2 + 2 * cosine * clean * noisy.
    """

    def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return sum((a.double() * b.double()).sum() for a, b in zip(left, right)).item()

    total = [c.double() + n.double() for c, n in zip(clean, noisy)]
    norm_clean, norm_noisy, norm_total = (math.sqrt(inner(g, g)) for g in (clean, noisy, total))
    both = norm_clean * norm_noisy
    parameters = sum(gradient.numel() for gradient in clean)
    return {
        "norm_clean": norm_clean / math.sqrt(parameters),
        "norm_noisy": norm_noisy / math.sqrt(parameters),
        "norm_total": norm_total / math.sqrt(parameters),
        "cosine": inner(clean, noisy) / both if both else math.nan,
        "parameters": parameters,
    }


class GradientAccountant:
    """Sum the clean and the noisy examples' gradients over an epoch's steps, on the device.

    At every step the gradient of (1/B) * sum over the clean (noisy) examples of the batch of the
    loss; the two add up to the gradient that the optimizer follows, so that no third backward pass
    is needed. Both go through the whole batch, since batch norm ties its examples together.
    """

    table = ACCOUNTS

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        position = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self.groups = [
            [position[id(parameter)] for parameter in group.parameters(model).values()]
            for group in layer_groups(model)
        ]
        self.clean = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.noisy = [torch.zeros_like(parameter) for parameter in self.parameters]

    def backward(self, losses: Tensor, batch: Batch) -> None:
        def gradient_of(subset: Tensor, keep_graph: bool) -> list[Tensor]:
            loss = torch.where(subset, losses, 0).sum() / len(losses)
            return list(torch.autograd.grad(loss, self.parameters, retain_graph=keep_graph))

        noisy = gradient_of(batch.memorized, keep_graph=True)
        clean = gradient_of(~batch.memorized, keep_graph=False)
        torch._foreach_add_(self.noisy, noisy)
        torch._foreach_add_(self.clean, clean)
        for parameter, gradient in zip(self.parameters, torch._foreach_add(clean, noisy)):
            parameter.grad = gradient

    @property
    def sums(self) -> list[Tensor]:
        """Return the sums of this epoch so far, clean then noisy."""
        return [*self.clean, *self.noisy]

    def epoch_rows(self, epoch: int) -> list[dict[str, float]]:
        """Return a row for each layer, and reset the sums."""
        rows = []
        for group, positions in enumerate(self.groups):
            clean, noisy = ([sums[i] for i in positions] for sums in (self.clean, self.noisy))
            rows.append({"epoch": epoch, "group": group} | compute_row(clean, noisy))
        torch._foreach_zero_(self.sums)
        return rows


# ---------------------------------------------------------------- a run


def train(run: Run) -> None:
    """Train and account one run, or restore the missing results of a finished run."""
    accounting = GradientAccountant if run.config.train.account_gradients else PlainBackward
    if run.finished:
        restore_results(run, accounting)
        run.discard(run.resumable_epochs())
    else:
        device = resolve_device(run.config)
        split = load_split(run.config).to(device)
        model = make_model(run.config, split).to(device)
        train_run(run, split, model, device, accounting)


def summarize(run: Run) -> str:
    """Return the accuracies at the end of the training."""
    last = HISTORY.read(run.directory)[-1]
    return (
        f"{title(run.config)}: clean {last['acc_clean']:.2%}, noisy {last['acc_noisy']:.2%}, "
        f"test {last['acc_test']:.2%}"
    )


EXPERIMENT = Experiment(
    key="gradients",
    command="python gradient_accounting.py",
    section="4, A",
    question=(
        "How much gradient do clean and memorized examples contribute to each layer while "
        "the network trains, and do the two agree?"
    ),
    tables=(ACCOUNTS,),
    figures=("plotting.examples", "plotting.gradients"),
    measure=train,
    summarize=summarize,
    passes=training_passes,
    disk=estimate_disk,
    trains=True,
    accounts=lambda config: ACCOUNTS.name if config.train.account_gradients else "",
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
