"""Erasure: make a trained network forget chosen noisy examples, by eight methods.

    python -m beyond.erasure configs/beyond/planted_glyphs.yaml

Reads finished runs, with example-tied dropout or without, and chooses noisy examples that the
network predicts as their wrong labels. Each method is applied to the final network; training again
without the chosen examples is the gold standard. Writes erasure.csv into each run: accuracy of the
chosen examples under their trained and under their true labels, accuracy of the other examples and
of the test set, and seconds.

dropping tied neurons, forgetting  Section 6.2 of the paper, on networks with example-tied dropout
closing flipping's neurons         Section 6.1: the union of the units that flip each chosen example
rewinding, retraining a layer      Section 5, on the layer whose rewinding costs noisy accuracy most
gradient ascent                    on the loss of the chosen examples, until all are wrong
fine-tuning                        on all other examples
training again                     from the same initialization, on all other examples
"""

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.agreement import closed_gate, compute_deletion, order_units
from beyond.bench import find_gates
from beyond.localizers import UnitGates, score_flipping
from data import Examples, Split
from data.random_streams import draw_rows, random_stream
from engine.config.schema import Config, DropoutConfig
from engine.errors import RunFailed
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples
from engine.progress import with_progress
from engine.runs.experiment import Experiment
from engine.runs.identity import (
    measuring_precision,
    measuring_settings,
    title,
    without_accounting,
)
from engine.runs.measurement import Measurement
from engine.runs.run import Run
from engine.runs.tables import HISTORY, ResultTable
from engine.training.build import load_final_model, load_split, make_model
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import evaluate, evaluate_split
from engine.training.loop import make_optimizer, train_epoch
from layer_retraining import reset_group, retraining_config
from models.dropout import dropout_mode, examples, forget, tied_layers
from models.layer_groups import LayerGroup, StagedModel, layer_groups

ERASURES = ResultTable(
    "erasure.csv",
    (
        "method", "layer", "examples", "units",
        "acc_erased", "acc_erased_true", "acc_others", "acc_others_clean", "acc_others_noisy",
        "acc_test", "seconds",
    ),
    text=("method", "layer"),
)  # fmt: skip
CRITICAL_BELOW = 0.2  # noisy accuracy of the epoch that layers are rewound to
SEARCH_STEPS = 10  # units that flipping closes for an example at most

State = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """A trained network, the examples to erase, and what the methods may use."""

    model: StagedModel  # final, in eval mode
    split: Split
    rows: Tensor  # of the chosen examples
    config: Config
    reference: Examples
    earlier: State  # weights of the latest kept epoch with a low noisy accuracy
    initial: State
    make_model: Callable[[], StagedModel]  # at its initialization

    @property
    def chosen(self) -> Split:
        return self.split.subset(self.rows)

    @property
    def rest(self) -> Split:
        keep = torch.ones_like(self.split.memorized)
        keep[self.rows] = False
        return self.split.subset(keep)


@dataclasses.dataclass(frozen=True)
class Erased:
    """A network that has forgotten, as a context manager yields it."""

    model: nn.Module
    units: int | None = None  # closed for all examples
    layer: str = ""  # changed alone


def choose_noisy(split: Split, correct: Tensor, count: int) -> Tensor:
    """Return rows of `count` noisy examples that are predicted as trained; fewer if there are."""
    learned = (split.memorized & correct).nonzero().flatten()
    order = random_stream("examples to erase").permutation(len(learned))
    return learned[torch.from_numpy(order[:count]).to(learned.device)]


# ---------------------------------------------------------------- methods on neurons


@contextmanager
def drop_tied(task: Task) -> Iterator[Erased]:
    """Drop the memorization neurons of every example; nothing is rescaled."""
    with dropout_mode(task.model, "drop"):
        yield Erased(task.model, sum(layer.masks.shape[1] for layer in tied_layers(task.model)))


@contextmanager
def forget_chosen(task: Task) -> Iterator[Erased]:
    """Drop the memorization neurons that are tied to a chosen example, for all examples."""
    with forget(task.model, task.split.index[task.rows]):
        units = sum(int(layer.forgotten.sum()) for layer in tied_layers(task.model))
        yield Erased(task.model, units)


def find_flipping_units(task: Task, gates: UnitGates, steps: int = SEARCH_STEPS) -> set[int]:
    """Return the units that the greedy search closes until each chosen example flips, united."""
    batch = Examples.of(task.split, task.rows)
    scores = score_flipping(task.model, gates, batch, task.reference, steps)
    orders = order_units(scores, gates.on(batch.index))
    flipped = compute_deletion(task.model, gates, batch, orders, range(steps + 1)) != batch.label
    found: set[int] = set()
    for row, order in enumerate(orders):
        when = flipped[:, row].nonzero()
        found.update(order[: int(when[0]) if len(when) else steps])
    return found


