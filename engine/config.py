"""YAML -> frozen, typed, validated configurations, one for every run of a sweep.

Every key of a configuration file is a field below; its default is Section 3 of the paper. A value
comes from, in rising order: the default, the file named by `extends:`, the file itself, the command
line's `key.path=value`. `sweep:` maps key paths to lists; the product of the lists is the set of
runs. Everything is checked once, here; whoever holds a `Config` holds a possible one.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine.errors import UserError
from engine.options import (
    Kind,
    epochs,
    flag,
    integer,
    integers,
    listed_epochs,
    nearest,
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
EXPERIMENTS = ("rewinding", "retraining", "flipping", "dropout")
COMMAND_LINE = "command line"


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
class Config:
    name: str = option("experiment", text(), "a title for reports")
    output_dir: str = option("runs", text(), "where run directories are made")
    experiments: str | tuple[str, ...] = option(
        "all", some_of(*EXPERIMENTS), "what reproduce.py does after training and accounting"
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


# ---------------------------------------------------------------- keys


def schema(section: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every key path of the configuration, in declaration order, with its field."""
    keys = {}
    for field in dataclasses.fields(section):
        if "kind" in field.metadata:
            keys[prefix + field.name] = field
        else:
            keys |= schema(field.default_factory, f"{prefix}{field.name}.")
    return keys


SCHEMA = schema()
SECTIONS = sorted({key.rpartition(".")[0] for key in SCHEMA} - {""})


def flatten(config: Config) -> dict[str, object]:
    """Key path -> value, for every key."""

    def value_of(key: str) -> object:
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    return {key: value_of(key) for key in SCHEMA}


def defaults() -> dict[str, object]:
    return {key: field.default for key, field in SCHEMA.items()}


def describe_keys() -> list[tuple[str, str, str, str]]:
    """Key, default, what is allowed, and what it means, for people."""

    def written(value: object) -> str:
        if value is None:
            return "null"
        if isinstance(value, tuple):
            return f"[{', '.join(map(str, value))}]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [
        (key, written(f.default), f.metadata["kind"].allowed, f.metadata["meaning"])
        for key, f in SCHEMA.items()
    ]


def _build(flat: Mapping[str, object], section: type = Config, prefix: str = "") -> Config:
    values = {}
    for field in dataclasses.fields(section):
        key = prefix + field.name
        values[field.name] = (
            flat[key] if key in SCHEMA else _build(flat, field.default_factory, key + ".")
        )
    return section(**values)


