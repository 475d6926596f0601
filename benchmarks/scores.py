"""Cost of each published score of every example, beside the training that it is taken from.

    python benchmarks/scores.py --run RUN [--examples 10]

Takes a finished run. What the training recorded is scored as beyond/example_scores.py scores it;
what takes trainings of its own (forgetting time, dropped, counterfactual memorization) is counted
in epochs, of which one is timed. As many examples are searched for neurons as the run's settings
say, unless told otherwise: the fewer they are, the less work they share. README.md beside this file
says how to read the numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from common import make_parser, print_head, timed

from beyond.example_scores import compute_depth, compute_dropped, recorded_scores
from data import Split
from engine.config.schema import Config, DropoutConfig
from engine.flipping.second_split import halves
from engine.launch.cli import find_runs
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split, make_model
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import (
    compute_error_norm,
    compute_margin,
    evaluate,
    evaluate_split,
)
from engine.training.loop import make_optimizer, train_epoch
from neuron_flipping import choose_searched, compute_flipping


def time_epoch(config: Config, split: Split, evaluated: Callable[..., object]) -> float:
    """Return the seconds of an epoch of plain training, with what is evaluated after it."""
    device = split.label.device
    model = make_model(config, split).to(device)
    optimizer = make_optimizer(model.parameters(), config.train)
    train_epoch(model, optimizer, split, config, 1)  # does not count

    def work() -> None:
        train_epoch(model, optimizer, split, config, 2)
        evaluated(model)

    return timed(work, device)[0]


def time_recording(model: torch.nn.Module, split: Split) -> float:
    """Return the seconds that margin and error norm add to the record of an epoch."""
    logits = evaluate(model, split.images, split.label, split.index).logits

    def work() -> None:
        for compute in (compute_margin, compute_error_norm):
            compute(logits, split.label).half().cpu()

    return timed(work, split.label.device)[0]


def time_neurons(run: Run, split: Split, model: torch.nn.Module, few: int) -> tuple[float, int]:
    """Return the seconds of searching `few` noisy and as many clean examples, and their number."""
    correct = evaluate(model, split.images, split.label, index=split.index).correct.cpu()
    rows = choose_searched(split, correct, few)
    frozen = model.eval().requires_grad_(False)
    search = compute_flipping(run, split, frozen, rows)
    return timed(lambda: list(search), split.label.device)[0], len(rows)


def measure(run: Run, few: int | None) -> Iterator[tuple[str, float, str]]:
    """Yield name, seconds, and what they are the seconds of."""
    config, device = run.config, resolve_device(run.config)
    split = load_split(config).to(device)
    model, epochs = load_final_model(run, split, device), config.train.epochs
    first, _ = (split.subset(rows.to(device)) for rows in halves(split.n, config.seed))

    whole = time_epoch(config, split, lambda model: evaluate_split(model, split))
    yield "training", epochs * whole, f"{epochs} epochs"
    yield "recording margin and error norm", epochs * time_recording(model, split), "all epochs"
    seconds = timed(partial(recorded_scores, run), device)[0]
    yield "all scores of the record", seconds, "seven scores, with reading the record"
    depth = partial(compute_depth, model, split, config.scores.neighbours)
    yield "prediction depth", timed(depth, device)[0], f"k = {config.scores.neighbours}"
    seconds, count = time_neurons(run, split, model, few or config.flipping.examples)
    yield "neurons", seconds, f"{count} examples"

    half = partial(evaluate, images=first.images, label=first.label)
    learn, forget = (time_epoch(config, first, work) for work in (lambda _: None, half))
    yield "forgetting time", 2 * epochs * (learn + forget), "two halves, both orders"
    tied = replace(config, dropout=DropoutConfig(kind="example_tied"))
    epoch = time_epoch(tied, split, lambda model: evaluate_split(model, split))
    dropped = timed(partial(compute_dropped, make_model(tied, split).to(device), split), device)[0]
    yield "dropped", epochs * epoch + dropped, "a training with example-tied dropout"
    everything = partial(evaluate, images=split.images, label=split.label)
    after = timed(partial(everything, model), device)[0]
    trainings = config.counterfactual.trainings
    total = trainings * (epochs * learn + after)
    yield "counterfactual memorization", total, f"{trainings} trainings on halves"


def main() -> None:
    parser = make_parser(__doc__, rounds=None)
    parser.add_argument("--run", required=True, help="the directory of a finished run")
    parser.add_argument("--examples", type=int, help="noisy examples to search for neurons")
    given = parser.parse_intermixed_args()
    (run,) = find_runs(given.run, given.overrides)
    with compute_precision(run.config.precision, resolve_device(run.config)):
        rows = list(measure(run, given.examples))
    print_head(run.config, load_split(run.config), rounds=1)
    training = next(seconds for name, seconds, _ in rows if name == "training")
    for name, seconds, about in rows:
        print(f"{name:<32}{seconds:>12.4f} s {seconds / training:>10.3%} of it   {about}")


if __name__ == "__main__":
    main()
