"""Layer rewinding (Section 5.1): which layers does a trained network need from late in training?

Claims: after rewinding the last layers to an epoch at which hardly any noisy example was learned,
the noisy examples remain correct, so they are not memorized there; the critical layers lie
elsewhere, differ between networks and data sets, and are critical for clean examples too (Figures
3, 15-17).

    python layer_rewinding.py configs/quickstart.yaml       # minutes on two CPU cores
    python layer_rewinding.py configs/paper/figure_3.yaml   # the paper's size: a GPU

Reads the checkpoints of finished runs and writes layer_rewinding.csv into each: accuracies on the
training set of the final network with one layer's weights from an earlier epoch. Only this layer
and those above it are recomputed, so G layers and T epochs cost about G * T / 2 evaluations of the
training set. Memory holds the weights of all T epochs and one batch.
"""

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from data import normalize
from engine.config.kinds import listed_epochs
from engine.config.schema import Config
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples, count_groups
from engine.progress import with_progress
from engine.runs.experiment import Experiment
from engine.runs.identity import measuring_precision, measuring_settings, title
from engine.runs.measurement import Measurement
from engine.runs.run import Run, load_weights
from engine.runs.tables import HISTORY, ResultTable
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import batch_size
from models.dropout import examples, tied_layers
from models.layer_groups import LayerGroup, StagedModel, layer_groups, run_stages

REWINDING = ResultTable(
    "layer_rewinding.csv", ("group", "epoch", "acc_clean", "acc_noisy", "acc_total")
)

Counts = dict[int, list[list[int]]]  # epoch -> group -> correct examples, clean and noisy


# ---------------------------------------------------------------- the measurement


def load_earlier_groups(
    run: Run, final: StagedModel, epochs: Iterable[int], batchnorm: str
) -> dict[int, list[LayerGroup]]:
    """Load the layer groups of the model after each of these epochs, in the final model's mode.

    Running statistics of batch norms are those of the final model, unless `batchnorm` is
    'checkpoint'.
    """
    earlier = {}
    # Dropout masks are not weights: all copies share the final model's layers.
    shared = {id(layer): layer for layer in tied_layers(final)}
    for epoch in epochs:
        model = copy.deepcopy(final, dict(shared))
        load_weights(model, run.read_checkpoint(epoch), run.checkpoint_path(epoch))
        if batchnorm == "final":
            for own, last in zip(model.buffers(), final.buffers()):
                own.copy_(last)
        earlier[epoch] = layer_groups(model)
    return earlier


