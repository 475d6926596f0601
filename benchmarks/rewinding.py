"""What rewinding and retraining cost, as ratios measured in one process.

    python benchmarks/rewinding.py [key.path=value ...] [--rounds 3]

Trains a run, by default of 10 epochs (once, under runs/), and alternates the full grid of
rewinding, every epoch of every group, with the slow way: for each cell load the checkpoint, swap
the group, evaluate everything. Then an epoch of retraining the last group with one of training all.
README.md beside this file says how to read it.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import gradient_accounting  # noqa: E402
from data import Split, normalize  # noqa: E402
from engine.config import load_configs  # noqa: E402
from engine.devices import compute_precision, describe_device, resolve_device  # noqa: E402
from engine.evaluation import BATCH_SIZE  # noqa: E402
from engine.runs import Run, without_dropout  # noqa: E402
from engine.setup import load_final_model, load_split  # noqa: E402
from engine.training import PlainBackward, train_epoch  # noqa: E402
from layer_retraining import reset_group, retraining_config  # noqa: E402
from layer_rewinding import compute_predictions, load_earlier_groups  # noqa: E402
from models.layer_groups import StagedModel, layer_groups  # noqa: E402

Grid = dict[int, Tensor]  # epoch -> predictions [groups, n]


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Seconds and result; on a CPU its own seconds, so that a busy machine does not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, result


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
            batches = split.images.split(BATCH_SIZE)
            rows.append(torch.cat([model(normalize(batch)).argmax(1) for batch in batches]))
        grid[epoch] = torch.stack(rows)
    return grid


def rewind(run: Run, final: StagedModel, split: Split) -> Grid:
    """As layer_rewinding.py does, without its files."""
    last, groups = run.config.train.epochs, layer_groups(final)
    earlier = load_earlier_groups(run, final, range(last), "final")
    grid = {epoch: [] for epoch in range(last + 1)}
    for batch in split.images.split(BATCH_SIZE):
        own, predicted = compute_predictions(groups, earlier, batch)
        for epoch, rows in (predicted | {last: own.expand(len(groups), -1)}).items():
            grid[epoch].append(rows)
    return {epoch: torch.cat(rows, dim=1) for epoch, rows in grid.items()}


def epochs_of_training(run: Run, final: StagedModel, split: Split) -> dict[str, Callable]:
    """An epoch of plain training, and one of retraining the last group."""
    group, backward = layer_groups(final)[-1], PlainBackward().backward
    retrained = reset_group(final, run.read_checkpoint(0), group)
    full, clean = copy.deepcopy(final), split.subset(~split.memorized)
    config = retraining_config(run.config, group.index)
    own = torch.optim.SGD(group.parameters(retrained).values(), lr=0.0)
    everything = torch.optim.SGD(full.parameters(), lr=0.0)
    return {
        "full": lambda: train_epoch(full, everything, split, run.config, 1, backward),
        "last": lambda: train_epoch(retrained, own, clean, config, 1, backward),
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

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other]))

    cells = f"{len(layer_groups(final))} x {run.config.train.epochs + 1}"
    print(f"{describe_device(device)}, torch {torch.__version__}, {rounds} rounds")
    print(f"{run.config.model.name} {run.config.model.options}, {split.n} images of {split.shape}")
    print(f"rewinding {cells:<20} {statistics.median(times['fast']):8.3f} s")
    print(f"slow way / rewinding           {ratio('slow', 'fast'):8.2f}    (same predictions)")
    print(f"full epoch                     {statistics.median(times['full']):8.3f} s")
    print(f"retraining last group / full   {ratio('last', 'full'):8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    asked = any(override.startswith("train.epochs=") for override in given.overrides)
    overrides = given.overrides if asked else ["train.epochs=10", *given.overrides]
    (config,) = load_configs(REPOSITORY / "configs" / "quickstart.yaml", overrides)
    run = Run.of(without_dropout(config))
    gradient_accounting.main(run)
    with compute_precision(run.config.precision, resolve_device(run.config)):
        measure(run, given.rounds)


if __name__ == "__main__":
    main()
