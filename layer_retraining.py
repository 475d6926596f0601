"""Layer retraining (Section 5.2): is a layer needed for memorization, or is it redundant?

Claim: reset one layer to its initialization, freeze all others, and train it on clean examples
only: noisy examples, which it never sees, become correct too, at least at some epoch (Figures 4,
18, 19). A high peak shows that the layer is redundant for memorization; a low peak shows nothing.
Both the peak and the end are reported.

    python layer_retraining.py configs/quickstart.yaml       # minutes on two CPU cores
    python layer_retraining.py configs/paper/figure_4.yaml   # the paper's size: a GPU

Reads finished runs and writes layer_retraining.csv into each. Cost per layer: 20 epochs, forward
through the whole network and backward from its end to the layer.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from data import Split, batch_rows
from engine.config.schema import Config
from engine.errors import RunFailed
from engine.launch.cli import run_script
from engine.launch.estimates import count_examples, count_groups
from engine.progress import progress_bar
from engine.runs.experiment import Experiment
from engine.runs.identity import title
from engine.runs.measurement import Measurement
from engine.runs.run import Run, load_weights
from engine.runs.tables import ResultTable
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, derive_seed, resolve_device
from engine.training.evaluation import evaluate, mean_by_subset
from engine.training.loop import make_optimizer, train_epoch
from models.layer_groups import LayerGroup, StagedModel, layer_groups

RETRAINING = ResultTable(
    "layer_retraining.csv", ("group", "epoch", "acc_clean", "acc_noisy", "acc_train")
)


# ---------------------------------------------------------------- the measurement


def reset_group(
    final: StagedModel, initial: Mapping[str, Tensor], group: LayerGroup
) -> StagedModel:
    """Copy the final model with one group at its initialization and all else frozen.

    Running statistics of batch norms are not frozen: the group's are reset, and all of them are
    updated while training.
    """
    model = copy.deepcopy(final)
    state = model.state_dict()
    for name in filter(group.owns, state):
        state[name].copy_(initial[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group.owns(name))
    return model


def retraining_config(config: Config, group: int) -> Config:
    """Return the run's configuration with the schedule and the batch order of retraining."""
    schedule = {
        "schedule": "triangle",
        "epochs": config.retraining.epochs,
        "peak_lr": config.retraining.peak_lr,
        "peak_epoch": config.retraining.peak_epoch,
    }
    return dataclasses.replace(
        config,
        seed=derive_seed("retraining", config.seed, group),
        train=dataclasses.replace(config.train, **schedule),
    )


def compute_retraining(
    model: StagedModel,
    group: LayerGroup,
    split: Split,
    config: Config,
    after_step: Callable[[], object] = lambda: None,
) -> Iterator[dict[str, float]]:
    """Train the group on clean examples; yield the accuracies at epoch 0 and after each epoch.

    All parameters outside the group must be frozen; autograd then stops at the group.
    """
    clean, train = split.subset(~split.memorized), config.train
    optimizer = make_optimizer(group.parameters(model).values(), train)
    perfect = 0
    for epoch in range(train.epochs + 1):
        if epoch > 0:
            train_epoch(model, optimizer, clean, config, epoch, after_step=after_step)
        outcome = evaluate(model, split.images, split.label, index=split.index)
        accuracy = mean_by_subset(outcome.correct, split.memorized, "acc")
        accuracy["acc_train"] = accuracy.pop("acc_total")
        yield {"group": group.index, "epoch": epoch} | accuracy
        perfect = perfect + 1 if epoch > 0 and accuracy["acc_clean"] == 1 else 0
        if perfect == config.retraining.patience:
            return


# ---------------------------------------------------------------- a run


def make_measurement(run: Run) -> Measurement:
    return Measurement(run, RETRAINING, dataclasses.asdict(run.config.retraining))


def measure(run: Run) -> None:
    """Retrain each group; each group is a part that can be resumed."""
    config, measurement = run.config, make_measurement(run)
    device = resolve_device(config)
    split = load_split(config).to(device)
    final = load_final_model(run, split, device)
    if (clean := int((~split.memorized).sum())) < 2:
        raise RunFailed(f"{clean} clean examples; retraining needs 2 or more")
    initial = run.read_checkpoint(0)
    load_weights(copy.deepcopy(final), initial, run.checkpoint_path(0))  # checks the shapes

    groups = layer_groups(final)
    steps = config.retraining.epochs * len(batch_rows(clean, config.train.batch_size))
    rows = []
    with (
        progress_bar(title(config), len(groups) * steps, "step") as bar,
        compute_precision(config.precision, device),
    ):
        for group in groups:
            part = measurement.part(part_key := f"group_{group.index}")
            if part is None:
                model = reset_group(final, initial, group)
                own = retraining_config(config, group.index)
                try:
                    part = list(compute_retraining(model, group, split, own, bar.update))
                except RunFailed as error:
                    raise RunFailed(
                        f"{title(config)}: retraining {group.name}: {error}. "
                        f"A lower retraining.peak_lr than {config.retraining.peak_lr:g} may help"
                    ) from None
                measurement.save(part_key, part)
            rows += part
            bar.update((group.index + 1) * steps - bar.n)
    measurement.finish(rows, device)


def summarize(run: Run) -> str:
    """Return the highest and the last noisy accuracy of every layer."""
    noisy: dict[int, list[float]] = {}
    for row in RETRAINING.read(run.directory):
        noisy.setdefault(int(row["group"]), []).append(row["acc_noisy"])
    groups = ", ".join(f"{max(a[1:]):.0%} > {a[-1]:.0%}" for a in noisy.values())
    return f"{title(run.config)}: noisy accuracy with each layer retrained, peak > end: {groups}"


def estimate_passes(run: Run) -> float:
    """Count forward, backward through half of the network on average, and evaluation."""
    train, _ = count_examples(run.config)
    return count_groups(run.config) * run.config.retraining.epochs * train * 3


EXPERIMENT = Experiment(
    key="retraining",
    command="python layer_retraining.py",
    section="5.2, B.2",
    question=(
        "When one layer is reset and trained on clean examples only, all others frozen, do the "
        "memorized examples become correct again?"
    ),
    tables=(RETRAINING,),
    figures=("plotting.layers",),
    measure=measure,
    summarize=summarize,
    passes=estimate_passes,
    measurements=lambda run: [make_measurement(run)],
    epochs_read=lambda config: [0],
)

if __name__ == "__main__":
    sys.exit(run_script(EXPERIMENT, __doc__))