def to_yaml(config: Config) -> str:
    """The configuration as a file that can be given to any script."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- reading YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands once and 1e-3 is a number, as everybody expects."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = key_node.value
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key} stands twice", key_node.start_mark
            )
        seen.add(key if isinstance(key, str) else id(key_node))
    return yaml.SafeLoader.construct_mapping(loader, node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+$"),
    "-+.0123456789",
)


def _parse_yaml(source: str, content: str) -> object:
    try:
        return yaml.load(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(f"{source}: not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise UserError(f"{source}: not valid YAML: {reason}") from None


@dataclass
class _Layer:
    """What one source says: values and sweeps by key path."""

    source: str
    values: dict[str, object]
    sweeps: dict[str, list]
    extends: str | None = None


def _walk(source: str, tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Key paths and values of a nested mapping; an unknown key ends it."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SCHEMA:
            yield key, value
        elif key in SECTIONS:
            if value is not None and not isinstance(value, Mapping):
                inner = ", ".join(
                    k.removeprefix(key + ".") for k in SCHEMA if k.startswith(key + ".")
                )
                raise UserError(f"{source}: {key}: {value!r} is not a section with keys {inner}")
            yield from _walk(source, value or {}, key + ".")
        else:
            raise UserError(f"{source}: {key}: unknown key{_spelling(key, prefix)}")


def _spelling(key: str, prefix: str = "") -> str:
    """The closest known key: by its whole path, else by its last part in any section."""
    known = [*SCHEMA, *SECTIONS, "extends", "sweep"]
    hint = nearest(key, known)
    if not hint:
        last = key.rpartition(".")[2]
        close = nearest(last, [k.rpartition(".")[2] for k in known])
        ending = close.removeprefix("; did you mean ").removesuffix("?")
        hint = next((f"; did you mean {k}?" for k in known if k.rpartition(".")[2] == ending), "")
    if not hint:
        here = [k for k in known if k.startswith(prefix)] if prefix else [*known]
        names = dict.fromkeys(k.removeprefix(prefix).partition(".")[0] for k in here)
        hint = "; allowed: " + ", ".join(names)
    return hint


def _read_layer(source: str, tree: object) -> _Layer:
    if tree is None:
        raise UserError(f"{source}: the file is empty; it needs at least one key, such as name:")
    if not isinstance(tree, Mapping):
        raise UserError(f"{source}: a configuration is a mapping 'key: value', not {tree!r:.60}")
    tree = dict(tree)
    extends, sweep = tree.pop("extends", None), tree.pop("sweep", None)
    if extends is not None and not isinstance(extends, str):
        raise UserError(f"{source}: extends: {extends!r} is not the name of one file")
    if sweep is not None and not isinstance(sweep, Mapping):
        raise UserError(f"{source}: sweep: {sweep!r} does not map key paths to lists of values")
    layer = _Layer(source, {}, {}, extends)
    for key, value in _walk(source, tree):
        _put(layer, key, value, swept=key == "seed" and isinstance(value, list))
    for key, value in _walk(source, sweep or {}):
        _put(layer, key, value, swept=True)
    return layer


def _put(layer: _Layer, key: str, value: object, swept: bool) -> None:
    """Enter one value, checked for its type and range; a key has one meaning in a source."""
    if key in layer.sweeps or (swept and key in layer.values):
        raise UserError(f"{layer.source}: {key}: is swept, and set or swept a second time")
    if not swept:
        layer.values[key] = _checked(layer.source, key, value)
        return
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{layer.source}: sweep: {key}: {value!r} is not a list of values, such as "
            f"{key}: [{SCHEMA[key].default}]"
        )
    values = [_checked(layer.source, key, item) for item in value]
    if repeated := [item for i, item in enumerate(values) if item in values[:i]]:
        raise UserError(f"{layer.source}: sweep: {key}: {repeated[0]!r} stands twice in the list")
    layer.sweeps[key] = values


def _checked(source: str, key: str, value: object) -> object:
    kind: Kind = SCHEMA[key].metadata["kind"]
    try:
        return kind.parse(value)
    except ValueError:
        hint = nearest(value, kind.choices) if isinstance(value, str) else ""
        if isinstance(value, list) and key != "seed" and not hint:
            hint = f"; to try several, write sweep: {{{key}: [...]}}"
        message = f"{source}: {key}: {value!r:.80} is not allowed: {kind.allowed}{hint}"
        raise UserError(message) from None


def _file_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[_Layer]:
    """The layers of a file, what it extends first."""
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise UserError(f"{path}: extends: goes round in a circle: {names}")
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        asked = f"{chain[-1]}: extends: " if chain else ""
        raise UserError(f"{asked}{path}: no such file{nearest(path.name, beside)}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    layer = _read_layer(str(path), _parse_yaml(str(path), content))
    if layer.extends is None:
        return [layer]
    return [*_file_layers(path.parent / layer.extends, (*chain, path.resolve())), layer]


def _override_layer(overrides: Sequence[str]) -> _Layer:
    layer = _Layer(COMMAND_LINE, {}, {})
    for override in overrides:
        path, equals, written = override.partition("=")
        if not equals or not path:
            raise UserError(f"{COMMAND_LINE}: {override!r} is not of the form key.path=value")
        key = path.removeprefix("sweep.")
        if key not in SCHEMA:
            raise UserError(f"{COMMAND_LINE}: {path}: unknown key{_spelling(key)}")
        value = _parse_yaml(f"{COMMAND_LINE}: {path}", written)
        if key in layer.values:
            raise UserError(f"{COMMAND_LINE}: {path}: is set twice")
        _put(layer, key, value, path != key or (key == "seed" and isinstance(value, list)))
    return layer


# ---------------------------------------------------------------- the configurations of a command


def load_configs(path: str | Path, overrides: Sequence[str] = ()) -> list[Config]:
    """Every run that a file asks for, in the order of its sweep (the last key varies fastest)."""
    values, sweeps, sources = {}, {}, {}
    for layer in [*_file_layers(Path(path)), _override_layer(overrides)]:
        # A later source's value replaces an earlier one's sweep of the same key, and vice versa.
        for key, value in layer.values.items():
            sweeps.pop(key, None)
            values[key], sources[key] = value, layer.source
        for key, value in layer.sweeps.items():
            values.pop(key, None)
            sweeps[key], sources[key] = value, layer.source
    configs = []
    for combination in itertools.product(*sweeps.values()):
        config = _build(defaults() | values | dict(zip(sweeps, combination)))
        if problem := impossible(config):
            key, message = problem
            raise UserError(f"{sources.get(key, path)}: {key}: {message}")
        configs.append(config)
    return configs


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
        if getattr(model, key) != SCHEMA[f"model.{key}"].default:
            takers = ", ".join(name for name in MODELS if key in model_options(name))
            return f"model.{key}", (
                f"{getattr(model, key)!r} is not allowed: only {takers} takes it, not {model.name}"
            )
    return None
