"""Does the default search of neurons differ from the exact one more than another draw does?

    python benchmarks/agreement.py RUN... [--examples 60] [--output agreement.csv]

Searches the same memorized and clean examples of finished runs exactly, exactly with other draws of
the reference batch, by default, and in other approximate ways. Prints, for each run and search:
mean neurons of memorized and of clean examples, the AUC of the number, seconds a neuron, and what
changed against the exact search. README.md beside this file says how to read it. The output file
has every example.
"""

import argparse
import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from flipping import DEFAULT, Clock

from engine.config.schema import FlippingConfig
from engine.runs.identity import measuring_precision
from engine.runs.provenance import describe_device
from engine.runs.run import Run
from engine.stats import compute_area, count_neurons
from engine.training.build import load_evaluated_model, load_split
from engine.training.devices import compute_precision, resolve_device
from neuron_flipping import choose_searched, compute_flipping

# Changes of flipping's keys; `draw` is added to the seed that draws the reference batch.
SEARCHES: dict[str, dict[str, object]] = {
    "exact": {"exact": True},
    "second draw": {"exact": True, "draw": 1000},
    "third draw": {"exact": True, "draw": 2000},
    "default": DEFAULT,
    "default, all remaining": DEFAULT | {"remaining_rows": None},
    "one copy": DEFAULT | {"reference_rows": None},
    "one copy, 256 rows": DEFAULT | {"reference_rows": 256},
}
COLUMNS = ("run", "seed", "search", "example", "memorized", "neurons", "flipped",
           "acc_remaining_after", "acc_test_after", "seconds", "neurons_ids")  # fmt: skip


def settings_of(search: str, settings: FlippingConfig) -> tuple[FlippingConfig, int]:
    """Return a search's settings, and what is added to the seed of the reference batch."""
    changed = dict(SEARCHES[search])
    draw = changed.pop("draw", 0)
    return replace(settings, **changed), draw


def search_examples(run: Run, examples: int, searches: Sequence[str]) -> Iterator[dict]:
    """Yield a row for each example and search; the searches take turns, example by example."""
    device = resolve_device(run.config)
    split = load_split(run.config).to(device)
    model, outcome = load_evaluated_model(run, split, device)
    model.eval().requires_grad_(False)
    rows = choose_searched(split, outcome.correct.cpu(), examples)
    with compute_precision(measuring_precision(run.config, device), device):
        clock, ways = Clock(device), {}
        for name in searches:
            settings, draw = settings_of(name, run.config.flipping)
            other = Run.of(replace(run.config, flipping=settings))
            found = compute_flipping(other, split, model, rows, run.config.seed + draw)
            ways[name] = clock.around(name, partial(next, found))
        for _ in rows:
            for name, search_next in ways.items():
                before = clock.seconds[name]
                row = search_next() | {"search": name, "run": run.directory.parent.name}
                row |= {"seed": run.config.seed, "seconds": clock.seconds[name] - before}
                yield {column: row[column] for column in COLUMNS}


def describe(rows: Sequence[Mapping], exact: Sequence[Mapping], most: int) -> str:
    """Return one search's line: means, AUC, speed, and what differs from the exact search.

    An example comes out of a search when it flips, so that searches have orders of their own.
    """
    first, *_ = rows
    rows, exact = (sorted(found, key=lambda row: row["example"]) for found in (rows, exact))
    numbers = np.array([count_neurons(row, most) for row in rows])
    memorized = np.array([row["memorized"] == 1 for row in rows])
    known = np.array([count_neurons(row, most) for row in exact])
    same = sum(row["neurons_ids"] == other["neurons_ids"] for row, other in zip(rows, exact))
    area = compute_area(-numbers[memorized], -numbers[~memorized], seed=0)
    # The first example pays for the reference batch's graphs.
    later = [row for row in rows if row is not first]
    speed = sum(row["seconds"] for row in later) / max(1, sum(row["neurons"] for row in later))
    others = [abs(a["acc_remaining_after"] - b["acc_remaining_after"]) for a, b in zip(rows, exact)]
    return (
        f"{numbers[memorized].mean():.2f} and {numbers[~memorized].mean():.2f} neurons, AUC "
        f"{area.auc:.3f} ({area.low:.3f}-{area.high:.3f}), {speed:.3f} s a neuron; same neurons "
        f"{same}, same number {int((numbers == known).sum())} of {len(rows)}, mean difference "
        f"{np.abs(numbers - known).mean():.2f} (largest {np.abs(numbers - known).max():.0f}); "
        f"accuracy of the others differs by {statistics.mean(others):.2%}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run")
    parser.add_argument("--examples", type=int, default=60, help="memorized, and as many clean")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--output", type=Path, default=Path("agreement.csv"))
    return parser.parse_args()


def main() -> None:
    given = parse()
    with given.output.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for path in given.runs:
            run = Run.at(path)
            searched: dict[str, list[dict]] = {name: [] for name in given.searches}
            for row in search_examples(run, given.examples, given.searches):
                table.writerow(row)
                file.flush()
                searched[row["search"]].append(row)
            print(f"{run.directory}, {describe_device(resolve_device(run.config))}")
            for name, rows in searched.items():
                exact = searched[given.searches[0]]
                print(f"{name}: {describe(rows, exact, run.config.flipping.max_neurons)}")


if __name__ == "__main__":
    main()
