"""Does an example's gradient norm follow its distance to its class in feature space?

Open: the paper shows that mislabeled examples have large gradients, not which of them, nor why.
A large distance to the class that one is trained as would be a plain reason.

    python -m beyond.gradient_distance configs/beyond/gradient_distance.yaml

Reads finished runs. At some epochs, in eval mode, it measures for every training example the norm
of its own gradient, its loss, and how far its feature (what goes into the final linear layer) lies
from the mean feature of its class. Writes gradient_distance.csv, and the rank correlations of these
in gradient_distance_summary.csv, into every run. `gradient_distance.epochs` chooses the epochs, and
`gradient_distance.examples` measures a subset of the examples, the same for every seed.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import Split, normalize
from data.dataset import reason
from data.random_streams import draw_rows
from engine.config.kinds import listed_epochs
from engine.config.schema import Config
from engine.errors import RunFailed, UserError
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples
from engine.launch.memory import out_of_memory
from engine.progress import with_progress
from engine.runs.experiment import Experiment
from engine.runs.identity import title
from engine.runs.measurement import Measurement
from engine.runs.run import Run, load_weights
from engine.runs.tables import ResultTable
from engine.stats import compute_correlation
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import batch_size, evaluate
from models.dropout import examples
from models.layer_groups import StagedModel

MEASURED = ("gradient_norm", "loss", "distance", "distance_true")
DISTANCES = ResultTable("gradient_distance.csv", ("epoch", "example", "memorized", *MEASURED))
SUMMARY = ResultTable(
    "gradient_distance_summary.csv",
    ("epoch", "subset", "of", "with", "n", "rho", "low", "high"),
    text=("subset", "of", "with"),
)
PAIRS = (("gradient_norm", "distance"), ("gradient_norm", "distance_true"), ("loss", "distance"))
EPOCHS = 6  # by default
LARGEST_CHUNK = 64
GRADIENTS = 2**28  # numbers that the gradients of a chunk may take: 1 GB

Columns = dict[str, np.ndarray]  # column -> values [rows]


# ---------------------------------------------------------------- the measurement


def compute_gradient_norms(
    model: nn.Module, images: Tensor, label: Tensor, index: Tensor
) -> Tensor:
    """L2 norm [b], over all parameters, of the gradient of each example's own cross-entropy."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict, image: Tensor, label: Tensor, index: Tensor) -> Tensor:
        with examples(model, index[None]):
            logits = functional_call(model, parameters, normalize(image[None]))
        return F.cross_entropy(logits.float(), label[None])

    def norm(*example: Tensor) -> Tensor:
        gradient = grad(loss)(parameters, *example)
        # Squares of gradients as small as a fitted example's leave the range of float32.
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradient.values()]
        return torch.stack(norms).norm()

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
        try:
            return vmap(norm)(images, label, index)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise RunFailed(
                f"gradients of single examples failed (torch.func.vmap): {reason(error)}"
            ) from error


def chunk_size(model: nn.Module) -> int:
    """By the model alone: another chunk may round differently."""
    each = sum(parameter.numel() for parameter in model.parameters())
    return max(1, min(LARGEST_CHUNK, GRADIENTS // each))


def final_layer(model: StagedModel) -> nn.Linear:
    """Return the layer that computes the logits; of a network from a file, as its graph says."""
    if model.wiring is None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    else:
        names = [layer.name for layer in model.wiring.layers]
    final = model.get_submodule(names[-1]) if names else model
    if not isinstance(final, nn.Linear):
        place = names[-1] if names else "the network"
        raise RunFailed(f"{place}: the last layer is no nn.Linear, whose inputs are measured")
    return final


def compute_features(model: StagedModel, split: Split) -> tuple[Tensor, Tensor]:
    """Return the inputs of the final linear layer [n, d], and the losses [n]."""
    final = final_layer(model)
    found = []
    hook = final.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0].float()))
    try:
        loss = evaluate(model, split.images, split.label, index=split.index).loss
    finally:
        hook.remove()
    if any(part.ndim != 2 for part in found) or sum(map(len, found)) != split.n:
        raise RunFailed("the last layer takes more than one vector of an image; one is measured")
    return torch.cat(found), loss


