"""Every key of a configuration: its default, allowed values, meaning, and conflicts between keys.

The defaults are Section 3 of the paper.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.kinds import (
    bounds,
    epochs,
    flag,
    integer,
    integers,
    listed_epochs,
    mapping,
    names,
    number,
    one_of,
    one_of_or,
    option,
    optional,
    some_of,
    text,
)
from models import MODELS, is_name_of_network, model_options

DATASETS = ("cifar10", "mnist", "svhn", "glyphs", "npz")
HUMAN_COLUMNS = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")
OTHER = "torchvision:NAME"  # stands for every network that is not ours
# The experiments by name, and the module that declares each; the first one trains for the others.
EXPERIMENTS = {
    "gradients": "gradient_accounting",
    "rewinding": "layer_rewinding",
    "retraining": "layer_retraining",
    "flipping": "neuron_flipping",
    "dropout": "example_tied_dropout",
    "gradient_distance": "beyond.gradient_distance",
    "planted": "beyond.planted_memorization",
    "erasure": "beyond.erasure",
    "scores": "beyond.example_scores",
    "counterfactual": "beyond.counterfactual",
}
OF_THE_PAPER = ("rewinding", "retraining", "flipping", "dropout")


@dataclass(frozen=True)
class HumanLabelsConfig:
    path: str | None = option(
        None, optional(text()), "CIFAR-10N's file; by default under data.root"
    )
    column: str = option("aggre_label", one_of(*HUMAN_COLUMNS), "the annotation to train on")


@dataclass(frozen=True)
class DataConfig:
    name: str = option("cifar10", one_of(*DATASETS), "the data set; npz is your own")
    root: str = option("datasets", text(), "folder of the data sets, also for downloads")
    path: str | None = option(None, optional(text()), "npz: the file with x_train, y_train, ...")
    train_size: int | None = option(None, optional(integer(2)), "train on a fixed random subset")
    test_size: int | None = option(None, optional(integer(1)), "test on a fixed random subset")
    split: str = option(
        "noise", one_of("noise", "human", "atypical"), "kind of the memorized examples"
    )
    noise_rate: float = option(0.1, number(0, 1), "fraction of wrong labels (split: noise)")
    noise_seed: int = option(0, integer(0), "seed of the wrong labels (split: noise)")
    human_labels: HumanLabelsConfig = dataclasses.field(default_factory=HumanLabelsConfig)
    c_scores: str | None = option(
        None, optional(text()), "file of C-scores; by default under data.root (split: atypical)"
    )
    c_score_threshold: float = option(
        0.5, number(0, 1), "scores below are atypical (split: atypical)"
    )
    keep_memorized: bool = option(
        False,
        flag(),
        "keep all memorized examples; train_size samples clean ones (split: human, atypical)",
    )
    augment: bool = option(
        False, flag(), "random crop and mirror while training; mirrored digits keep their label"
    )


@dataclass(frozen=True)
class ModelConfig:
    name: str = option(
        "resnet9",
        one_of_or(MODELS, is_name_of_network, "torchvision:NAME or FILE.py:CALLABLE"),
        "the network; docs/your_network.md",
    )
    layers: tuple[str, ...] | None = option(
        None, optional(names()), "your network: modules that begin a layer; null: its children"
    )
    options: Mapping[str, object] | None = option(
        None, optional(mapping()), "your network: further arguments of its callable"
    )
    width: float = option(1.0, number(above=0, most=16), "resnet9: channels, as a multiple")
    patch: int = option(2, integer(1, 256), "vit_small: pixels along a patch's side")
    dim: int = option(512, integer(1, 65536), "vit_small: features of a token")
    depth: int = option(6, integer(1, 256), "vit_small: transformer blocks")
    heads: int = option(8, integer(1, 256), "vit_small: attention heads")
    dim_head: int = option(64, integer(1, 65536), "vit_small: features of a head")
    mlp_dim: int = option(512, integer(1, 65536), "vit_small: features inside a block's MLP")
    dropout: float = option(0.1, number(0, 0.99), "vit_small: its own dropout while training")

    @property
    def arguments(self) -> dict[str, object]:
        """Map the names of the keyword arguments that this model takes to their values."""
        return {key: getattr(self, key) for key in sorted(model_options(self.name))}


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = option(50, integer(1, 100_000), "passes over the training set")
    batch_size: int = option(512, integer(2), "examples in a step")
    peak_lr: float = option(0.1, number(above=0), "the schedule's highest learning rate")
    peak_epoch: int = option(10, integer(0), "the epoch that ends at peak_lr")
    momentum: float = option(0.9, number(0, 0.9999), "SGD's momentum")
    weight_decay: float = option(5.0e-4, number(0), "L2 penalty, added to the gradient by SGD")
    schedule: str = option(
        "triangle", one_of("triangle", "warmup_cosine"), "shape of the learning rate after the peak"
    )
    account_gradients: bool = option(
        True,
        flag(),
        "sum clean and noisy gradients separately (Section 4); takes a second backward pass",
    )
    compile: bool | str = option(
        False,
        flag("graphs"),
        "torch.compile for the training; graphs: with CUDA graphs",
    )


@dataclass(frozen=True)
class CheckpointsConfig:
    keep: str | tuple[int, ...] = option(
        "all", epochs(), "epochs whose weights stay on disk, beside the last one"
    )


@dataclass(frozen=True)
class RewindingConfig:
    epochs: str | tuple[int | str, ...] = option(
        (0, 5, 10, "..."), epochs(open_ended=True), "epochs that each layer is rewound to"
    )
    batchnorm: str = option(
        "final",
        one_of("final", "checkpoint"),
        "batch-norm statistics of the rewound layer: final or of its epoch",
    )


@dataclass(frozen=True)
class RetrainingConfig:
    epochs: int = option(20, integer(1), "passes over the clean examples, for each layer")
    peak_lr: float = option(0.1, number(above=0), "the triangle's highest learning rate")
    peak_epoch: int = option(10, integer(0), "the epoch that ends at peak_lr")
    patience: int | None = option(
        None, optional(integer(1)), "stop after this many epochs at 100% clean accuracy"
    )


# The keys of an exact search, as `flipping.exact` sets them.
EXACT_SEARCH = {
    "reference_copies": None,
    "reference_rows": None,
    "refresh_reference": 1,
    "remaining_rows": None,
}


@dataclass(frozen=True)
class FlippingConfig:
    examples: int = option(1000, integer(1), "memorized examples to search, and as many clean ones")
    noise_copies: int = option(5, integer(1), "noisy copies whose mean output is the prediction")
    noise_ratio: float = option(0.01, number(0), "L2 norm of the noise, relative to its image's")
    reference_batch: int = option(
        512, integer(1), "training examples whose loss must stay low; at most all"
    )
    max_neurons: int = option(100, integer(1), "neurons after which a search stops")
    ablate: str = option(
        "activation", one_of("activation", "weight"), "quantity that a closed gate multiplies by 0"
    )
    remaining: int | None = option(
        5000,
        optional(integer(2)),
        "training examples for the accuracy after removal, half as many test images; null: all",
    )
    exact: bool = option(
        False, flag(), "no estimates: all of each batch, in noise_copies copies, at every step"
    )
    reference_copies: int | None = option(
        1, optional(integer(1)), "unless exact: noisy copies of the reference batch; null: as many"
    )
    reference_rows: int | None = option(
        128, optional(integer(1)), "unless exact: examples in a sample of the batch; null: all"
    )
    refresh_reference: int = option(
        1, integer(1), "unless exact: steps between gradients of the reference batch"
    )
    remaining_rows: int | None = option(
        1000,
        optional(integer(2)),
        "unless exact: examples in a sample of the remaining ones; null: all",
    )
    second_split: bool = option(
        False, flag(), "measure forgetting times: train on one half, then on the other"
    )

    def spelled_out(self) -> "FlippingConfig":
        """Return the same search with `exact` written as the keys that it overrides."""
        return dataclasses.replace(self, exact=False, **EXACT_SEARCH) if self.exact else self


@dataclass(frozen=True)
class ScoresConfig:
    el2n_epoch: int | None = option(
        None, optional(integer(1)), "epoch of EL2N; null: a tenth of the training, rounded up"
    )
    neighbours: int | None = option(
        30, optional(integer(1)), "k of prediction depth's k-NN probes; null: no prediction depth"
    )


@dataclass(frozen=True)
class CounterfactualConfig:
    trainings: int = option(
        100, integer(2, 100_000), "networks, each trained on a random half of the training set"
    )


@dataclass(frozen=True)
class DropoutConfig:
    kind: str = option(
        "none",
        one_of("example_tied", "standard", "sparse", "none"),
        "dropout in example_tied_dropout.py; the other scripts train without",
    )
    p_gen: float = option(
        0.4, number(above=0, most=1), "share of neurons always on; share that the baselines keep"
    )
    p_mem: float = option(
        0.2, number(0, 1), "example_tied: probability that another neuron is on for an example"
    )
    standard: str = option(
        "keep", one_of("keep", "drop"), "standard: p_gen is the probability to keep, or to drop"
    )
    units: str = option(
        "activations",
        one_of("activations", "channels"),
        "standard: what is drawn, single activations or whole channels",
    )
    sites: str | tuple[str, ...] = option(
        "blocks",
        names("blocks", "layers"),
        "behind each block; resnet9: or all convolutions; or behind the modules of these names",
    )
    seed: int = option(0, integer(0, 2**31 - 1), "seed of the masks (example_tied, sparse)")
    rescale: str = option(
        "none", one_of("none", "paper"), "paper: multiply by (p_gen + p_mem) / p_gen after dropping"
    )
    batchnorm: str = option(
        "running",
        one_of("running", "recalibrated"),
        "statistics after dropping: as trained, or re-estimated",
    )
    forget: tuple[int, ...] = option(
        (1, 3, 10), integers(1), "numbers of noisy examples to forget at a time"
    )
    forget_draws: int = option(10, integer(1), "independent draws per size")


@dataclass(frozen=True)
class GradientDistanceConfig:
    epochs: str | tuple[int, ...] | None = option(
        None, optional(epochs()), "epochs to measure at; null: six of those on disk, evenly spread"
    )
    examples: int | None = option(
        None, optional(integer(1)), "measure a fixed random subset of the training examples"
    )


@dataclass(frozen=True)
class PlantedConfig:
    examples: int = option(30, integer(2), "noisy examples to localize, and as many clean ones")
    reference: int = option(50, integer(2), "training examples that a score may compare with")
    others: int = option(50, integer(1), "training and test examples for the cost of deletion")
    channels: int = option(3, integer(0), "single channels planted in each of two layers; 0: none")
    chosen: int = option(3, integer(1), "clean examples whose new label a channel has to hold")


@dataclass(frozen=True)
class ErasureConfig:
    examples: int = option(20, integer(1), "learned noisy examples to erase")
    reference: int = option(50, integer(2), "reference batch of the search that closes units")
    ascent_lr: float = option(0.001, number(above=0), "gradient ascent: learning rate")
    ascent_steps: int = option(500, integer(1), "gradient ascent: steps at most")
    fine_tuning_lr: float = option(0.01, number(above=0), "fine-tuning: peak learning rate")
    fine_tuning_epochs: int = option(5, integer(1), "fine-tuning: passes over the other examples")


@dataclass(frozen=True)
class PlottingConfig:
    window: tuple[int, ...] | None = option(
        None,
        optional(bounds(most=2)),
        "epochs of Figures 1 and 8; null: 30% to 40% of the training (15 to 20 of 50)",
    )
    windows: tuple[int, ...] | None = option(
        None,
        optional(bounds()),
        "bounds of the windows of Figure 10; null: 9 of 10% of the training (0, 5, ..., 45 of 50)",
    )


@dataclass(frozen=True)
class SlurmConfig:
    partition: str | None = option(None, optional(text()), "partition; null: the cluster's default")
    account: str | None = option(
        None, optional(text()), "account to charge; null: the user's default"
    )
    gpus: int = option(1, integer(0), "GPUs per job (one job per run)")
    cpus: int = option(4, integer(1), "cores per job")
    memory: int | None = option(
        None, optional(integer(1)), "GB per job; null: the cluster's default"
    )
    time: int = option(240, integer(1), "minutes per job; then it is requeued and resumes")
    restarts: int = option(100, integer(0), "times that a job may run out of time")
    parallel: int = option(64, integer(1), "largest number of simultaneous jobs")


@dataclass(frozen=True)
class Config:
    name: str = option("experiment", text(), "title of reports")
    output_dir: str = option("runs", text(), "folder of the run directories")
    experiments: str | tuple[str, ...] = option(
        "all",
        some_of(*list(EXPERIMENTS)[1:]),
        "measurements that reproduce.py makes after training; all: rewinding, retraining, "
        "flipping, dropout",
    )
    device: str = option("auto", one_of("auto", "cpu", "cuda"), "auto: the GPU if there is one")
    precision: str = option(
        "auto",
        one_of("auto", "fp32", "tf32", "bf16"),
        "precision of matrix products and convolutions in training; auto: tf32 on a GPU of compute "
        "capability 8 or more, fp32 elsewhere",
    )
    measure_precision: str = option(
        "auto",
        one_of("auto", "fp32", "tf32", "bf16"),
        "precision of measurements on a trained network; auto: as trained, but never bf16, and "
        "tf32 only where the device has it",
    )
    seed: int = option(
        0, integer(0, 2**31 - 1), "initialization and batch order; a list is a sweep"
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoints: CheckpointsConfig = dataclasses.field(default_factory=CheckpointsConfig)
    rewinding: RewindingConfig = dataclasses.field(default_factory=RewindingConfig)
    retraining: RetrainingConfig = dataclasses.field(default_factory=RetrainingConfig)
    flipping: FlippingConfig = dataclasses.field(default_factory=FlippingConfig)
    dropout: DropoutConfig = dataclasses.field(default_factory=DropoutConfig)
    gradient_distance: GradientDistanceConfig = dataclasses.field(
        default_factory=GradientDistanceConfig
    )
    planted: PlantedConfig = dataclasses.field(default_factory=PlantedConfig)
    erasure: ErasureConfig = dataclasses.field(default_factory=ErasureConfig)
    scores: ScoresConfig = dataclasses.field(default_factory=ScoresConfig)
    counterfactual: CounterfactualConfig = dataclasses.field(default_factory=CounterfactualConfig)
    plotting: PlottingConfig = dataclasses.field(default_factory=PlottingConfig)
    slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)


def impossible(config: Config) -> tuple[str, str] | None:
    """Return the first key whose value conflicts with others, and the reason; None without any."""
    data, model, train = config.data, config.model, config.train
    if train.peak_epoch > train.epochs:
        return "train.peak_epoch", (
            f"{train.peak_epoch} is not allowed: at most train.epochs, which is {train.epochs}"
        )
    if config.checkpoints.keep != "all" and max(config.checkpoints.keep) > train.epochs:
        return "checkpoints.keep", (
            f"{max(config.checkpoints.keep)} is not allowed: at most train.epochs, {train.epochs}"
        )
    if (latest := max(listed_epochs(config.rewinding.epochs, train.epochs))) > train.epochs:
        return "rewinding.epochs", (
            f"{latest} is not allowed: at most train.epochs, which is {train.epochs}"
        )
    if config.retraining.peak_epoch > config.retraining.epochs:
        return "retraining.peak_epoch", (
            f"{config.retraining.peak_epoch} is not allowed: at most retraining.epochs, "
            f"which is {config.retraining.epochs}"
        )
    if (config.scores.el2n_epoch or 1) > train.epochs:
        return "scores.el2n_epoch", (
            f"{config.scores.el2n_epoch} is not allowed: at most train.epochs, "
            f"which is {train.epochs}"
        )
    if (data.name == "npz") != (data.path is not None):
        return "data.path", (
            "null is not allowed: data.name npz needs the file's path"
            if data.path is None
            else f"{data.path!r} is not allowed: only data.name npz takes a path, not {data.name}"
        )
    if data.split == "human" and data.name not in ("cifar10", "npz"):
        return "data.split", f"'human' is not allowed: only for cifar10 and npz, not {data.name}"
    if data.split == "atypical" and data.name == "svhn":
        return "data.split", "'atypical' is not allowed: no scores are published for svhn"
    if data.keep_memorized and (data.split == "noise" or data.train_size is None):
        return "data.keep_memorized", (
            "true is not allowed: it goes with data.train_size and split human or atypical"
        )
    if config.dropout.sites == "layers" and model.name != "resnet9":
        return "dropout.sites", (
            f"'layers' is not allowed: {model.name} takes dropout behind its blocks only"
        )
    dropout = config.dropout
    if (dropout.kind, dropout.standard, dropout.p_gen) == ("standard", "drop", 1):
        return "dropout.p_gen", "1 is not allowed: with dropout.standard drop nothing is kept"
    own_keys = set().union(*map(model_options, (*MODELS, OTHER)))
    for key in sorted(own_keys - model_options(model.name)):
        if getattr(model, key) != getattr(ModelConfig, key):
            known = (*MODELS, OTHER)
            takers = ", ".join(name for name in known if key in model_options(name))
            return f"model.{key}", (
                f"{getattr(model, key)!r} is not allowed: only {takers} takes it, not {model.name}"
                "; remove it"
            )
    return None
