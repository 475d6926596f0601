"""Every key of a configuration: its default, what it may be, what it means, and what goes together.

The defaults are Section 3 of the paper.
"""

import dataclasses
from dataclasses import dataclass

from engine.config.kinds import (
    epochs,
    flag,
    integer,
    integers,
    listed_epochs,
    number,
    one_of,
    option,
    optional,
    some_of,
    text,
)
from models import MODELS, model_options

DATASETS = ("cifar10", "mnist", "svhn", "glyphs", "npz")
HUMAN_COLUMNS = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")
# The experiments by name, and the module that declares each; the first one trains for the others.
EXPERIMENTS = {
    "gradients": "gradient_accounting",
    "rewinding": "layer_rewinding",
    "retraining": "layer_retraining",
    "flipping": "neuron_flipping",
    "dropout": "example_tied_dropout",
    "gradient_distance": "beyond.gradient_distance",
}
OF_THE_PAPER = ("rewinding", "retraining", "flipping", "dropout")


@dataclass(frozen=True)
class HumanLabelsConfig:
    path: str | None = option(
        None, optional(text()), "CIFAR-10N's file; by default under data.root"
    )
    column: str = option("aggre_label", one_of(*HUMAN_COLUMNS), "which annotation is trained on")


@dataclass(frozen=True)
class DataConfig:
    name: str = option("cifar10", one_of(*DATASETS), "the data set; npz is your own")
    root: str = option("datasets", text(), "where data sets lie, and where they are downloaded to")
    path: str | None = option(None, optional(text()), "npz: the file with x_train, y_train, ...")
    train_size: int | None = option(None, optional(integer(2)), "train on a fixed random subset")
    test_size: int | None = option(None, optional(integer(1)), "test on a fixed random subset")
    split: str = option(
        "noise", one_of("noise", "human", "atypical"), "what makes the memorized examples"
    )
    noise_rate: float = option(0.1, number(0, 1), "fraction of wrong labels (split: noise)")
    noise_seed: int = option(0, integer(0), "which examples get which wrong label (split: noise)")
    human_labels: HumanLabelsConfig = dataclasses.field(default_factory=HumanLabelsConfig)
    c_scores: str | None = option(
        None, optional(text()), "file of C-scores; by default under data.root (split: atypical)"
    )
    c_score_threshold: float = option(
        0.5, number(0, 1), "scores below are atypical (split: atypical)"
    )
    keep_memorized: bool = option(
        False, flag(), "train_size draws among clean examples only (split: human, atypical)"
    )
    augment: bool = option(
        False, flag(), "random crop and mirror while training; mirrored digits keep their label"
    )