def compute_distances(features: Tensor, toward: Tensor, split: Split) -> Tensor:
    """Distance [n] of each feature to the mean of the class `toward`, relative to that class.

    The mean is that of the class's clean examples without the example itself: it would draw the
    mean toward itself, and so seem closer than a noisy one, which no mean contains. The unit is the
    root mean square of the clean examples' own distances. nan for classes that have none.
    """
    clean, classes, size = ~split.memorized, split.classes, batch_size(features.device)
    count = torch.bincount(split.label[clean], minlength=classes).double()
    total = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device)
    for rows in clean.nonzero().flatten().split(size):  # in float64 a batch at a time
        total.index_add_(0, split.label[rows], features[rows].double())

    def distances(toward: Tensor) -> Tensor:
        parts = []
        for rows in torch.arange(split.n, device=toward.device).split(size):
            feature, kind = features[rows].double(), toward[rows]
            own = (clean[rows] & (split.label[rows] == kind)).double()[:, None]
            center = (total[kind] - own * feature) / (count[kind, None] - own)
            parts.append((feature - center).norm(dim=1))
        return torch.cat(parts)

    squares = torch.zeros_like(count)
    squares.index_add_(0, split.label[clean], distances(split.label)[clean].square())
    unit = (squares / count).sqrt()
    return distances(toward) / torch.where(unit > 0, unit, torch.nan)[toward]


def compute_epoch(model: nn.Module, split: Split, rows: Tensor, about: str) -> dict[str, Tensor]:
    """Measure the chosen rows, a column for each number; class means are of all examples."""
    features, loss = compute_features(model, split)
    found = {
        "loss": loss,
        "distance": compute_distances(features, split.label, split),
        "distance_true": compute_distances(features, split.true_label, split),
    }
    norms = []
    parts = rows.split(chunk_size(model))
    for part in with_progress(parts, about, len(parts), "chunk"):
        batch = (values[part] for values in (split.images, split.label, split.index))
        norms.append(compute_gradient_norms(model, *batch))
    columns = {name: values[rows] for name, values in found.items()}
    columns["gradient_norm"] = torch.cat(norms)
    return {name: values.double().cpu() for name, values in columns.items()}


def make_rows(epoch: int, split: Split, rows: Tensor, columns: Mapping[str, Tensor]) -> list[dict]:
    columns = {
        "example": split.index[rows].tolist(),
        "memorized": split.memorized[rows].int().tolist(),
        **{name: columns[name].tolist() for name in MEASURED},
    }
    return [{"epoch": epoch, **dict(zip(columns, row))} for row in zip(*columns.values())]


def make_summary(table: Columns, seed: int) -> list[dict[str, object]]:
    """Rank correlations at every epoch over the clean, the noisy, and all examples."""
    noisy, rows = table["memorized"] == 1, []
    subsets = {"clean": ~noisy, "noisy": noisy, "all": np.ones_like(noisy)}
    for epoch in np.unique(table["epoch"]):
        for subset, chosen in subsets.items():
            here = chosen & (table["epoch"] == epoch)
            for of, other in PAIRS:
                found = compute_correlation(table[of][here], table[other][here], seed)
                names = {"epoch": int(epoch), "subset": subset, "of": of, "with": other}
                rows.append(names | vars(found))
    return rows


# ---------------------------------------------------------------- a run


def epochs_read(config: Config) -> Sequence[int]:
    """Return the epochs that the configuration lists; 'all' means those on disk."""
    asked = config.gradient_distance.epochs
    return asked if isinstance(asked, tuple) else ()


def chosen_epochs(run: Run) -> list[int]:
    kept, asked = run.epochs_in("checkpoints"), run.config.gradient_distance.epochs
    if asked is None:
        places = np.linspace(0, len(kept) - 1, EPOCHS).round().astype(int)
        return [kept[place] for place in np.unique(places)]
    if asked == "all":
        return kept
    if missing := set(asked) - set(kept):
        raise UserError(
            f"gradient_distance.epochs: {min(missing)} is not allowed: {run.directory} has kept "
            f"the weights of the epochs {', '.join(map(str, kept))}"
        )
    return list(asked)