@contextmanager
def close_flipping_units(task: Task) -> Iterator[Erased]:
    """Close, for all examples, the units that flipping found for the chosen ones."""
    with find_gates(task.model, task.config, task.reference.images[:2]) as gates:
        found = find_flipping_units(task, gates)
        with gates.set(closed_gate(gates, [sorted(found)], task.split.label.device)):
            yield Erased(task.model, len(found))


# ---------------------------------------------------------------- methods on a layer


def rewind(model: StagedModel, group: LayerGroup, earlier: State) -> StagedModel:
    """Return a copy with the layer's weights of an earlier epoch; batch norms keep statistics."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in group.parameters(found).items():
            parameter.copy_(earlier[name])
    return found


def most_critical_layer(task: Task) -> tuple[LayerGroup, StagedModel]:
    """Return the layer whose rewinding leaves the least noisy accuracy, and the rewound model."""
    noisy, found = task.split.subset(task.split.memorized), []
    for group in layer_groups(task.model):
        model = rewind(task.model, group, task.earlier)
        correct = evaluate(model, noisy.images, noisy.label, index=noisy.index).correct
        found.append((correct.double().mean().item(), group.index, group, model))
    _, _, group, model = min(found, key=lambda entry: entry[:2])
    return group, model


@contextmanager
def rewind_critical(task: Task) -> Iterator[Erased]:
    """Rewind the most critical layer."""
    group, model = most_critical_layer(task)
    yield Erased(model, layer=group.name)


@contextmanager
def retrain_critical(task: Task) -> Iterator[Erased]:
    """Train the most critical layer from its initialization on clean examples only."""
    group, _ = most_critical_layer(task)
    model = reset_group(task.model, task.initial, group)
    config = retraining_config(task.config, group.index)
    config = dataclasses.replace(config, seed=task.config.seed)  # in the training's batch order
    train(model, task.split.subset(~task.split.memorized), config)
    yield Erased(model, layer=group.name)


# ---------------------------------------------------------------- methods on all weights


def train(model: StagedModel, split: Split, config: Config, **changes: object) -> None:
    """Train the model's free weights on a split, in the run's way but for some settings."""
    if split.n < 2:
        raise RunFailed(f"erasure: {split.n} examples to train on; it needs 2 or more")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], config.train)
    with compute_precision(config.precision, split.label.device):
        for epoch in range(1, config.train.epochs + 1):
            train_epoch(model, optimizer, split, config, epoch)
    model.eval()


def copy_to_train(model: StagedModel) -> StagedModel:
    return copy.deepcopy(model).requires_grad_(True)


@contextmanager
def ascend(task: Task) -> Iterator[Erased]:
    """Take gradient steps that raise the loss of the chosen examples until all are wrong.

    Batch norms stay in eval mode. `erasure.ascent_steps` bounds the number of steps.
    """
    model, batch = copy_to_train(task.model), Examples.of(task.split, task.rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.config.erasure.ascent_lr)
    for _ in range(task.config.erasure.ascent_steps):
        with examples(model, batch.index):
            logits = model(batch.images)
        if (logits.argmax(1) != batch.label).all():
            break
        optimizer.zero_grad()
        (-F.cross_entropy(logits, batch.label)).backward()
        optimizer.step()
    yield Erased(model)


@contextmanager
def fine_tune(task: Task) -> Iterator[Erased]:
    """Train the network for some more epochs on all other examples."""
    model, own = copy_to_train(task.model), task.config.erasure
    train(
        model, task.rest, task.config,
        epochs=own.fine_tuning_epochs, peak_lr=own.fine_tuning_lr, peak_epoch=0,
    )  # fmt: skip
    yield Erased(model)


@contextmanager
def train_again(task: Task) -> Iterator[Erased]:
    """Train from the same initialization on all other examples: the gold standard."""
    model = task.make_model()
    train(model, task.rest, task.config)
    yield Erased(model)


@contextmanager
def leave(task: Task) -> Iterator[Erased]:
    """The network as trained."""
    yield Erased(task.model)


Method = Callable[[Task], AbstractContextManager[Erased]]

METHODS: Mapping[str, Method] = {
    "as_trained": leave,
    "drop_tied_neurons": drop_tied,
    "forget": forget_chosen,
    "close_flipping_units": close_flipping_units,
    "rewind_critical_layer": rewind_critical,
    "retrain_critical_layer": retrain_critical,
    "gradient_ascent": ascend,
    "fine_tune_on_rest": fine_tune,
    "train_without": train_again,
}
TIED_ONLY = ("drop_tied_neurons", "forget")

# ---------------------------------------------------------------- the measurement


def compute_accuracies(model: nn.Module, split: Split, rows: Tensor) -> dict[str, float]:
    """Return accuracies of the chosen rows, of all others, and of the test set."""
    train_outcome, test = evaluate_split(model, split)
    others = torch.ones_like(split.memorized)
    others[rows] = False

    def accuracy(subset: Tensor) -> float:
        return train_outcome.correct[subset].double().mean().item()

    right = train_outcome.prediction[rows] == split.true_label[rows]
    return {
        "acc_erased": train_outcome.correct[rows].double().mean().item(),
        "acc_erased_true": right.double().mean().item(),
        "acc_others": accuracy(others),
        "acc_others_clean": accuracy(others & ~split.memorized),
        "acc_others_noisy": accuracy(others & split.memorized),
        "acc_test": test.correct.double().mean().item(),
    }


def compute_erasure(task: Task, name: str) -> dict[str, object]:
    """Apply one method, and return its row; the seconds leave the evaluation out."""
    started = time.perf_counter()
    with METHODS[name](task) as erased:
        seconds = time.perf_counter() - started
        found = compute_accuracies(erased.model, task.split, task.rows)
    units = float("nan") if erased.units is None else erased.units
    row = {"method": name, "layer": erased.layer, "examples": len(task.rows), "units": units}
    return {**row, **found, "seconds": round(seconds, 2)}


# ---------------------------------------------------------------- a run


def methods_of(run: Run) -> list[str]:
    """Return the methods that a run allows: some need example-tied dropout."""
    tied = run.config.dropout.kind == "example_tied"
    return [name for name in METHODS if tied or name not in TIED_ONLY]


def earlier_epoch(run: Run) -> int:
    """Return the latest epoch on disk but the last whose noisy accuracy was low, or the first."""
    history = HISTORY.read(run.directory)
    low = {int(row["epoch"]) for row in history if row["acc_noisy"] < CRITICAL_BELOW}
    kept = run.epochs_in("checkpoints")
    earlier = [epoch for epoch in kept if epoch in low and epoch < run.config.train.epochs]
    return max(earlier, default=kept[0])


def make_task(run: Run, split: Split, device: torch.device) -> Task:
    config = run.config
    model = load_final_model(run, split, device).eval().requires_grad_(False)
    correct = evaluate(model, split.images, split.label, index=split.index).correct
    rows = choose_noisy(split, correct, config.erasure.examples)
    if not len(rows):
        raise RunFailed("no noisy example is predicted as trained")
    referred = draw_rows(split.n, config.erasure.reference, "planted reference")
    return Task(
        model=model,
        split=split,
        rows=rows,
        config=config,
        reference=Examples.of(split, referred),
        earlier=run.read_checkpoint(earlier_epoch(run)),
        initial=run.read_checkpoint(0),
        make_model=lambda: make_model(config, split).to(device),
    )


def make_measurement(run: Run) -> Measurement:
    settings = dataclasses.asdict(run.config.erasure) | measuring_settings(run.config)
    own, dropout = run.config.retraining, run.config.dropout
    if dropout.kind == "none" and dropout.sites != DropoutConfig().sites:
        settings["sites"] = dropout.sites  # where units are closed; with dropout, the run's own
    return Measurement(run, ERASURES, settings | {"retraining": vars(own)})


def measure(run: Run) -> None:
    """Apply every method; each is a part."""
    measurement, device = make_measurement(run), resolve_device(run.config)
    split = load_split(run.config).to(device)
    rows = []
    with compute_precision(precision := measuring_precision(run.config, device), device):
        task = make_task(run, split, device)
        methods, about = methods_of(run), f"{title(run.config)}: erasure"
        for name in with_progress(methods, about, len(methods), "method"):
            rows.append(measurement.once(name, partial(compute_erasure, task, name)))
    measurement.finish(rows, device, precision)


def summarize(run: Run) -> str:
    """Return what is left of the chosen examples' trained labels, by method, in one line."""
    parts = (
        f"{row['method']} {row['acc_erased']:.0%} (others {row['acc_others']:.1%}, "
        f"test {row['acc_test']:.1%})"
        for row in ERASURES.read(run.directory)
    )
    return f"{title(run.config)}: still predicted as trained: {', '.join(parts)}"


def estimate_passes(run: Run) -> float:
    """Count passes of the training again, of fine-tuning and of a layer's retraining."""
    train, test = count_examples(run.config)
    epochs = run.config.train.epochs + run.config.erasure.fine_tuning_epochs
    epochs += run.config.retraining.epochs
    return 3 * train * epochs + len(METHODS) * (train + test)


EXPERIMENT = Experiment(
    key="erasure",
    command="python -m beyond.erasure",
    section="",
    question="How well does each method erase chosen examples from a trained network?",
    tables=(ERASURES,),
    figures=(),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    measurements=lambda run: [make_measurement(run)],
    epochs_read=lambda config: [0],
    training=without_accounting,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