@dataclass(frozen=True)
class ModelConfig:
    name: str = option("resnet9", one_of(*MODELS), "the network")
    width: float = option(1.0, number(above=0, most=16), "resnet9: channels, as a multiple")
    patch: int = option(2, integer(1, 256), "vit_small: pixels along a patch's side")
    dim: int = option(512, integer(1, 65536), "vit_small: features of a token")
    depth: int = option(6, integer(1, 256), "vit_small: transformer blocks")
    heads: int = option(8, integer(1, 256), "vit_small: attention heads")
    dim_head: int = option(64, integer(1, 65536), "vit_small: features of a head")
    mlp_dim: int = option(512, integer(1, 65536), "vit_small: features inside a block's MLP")
    dropout: float = option(0.1, number(0, 0.99), "vit_small: its own dropout while training")

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments that this model takes."""
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
        "triangle", one_of("triangle", "warmup_cosine"), "how the rate falls after the peak"
    )
    account_gradients: bool = option(
        True, flag(), "sum up clean and noisy gradients apart (Section 4); a second backward pass"
    )
    compile: bool = option(
        False, flag(), "torch.compile for the training; on a CPU it costs minutes, saves little"
    )


@dataclass(frozen=True)
class CheckpointsConfig:
    keep: str | tuple[int, ...] = option(
        "all", epochs(), "epochs whose weights stay on disk; the last one always does"
    )


@dataclass(frozen=True)
class RewindingConfig:
    epochs: str | tuple[int | str, ...] = option(
        (0, 5, 10, "..."), epochs(open_ended=True), "epochs that each layer group is taken back to"
    )
    batchnorm: str = option(
        "final", one_of("final", "checkpoint"), "whose running statistics a group back there uses"
    )


@dataclass(frozen=True)
class RetrainingConfig:
    epochs: int = option(20, integer(1), "passes over the clean examples, for each group")
    peak_lr: float = option(0.1, number(above=0), "the triangle's highest learning rate")
    peak_epoch: int = option(10, integer(0), "the epoch that ends at peak_lr")
    patience: int | None = option(
        None, optional(integer(1)), "stop after this many epochs at 100% clean accuracy"
    )


@dataclass(frozen=True)
class FlippingConfig:
    examples: int = option(
        1000, integer(1), "memorized examples that are searched, and as many clean ones"
    )
    noise_copies: int = option(5, integer(1), "noisy copies whose mean output is the prediction")
    noise_ratio: float = option(0.01, number(0), "L2 norm of the noise, relative to its image's")
    reference_batch: int = option(
        512, integer(1), "training examples whose loss is to stay low; at most all of them"
    )
    max_neurons: int = option(100, integer(1), "a search that closed as many gives up")
    ablate: str = option(
        "activation", one_of("activation", "weight"), "what a gate multiplies with 0"
    )
    remaining: int | None = option(
        None, optional(integer(2)), "examples for the accuracy after removal; null: all others"
    )
    refresh_reference: int = option(
        1, integer(1), "approximate above 1: steps between gradients of the reference batch"
    )
    reference_copies: int | None = option(
        None, optional(integer(1)), "approximate: noisy copies of the reference batch; null: exact"
    )
    second_split: bool = option(
        False, flag(), "train on either half, then on the other, for the forgetting time"
    )


@dataclass(frozen=True)
class DropoutConfig:
    kind: str = option(
        "none",
        one_of("example_tied", "standard", "sparse", "none"),
        "what example_tied_dropout.py trains with; the other scripts train without",
    )
    p_gen: float = option(
        0.4, number(above=0, most=1), "share of neurons always on; what the baselines keep"
    )
    p_mem: float = option(
        0.2, number(0, 1), "example_tied: probability that another neuron is on for an example"
    )
    sites: str = option(
        "blocks", one_of("blocks", "layers"), "resnet9: behind six blocks or all convolutions"
    )
    seed: int = option(0, integer(0, 2**31 - 1), "example_tied, sparse: which neurons are on")
    rescale: str = option(
        "none", one_of("none", "paper"), "paper: (p_gen + p_mem) / p_gen times what is left"
    )
    batchnorm: str = option(
        "running",
        one_of("running", "recalibrated"),
        "statistics after dropping: as trained, or anew",
    )
    forget: tuple[int, ...] = option(
        (1, 3, 10), integers(1), "how many noisy examples are forgotten at a time"
    )
    forget_draws: int = option(10, integer(1), "how many times, each time others")


@dataclass(frozen=True)
class GradientDistanceConfig:
    epochs: str | tuple[int, ...] | None = option(
        None, optional(epochs()), "epochs to measure at; null: six of those on disk, evenly spread"
    )
    examples: int | None = option(
        None, optional(integer(1)), "measure a fixed random subset of the training examples"
    )


@dataclass(frozen=True)
class SlurmConfig:
    partition: str | None = option(None, optional(text()), "null: the cluster's own choice")
    account: str | None = option(None, optional(text()), "who pays; null: the user's own")
    gpus: int = option(1, integer(0), "of a job, which is a run")
    cpus: int = option(4, integer(1), "cores of a job")
    memory: int | None = option(None, optional(integer(1)), "GB of a job; null: the cluster's own")
    time: int = option(240, integer(1), "minutes until a job has to go on as a new one")
    restarts: int = option(100, integer(0), "how many times a job may run out of its time")
    parallel: int = option(64, integer(1), "jobs at the same time, at the most")


@dataclass(frozen=True)
class Config:
    name: str = option("experiment", text(), "a title for reports")
    output_dir: str = option("runs", text(), "where run directories are made")
    experiments: str | tuple[str, ...] = option(
        "all",
        some_of(*list(EXPERIMENTS)[1:]),
        "measurements that reproduce.py makes after training; all: the paper's four",
    )
    device: str = option(
        "auto", one_of("auto", "cpu", "cuda"), "auto takes the GPU if there is one"
    )
    precision: str = option(
        "fp32", one_of("fp32", "tf32", "bf16"), "of matrix products and convolutions"
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
    slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)


def impossible(config: Config) -> tuple[str, str] | None:
    """The first key whose value cannot stand beside the others, and why; None if all can."""
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
    for key in sorted(set().union(*map(model_options, MODELS)) - model_options(model.name)):
        if getattr(model, key) != getattr(ModelConfig, key):
            takers = ", ".join(name for name in MODELS if key in model_options(name))
            return f"model.{key}", (
                f"{getattr(model, key)!r} is not allowed: only {takers} takes it, not {model.name}"
                "; remove it"
            )
    return None
