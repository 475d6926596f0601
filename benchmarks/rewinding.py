"""Cost of rewinding and retraining, as ratios measured in one process.

    python benchmarks/rewinding.py [key.path=value ...] [--rounds 3]

Trains a run, by default of 10 epochs (once, under runs/), and alternates the full grid of
rewinding, every epoch of every group, with the slow way: for each cell load the checkpoint, swap
the group, evaluate everything. Then an epoch of retraining the last group with one of training all.
README.md beside this file says how to read it.
"""

import copy
import statistics
from collections.abc import Callable

import torch
from common import make_parser, print_head, quickstart, ratio, timed
from torch import Tensor

import gradient_accounting
from data import Split, normalize
from engine.runs.identity import without_dropout
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import batch_size
from engine.training.loop import train_epoch
from layer_retraining import reset_group, retraining_config
from layer_rewinding import compute_predictions, load_earlier_groups
from models.layer_groups import StagedModel, layer_groups

Grid = dict[int, Tensor]  # epoch -> predictions [groups, n]


@torch.no_grad()
def rewind_slowly(run: Run, final: StagedModel, split: Split) -> Grid:
    """Every cell for itself: load, swap, evaluate all."""
    grid = {}
    for epoch in range(run.config.train.epochs + 1):
        rows = []
        for group in layer_groups(final):
            saved, model = run.read_checkpoint(epoch), copy.deepcopy(final)
            for name, parameter in group.parameters(model).items():
                parameter.copy_(saved[name])
            batches = split.images.split(batch_size(split.images.device))
            rows.append(torch.cat([model(normalize(batch)).argmax(1) for batch in batches]))
        grid[epoch] = torch.stack(rows)
    return grid


def rewind(run: Run, final: StagedModel, split: Split) -> Grid:
    """Rewind as layer_rewinding.py does, without its files."""
    last, groups = run.config.train.epochs, layer_groups(final)
    earlier = load_earlier_groups(run, final, range(last), "final")
    grid = {epoch: [] for epoch in range(last + 1)}
    for batch in split.images.split(batch_size(split.images.device)):
        own, predicted = compute_predictions(groups, earlier, batch)
        for epoch, rows in (predicted | {last: own.expand(len(groups), -1)}).items():
            grid[epoch].append(rows)
    return {epoch: torch.cat(rows, dim=1) for epoch, rows in grid.items()}


def epochs_of_training(run: Run, final: StagedModel, split: Split) -> dict[str, Callable]:
    """An epoch of plain training, and one of retraining the last group."""
    group = layer_groups(final)[-1]
    retrained = reset_group(final, run.read_checkpoint(0), group)
    full, clean = copy.deepcopy(final), split.subset(~split.memorized)
    config = retraining_config(run.config, group.index)
    own = torch.optim.SGD(group.parameters(retrained).values(), lr=0.0)
    everything = torch.optim.SGD(full.parameters(), lr=0.0)
    return {
        "full": lambda: train_epoch(full, everything, split, run.config, 1),
        "last": lambda: train_epoch(retrained, own, clean, config, 1),
    }


def measure(run: Run, rounds: int) -> None:
    device = resolve_device(run.config)
    split = load_split(run.config).to(device)
    final = load_final_model(run, split, device).eval()
    ways = {
        "fast": lambda: rewind(run, final, split),
        "slow": lambda: rewind_slowly(run, final, split),
        **epochs_of_training(run, final, split),
    }
    times = {name: [] for name in ways}
    for _ in range(rounds):
        results = {}
        for name, work in ways.items():
            seconds, results[name] = timed(work, device)
            times[name].append(seconds)
        for epoch, rows in results["slow"].items():
            assert torch.equal(results["fast"][epoch], rows), f"epoch {epoch}: other predictions"

    cells = f"{len(layer_groups(final))} x {run.config.train.epochs + 1}"
    print_head(run.config, split, rounds)
    slow, last = ratio(times, "slow", "fast"), ratio(times, "last", "full")
    print(f"rewinding {cells:<20} {statistics.median(times['fast']):8.3f} s")
    print(f"slow way / rewinding           {slow:8.2f}    (same predictions)")
    print(f"full epoch                     {statistics.median(times['full']):8.3f} s")
    print(f"retraining last group / full   {last:8.2f}")


def main() -> None:
    given = make_parser(__doc__, rounds=3).parse_intermixed_args()
    asked = any(override.startswith("train.epochs=") for override in given.overrides)
    overrides = given.overrides if asked else ["train.epochs=10", *given.overrides]
    run = Run.of(without_dropout(quickstart(overrides)))
    gradient_accounting.EXPERIMENT.main(run)
    with compute_precision(run.config.precision, resolve_device(run.config)):
        measure(run, given.rounds)


if __name__ == "__main__":
    main()
