"""From a configuration to the things that it names: the split and the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from data import (
    DataError,
    Dataset,
    Split,
    at_hand,
    c_scores_at_hand,
    c_scores_published,
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
from models import build_model
from models.dropout import ExampleTiedDropout, SparseDropout, StandardDropout, insert_dropout
from models.layer_groups import StagedModel

# The runs of a sweep mostly share their data set.
_load_dataset_once = lru_cache(maxsize=1)(load_dataset)


def _load_dataset(data: DataConfig) -> Dataset:
    with _while_nobody_downloads(data):
        return _load_dataset_once(
            data.name,
            root=data.root,
            path=data.path,
            train_size=data.train_size,
            test_size=data.test_size,
        )


@contextmanager
def _while_nobody_downloads(data: DataConfig) -> Iterator[None]:
    """One process downloads; others, wherever they are, wait until all files are whole."""
    root = Path(data.root).expanduser()
    if at_hand(data.name, root) and not holder_of(root):
        yield
    else:
        with lock(root, wait=True):
            yield


def load_split(config: Config) -> Split:
    """The training and test examples, with their labels and who is memorized."""
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
    """The same, where it takes no download."""
    data = config.data
    if not at_hand(data.name, data.root):
        raise DataError(f"{data.name} does not lie below {data.root}")
    scored = data.split == "atypical" and data.c_scores is None and c_scores_published(data.name)
    if scored and not c_scores_at_hand(data.name, data.root):
        raise DataError(f"{data.name}: its C-scores do not lie below {data.root}")
    return load_split(config)


def load_typicality(config: Config, split: Split) -> Tensor | None:
    """How typical each training example is, where that is known without a download."""
    data = config.data
    if split.typicality is not None:
        return split.typicality
    if data.c_scores is None and not c_scores_at_hand(data.name, data.root):
        return None
    scores = load_c_scores(_load_dataset(data), root=data.root, path=data.c_scores)
    return scores.to(split.index.device)[split.index]


def make_model(config: Config, split: Split) -> StagedModel:
    """The network at its initialization, on the CPU, with dropout where it is trained with it.

    Weights lie channels-last, and so do the activations that convolutions make with them: that is
    the faster layout on CPUs and on tensor cores (tf32, bf16), and changes no shape.
    """
    model = _build(config, split.shape, split.classes).to(memory_format=torch.channels_last)
    if config.dropout.kind != "none":
        try:
            _add_dropout(model, config.dropout, n_examples=int(split.index.max()) + 1)
        except ValueError as error:
            raise UserError(f"dropout: {error}") from None
    return model


def _add_dropout(model: StagedModel, dropout: DropoutConfig, n_examples: int) -> None:
    """Dropout of the configured kind behind the model's sites, with masks of their own."""
    p, seed, dim = dropout.p_gen, dropout.seed, model.channel_dim
    layers = {}
    for number, (site, channels) in enumerate(model.dropout_sites(dropout.sites).items()):
        if dropout.kind == "example_tied":
            layers[site] = ExampleTiedDropout(
                channels, n_examples, p, dropout.p_mem, seed, layer=number, dim=dim
            )
        elif dropout.kind == "sparse":
            layers[site] = SparseDropout(channels, p, seed, layer=number, dim=dim)
        else:
            layers[site] = StandardDropout(p)
    insert_dropout(model, layers)


def _build(config: Config, shape: tuple[int, int, int], classes: int) -> StagedModel:
    channels, height, width = shape
    if height != width:
        raise UserError(f"data: images of {height} x {width} pixels; the models need square ones")
    try:
        return build_model(
            config.model.name,
            channels=channels,
            classes=classes,
            image_size=height,
            seed=config.seed,
            **config.model.options,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def load_final_model(run: Run, split: Split, device: torch.device) -> StagedModel:
    """The network as a finished training left it, which was on these very examples."""
    run.require_finished()
    run.check_split(split)
    model = make_model(run.config, split)
    epoch = run.config.train.epochs
    load_weights(model, run.read_checkpoint(epoch), run.checkpoint_path(epoch))
    return model.to(device)


def estimate_disk(run: Run) -> float:
    """Bytes that a run takes while it trains; no data are downloaded, no weights allocated."""
    config = run.config
    known = outline(config.data.name, config.data.path)
    state = outline_model(config).state_dict()
    weights = sum(value.numel() * value.element_size() for value in state.values())
    kept = sum(run.kept(epoch) for epoch in range(config.train.epochs + 1))
    # Resuming takes two epochs' momentum, and their weights where those are not kept.
    examples = 6.2 * (config.data.train_size or known.train_count) * config.train.epochs
    return (kept + 4) * weights + examples


def outline_model(config: Config) -> StagedModel:
    """The network without dropout and without memory for its weights: names and shapes only."""
    known = outline(config.data.name, config.data.path)
    with torch.device("meta"):
        return _build(config, known.shape, known.classes)