@torch.no_grad()
def compute_predictions(
    final: Sequence[LayerGroup], earlier: Mapping[int, Sequence[LayerGroup]], images: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the predictions [b] of the final model, and [groups, b] with each group rewound.

    The activations below a group are computed once for all epochs.
    """
    state = normalize(images)
    predicted = {epoch: [] for epoch in earlier}
    for group in final:
        for epoch, groups in earlier.items():
            rewound = groups[group.index].forward(state)
            logits = run_stages(final, rewound, start=group.index + 1)
            predicted[epoch].append(logits.argmax(1))
        state = group.forward(state)
    return state.argmax(1), {epoch: torch.stack(rows) for epoch, rows in predicted.items()}


def compute_counts(
    final: Sequence[LayerGroup],
    earlier: Mapping[int, Sequence[LayerGroup]],
    last_epoch: int,
    images: Tensor,
    label: Tensor,
    memorized: Tensor,
) -> Counts:
    """Count the batch's clean and noisy examples that each rewound model classifies correctly.

    Rewinding to the last epoch changes nothing, so it takes the final model's own predictions.
    """
    own, predicted = compute_predictions(final, earlier, images)
    predicted[last_epoch] = own.expand(len(final), -1)
    correct = torch.stack(list(predicted.values())) == label  # [epochs, groups, b]
    by_subset = [(correct & subset).sum(2) for subset in (~memorized, memorized)]
    return dict(zip(predicted, torch.stack(by_subset, dim=2).tolist()))


def make_rows(
    parts: Sequence[Counts], epochs: Sequence[int], memorized: Tensor
) -> list[dict[str, float]]:
    """Make the table: every group at every epoch; nan for an empty subset."""
    noisy = int(memorized.sum())
    sizes = torch.tensor([len(memorized) - noisy, noisy], dtype=torch.float64)
    correct = {epoch: torch.tensor([part[epoch] for part in parts]).sum(0) for epoch in epochs}
    rows = []
    for group in range(len(correct[epochs[0]])):
        for epoch in epochs:
            counts = correct[epoch][group]
            row = dict(zip(("acc_clean", "acc_noisy"), (counts / sizes).tolist()))
            row["acc_total"] = counts.sum().item() / len(memorized)
            rows.append({"group": group, "epoch": epoch} | row)
    return rows


# ---------------------------------------------------------------- a run


def epochs_read(config: Config) -> list[int]:
    """List the epochs that layers are rewound to."""
    return listed_epochs(config.rewinding.epochs, config.train.epochs)


def make_measurement(run: Run) -> Measurement:
    settings = {"batchnorm": run.config.rewinding.batchnorm} | measuring_settings(run.config)
    return Measurement(run, REWINDING, settings, {"epochs": epochs_read(run.config)})


def measure(run: Run) -> None:
    """Measure in one pass over the training set. A batch is a part; later epochs can be added."""
    config, last = run.config, run.config.train.epochs
    measurement = make_measurement(run)
    device = resolve_device(config)
    split = load_split(config).to(device)
    model = load_final_model(run, split, device).eval()
    final, epochs = layer_groups(model), epochs_read(config)

    size = batch_size(device)
    batches = [slice(start, start + size) for start in range(0, split.n, size)]
    parts: list[Counts] = [measurement.part(part_key(rows)) or {} for rows in batches]
    missing = {epoch for epoch in epochs for part in parts if epoch not in part}
    earlier = load_earlier_groups(run, model, missing - {last}, config.rewinding.batchnorm)

    with compute_precision(precision := measuring_precision(config, device), device):
        for rows, part in with_progress(zip(batches, parts), title(config), len(parts), "batch"):
            if wanted := missing - part.keys():
                rewound = {epoch: earlier[epoch] for epoch in wanted - {last}}
                batch = (t[rows] for t in (split.images, split.label, split.memorized))
                with examples(model, split.index[rows]):
                    part |= compute_counts(final, rewound, last, *batch)
                measurement.save(part_key(rows), part)
    measurement.finish(make_rows(parts, epochs, split.memorized), device, precision)


def part_key(rows: slice) -> str:
    return f"examples_{rows.start:06d}_{rows.stop:06d}"


def summarize(run: Run) -> str:
    """Return the noisy accuracy with each layer rewound to the first epoch.

    Also with the last layer at the latest epoch whose own noisy accuracy was below 20%.
    """
    rows = REWINDING.read(run.directory)
    noisy = {(int(row["group"]), int(row["epoch"])): row["acc_noisy"] for row in rows}
    first, top = min(epoch for _, epoch in noisy), max(group for group, _ in noisy)
    groups = " ".join(f"{noisy[group, first]:.0%}" for group in range(top + 1))
    line = f"{title(run.config)}: noisy accuracy with one layer at epoch {first}: {groups}"
    history = HISTORY.read(run.directory)
    low = [row for row in history if (top, row["epoch"]) in noisy and row["acc_noisy"] < 0.2]
    if low:
        epoch, then = int(low[-1]["epoch"]), low[-1]["acc_noisy"]
        line += f"; last layer at epoch {epoch} (whole network {then:.1%}): {noisy[top, epoch]:.1%}"
    return line


def estimate_passes(run: Run) -> float:
    """Count half of the network per rewound layer and epoch; the last epoch costs nothing."""
    train, _ = count_examples(run.config)
    return train * (1 + count_groups(run.config) * (len(epochs_read(run.config)) - 1) / 2)


EXPERIMENT = Experiment(
    key="rewinding",
    command="python layer_rewinding.py",
    section="5.1, B.1",
    question=("Which accuracy is lost when one layer is rewound to an earlier epoch?"),
    tables=(REWINDING,),
    figures=("plotting.layers",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    measurements=lambda run: [make_measurement(run)],
    epochs_read=epochs_read,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