def measurements(run: Run) -> tuple[Measurement, Measurement]:
    """Return the table of examples, and its summary."""
    settings = {"examples": run.config.gradient_distance.examples}
    selection = {"epochs": chosen_epochs(run)}
    return (
        Measurement(run, DISTANCES, settings, selection),
        Measurement(run, SUMMARY, settings, selection),
    )


def measure_distances(run: Run, measurement: Measurement, device: torch.device) -> None:
    """Each epoch is a part, and epochs can be added to it later.

    In fp32 whatever the run was trained in: less holds no gradient of a fitted example.
    """
    split = load_split(run.config).to(device)
    model = load_final_model(run, split, device).eval()
    count = measurement.settings["examples"]
    rows = draw_rows(split.n, count, "gradient distance examples").to(device)
    table = []
    with compute_precision("fp32", device):
        for epoch in measurement.settings["epochs"]:
            key = f"epoch_{epoch:03d}"
            if (columns := measurement.part(key)) is None:
                load_weights(model, run.read_checkpoint(epoch), run.checkpoint_path(epoch))
                about = f"{title(run.config)}: gradients, epoch {epoch}"
                columns = compute_epoch(model, split, rows, about)
                measurement.save(key, columns)
            table += make_rows(epoch, split, rows, columns)
    measurement.finish(table, device, "fp32")


def read_table(run: Run) -> Columns:
    rows = DISTANCES.read(run.directory)
    return {column: np.array([row[column] for row in rows]) for column in DISTANCES.columns}


def read_summary(run: Run, subset: str, of: str, other: str) -> list[dict]:
    rows = SUMMARY.read(run.directory)
    return [row for row in rows if (row["subset"], row["of"], row["with"]) == (subset, of, other)]


def middle_and_last(epochs: Sequence[float]) -> list[int]:
    """Return the middle and the last of ascending epochs; the same one twice if there is one."""
    return [int(epochs[(len(epochs) - 1) // 2]), int(epochs[-1])]


def measure(run: Run) -> None:
    """Measure the examples of one run, and correlate their numbers."""
    device = resolve_device(run.config)
    distances, summary = measurements(run)
    if not distances.finished:
        measure_distances(run, distances, device)
    if not summary.finished:
        summary.finish(make_summary(read_table(run), run.config.seed), device, "fp32")


def summarize(run: Run) -> str:
    """The correlations at two epochs in one line, and whatever has no number."""
    table, parts = read_table(run), []
    for epoch in dict.fromkeys(middle_and_last(np.unique(table["epoch"]))):
        found = []
        for kind in ("clean", "noisy"):
            (row,) = [r for r in read_summary(run, kind, *PAIRS[0]) if r["epoch"] == epoch]
            interval = f"{row['rho']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            found.append(f"{kind} {interval if np.isfinite(row['rho']) else 'none'}")
        parts.append(f"epoch {epoch}: {', '.join(found)}")
    if not table["memorized"].any():
        parts.append("there are no noisy examples")
    for column, why in (
        ("gradient_norm", "the network diverged"),
        ("distance", "fewer than two clean examples of a class, or all the same, or no numbers"),
    ):
        if count := int((~np.isfinite(table[column])).sum()):
            parts.append(f"{count} of {len(table[column])} without a {column}: {why}")
    about = f"{title(run.config)}: rank correlation of gradient norm with distance"
    return f"{about}: {'; '.join(parts)}"


def estimate_passes(run: Run) -> float:
    """Forward for all examples, forward and backward for each that is measured, at every epoch."""
    train, _ = count_examples(run.config)
    asked = run.config.gradient_distance
    count = len(listed_epochs(asked.epochs, run.config.train.epochs)) if asked.epochs else EPOCHS
    return count * (train + 3 * min(asked.examples or train, train))


EXPERIMENT = Experiment(
    key="gradient_distance",
    command="python -m beyond.gradient_distance",
    section="",
    question=("Does an example's gradient norm follow its distance to its class in feature space?"),
    tables=(DISTANCES, SUMMARY),
    figures=("plotting.beyond.gradient_distance",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    measurements=measurements,
    epochs_read=epochs_read,
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
