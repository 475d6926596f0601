"""Build the split and the model that a configuration names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from data import (
    DataError,
    Dataset,
    Split,
    at_hand,
    c_scores_at_hand,
    c_scores_published,
    expanded,
    is_published,
    load_c_scores,
    load_dataset,
    load_human_labels,
    make_split,
    outline,
)
from engine.config.schema import Config, DataConfig, DropoutConfig
from engine.errors import UserError
from engine.runs.locking import holder_of, lock
from engine.runs.run import Run, load_weights
from engine.training.devices import compute_precision
from engine.training.evaluation import Outcome, evaluate
from models import build_model, is_name_of_network
from models.any_network import example_images
from models.dropout import ExampleTiedDropout, SparseDropout, StandardDropout, insert_dropout
from models.dropout_places import find_places
from models.layer_groups import StagedModel
from models.wiring import Output

# The runs of a sweep mostly share their data set.
_load_dataset_once = lru_cache(maxsize=1)(load_dataset)


def _load_dataset(data: DataConfig) -> Dataset:
    with _downloading_once(data):
        return _load_dataset_once(
            data.name,
            root=data.root,
            path=data.path,
            train_size=data.train_size,
            test_size=data.test_size,
        )


@contextmanager
def _downloading_once(data: DataConfig) -> Iterator[None]:
    """Let one process download; processes on any host wait until all files are whole."""
    root = expanded(data.root)
    if not is_published(data.name) or (at_hand(data.name, root) and not holder_of(root)):
        yield
    else:
        with lock(root, wait=True):
            yield


def load_split(config: Config) -> Split:
    """Load training and test examples, their labels, and the memorized set."""
    data = config.data
    dataset = _load_dataset(data)
    c_scores = human_label = None
    if data.split == "atypical":
        c_scores = load_c_scores(dataset, root=data.root, path=data.c_scores)
    if data.split == "human":
        human = data.human_labels
        human_label = load_human_labels(
            dataset, root=data.root, path=human.path, column=human.column
        )
    return make_split(
        dataset,
        kind=data.split,
        noise_rate=data.noise_rate,
        noise_seed=data.noise_seed,
        train_size=data.train_size,
        test_size=data.test_size,
        keep_memorized=data.keep_memorized,
        c_scores=c_scores,
        c_score_threshold=data.c_score_threshold,
        human_label=human_label,
    )


def load_split_at_hand(config: Config) -> Split:
    """Load the split if that needs no download; else raise DataError."""
    data = config.data
    if not at_hand(data.name, data.root):
        raise DataError(f"{data.name} does not lie below {data.root}")
    scored = data.split == "atypical" and data.c_scores is None and c_scores_published(data.name)
    if scored and not c_scores_at_hand(data.name, data.root):
        raise DataError(f"{data.name}: its C-scores do not lie below {data.root}")
    return load_split(config)


def load_typicality(config: Config, split: Split) -> Tensor | None:
    """Return each training example's typicality; None where that needs a download."""
    data = config.data
    if split.typicality is not None and (data.c_scores is None or data.split == "atypical"):
        return split.typicality
    if data.c_scores is None and not c_scores_at_hand(data.name, data.root):
        return None
    scores = load_c_scores(_load_dataset(data), root=data.root, path=data.c_scores)
    return scores.to(split.index.device)[split.index]


def make_model(config: Config, split: Split, proof: bool = True) -> StagedModel:
    """Build the network at its initialization, on the CPU, with the configured dropout.

    Weights lie channels-last, and so do the activations that convolutions make with them: that is
    the faster layout on CPUs and on tensor cores (tf32, bf16), and changes no shape.
    A network that is not ours is proven equal to its chain of stages, unless `proof` is False.
    """
    model = _build(config, split.shape, split.classes, proof)
    model = model.to(memory_format=torch.channels_last)
    if config.dropout.kind != "none":
        try:
            images = example_images(split.shape[0], split.shape[1:], count=2)
            places = find_places(model, config.dropout.sites, images)
            _add_dropout(model, config.dropout, places, n_examples=int(split.index.max()) + 1)
        except ValueError as error:
            raise UserError(f"dropout: {error}") from None
    return model


def _add_dropout(
    model: StagedModel, dropout: DropoutConfig, places: Mapping[str, Output], n_examples: int
) -> None:
    """Insert dropout of the configured kind after each of the model's sites."""
    p, seed = dropout.p_gen, dropout.seed
    layers = {}
    for number, (site, output) in enumerate(places.items()):
        channels, dim = output.channels, output.dim
        if dropout.kind == "example_tied":
            layers[site] = ExampleTiedDropout(
                channels, n_examples, p, dropout.p_mem, seed, layer=number, dim=dim
            )
        elif dropout.kind == "sparse":
            layers[site] = SparseDropout(channels, p, seed, layer=number, dim=dim)
        else:
            keep = p if dropout.standard == "keep" else 1 - p
            whole = dropout.units == "channels"
            layers[site] = StandardDropout(keep, whole_channels=whole, dim=dim)
    insert_dropout(model, layers)


def _build(
    config: Config, shape: tuple[int, int, int], classes: int, proof: bool = True
) -> StagedModel:
    channels, height, width = shape
    try:
        return build_model(
            config.model.name,
            channels=channels,
            classes=classes,
            image_size=height if height == width else (height, width),
            seed=config.seed,
            proof=proof,
            **config.model.arguments,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def load_final_model(run: Run, split: Split, device: torch.device) -> StagedModel:
    """Load the network of a finished training, and prove that it is the one of its history."""
    return load_evaluated_model(run, split, device)[0]


def load_evaluated_model(
    run: Run, split: Split, device: torch.device
) -> tuple[StagedModel, Outcome]:
    """Load the final network with its outcome on the training set, as history.csv has it."""
    run.require_finished()
    run.check_split(split)
    model = make_model(run.config, split, proof=False)
    epoch = run.config.train.epochs
    load_weights(model, run.read_checkpoint(epoch), run.checkpoint_path(epoch))
    model = model.to(device)
    with compute_precision(run.config.precision, device):
        outcome = evaluate(model, split.images, split.label, index=split.index)
    run.require_reproduced(split, outcome.correct)
    return model, outcome


def estimate_disk(run: Run) -> float:
    """Estimate the bytes that a run takes on disk, without a download and without weights."""
    config = run.config
    known = outline(config.data.name, config.data.path)
    state = outline_model(config).state_dict()
    weights = sum(value.numel() * value.element_size() for value in state.values())
    kept = sum(run.kept(epoch) for epoch in range(config.train.epochs + 1))
    # Resuming takes two epochs' momentum, and their weights where those are not kept.
    examples = 6.2 * (config.data.train_size or known.train_count) * config.train.epochs
    return (kept + 4) * weights + examples


def outline_model(config: Config) -> StagedModel:
    """Build the network without dropout on the meta device: names and shapes only."""
    known = outline(config.data.name, config.data.path)
    # Cutting a network that is not ours takes a pass, so its weights need memory.
    with torch.device("cpu" if is_name_of_network(config.model.name) else "meta"):
        return _build(config, known.shape, known.classes, proof=False)
