"""The identity of a training: the settings that decide its weights, its directory, its title."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from data import c_scores_at_hand, c_scores_published, expanded, file_digest, full_sizes
from engine.config.load import SCHEMA, flatten
from engine.config.schema import (
    OTHER,
    Config,
    DataConfig,
    DropoutConfig,
    HumanLabelsConfig,
    TrainConfig,
)
from engine.errors import UserError
from engine.machine import default_precision, device_type
from models import MODELS, model_options, network_file
from models.any_network import NetworkError, require_file

# Settings of these sections, and these keys, decide what is trained.
DECIDING = re.compile(
    r"seed|precision|(data|model|train)\..+|dropout\.(kind|p_gen|p_mem|standard|units|sites|seed)"
)
# `auto` stands for the machine's choice; these are left out of an identity, as they always were.
_IMPLIED = {"precision": "fp32", "train.compile": False, "dropout.standard": "keep"}
# Where a file lies does not matter; what is in it does (see deciding_settings).
PLACES = ("data.root", "data.path", "data.c_scores", "data.human_labels.path")
_SPLIT_KEYS = {
    "noise": ("data.noise_rate", "data.noise_seed"),
    "human": ("data.human_labels.column",),
    "atypical": ("data.c_score_threshold",),
}
# Settings in the name of a run's directory, those that matter most first.
_NAMED = {
    "dropout.p_gen": "gen", "dropout.p_mem": "mem", "data.train_size": "n", "model.width": "width",
    "precision": "", "train.epochs": "epochs", "train.peak_lr": "lr", "train.batch_size": "batch",
    "train.weight_decay": "wd", "train.schedule": "", "data.augment": "augment",
    "data.noise_seed": "noise_seed", "dropout.sites": "sites", "dropout.seed": "mask_seed",
}  # fmt: skip
LONGEST_NAME, DIGITS = 60, 8
_DROPOUT_KEYS = {
    "example_tied": ("p_gen", "p_mem", "sites", "seed"),
    "sparse": ("p_gen", "sites", "seed"),
    "standard": ("p_gen", "standard", "units", "sites"),
    "none": (),
}


def resolved(config: Config) -> Config:
    """Return the configuration with this machine's choice in place of `auto`."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision=default_precision(device_type(config.device)))


def resolutions(config: Config) -> list[Config]:
    """Return what `auto` may have meant where the run was begun; this machine's choice first."""
    own = resolved(config)
    if config.precision != "auto":
        return [own]
    precisions = dict.fromkeys([own.precision, "fp32", "tf32"])
    return [dataclasses.replace(config, precision=precision) for precision in precisions]


def measuring_precision(config: Config, device: torch.device) -> str:
    """Return the precision in which a run's network is measured on a device."""
    asked = config.measure_precision
    if asked != "auto":
        return asked
    trained = resolved(config).precision
    return "fp32" if trained == "fp32" else default_precision(device.type)


def measuring_settings(config: Config) -> dict[str, str]:
    """Return the setting of a table that was not measured as its run was trained; else nothing."""
    asked, trained = config.measure_precision, resolved(config).precision
    as_trained = asked == trained or (asked == "auto" and trained != "bf16")
    return {} if as_trained else {"measure_precision": asked}


def scores_given(config: Config) -> dict[str, str]:
    """Return what decides an example's C-score where the settings of the training do not.

    It is the digest of a file that no training of this split reads; or 'none' as long as published
    scores are not below `data.root`.
    """
    data = config.data
    if data.split == "atypical":
        return {}
    if data.c_scores is not None:
        return {"c_scores": digest_of(expanded(data.c_scores))}
    lacking = c_scores_published(data.name) and not c_scores_at_hand(data.name, data.root)
    return {"c_scores": "none"} if lacking else {}


def deciding_settings(config: Config, contents: bool = True) -> dict[str, object]:
    """Return the settings that decide a training's weights, without those that have no effect.

    The contents of data files are settings too, unless `contents` is false.

    A value at its default is left out too (but for the three that name the run), so that a key
    which a later version adds does not rename the runs of an earlier one.
    """
    config = canonical(resolved(config))
    without_effect = {
        *PLACES,
        *(key for kind, keys in _SPLIT_KEYS.items() if kind != config.data.split for key in keys),
        *(f"model.{key}" for name in (*MODELS, OTHER) for key in model_options(name)),
        *(f"dropout.{key}" for keys in _DROPOUT_KEYS.values() for key in keys),
    }
    without_effect -= {f"model.{key}" for key in config.model.arguments}
    without_effect -= {f"dropout.{key}" for key in _DROPOUT_KEYS[config.dropout.kind]}
    always = {"data.name", "model.name", "data.split"}
    settings = {
        key: list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        for key, value in flatten(config).items()
        if DECIDING.fullmatch(key)
        and key not in without_effect
        and (key in always or value != _IMPLIED.get(key, SCHEMA[key].default))
    }
    for key in PLACES[1:] if contents else ():
        if (path := flatten(config)[key]) is not None:
            settings[f"{key}.sha256"] = digest_of(expanded(path))
    settings["model.name"] = short_name(config.model.name)
    if contents and (path := network_file(config.model.name)) is not None:
        try:
            require_file(path)
        except NetworkError as error:
            raise UserError(f"model: {error}") from None
        settings["model.name.sha256"] = digest_of(path)
    return settings


def canonical(config: Config) -> Config:
    """Spell settings that train the same network in the same way.

    Glyphs have their sizes written out, other data sets none where all images are used. Settings
    that cannot have an effect beside the others take their defaults.
    """
    data, train, dropout = config.data, config.train, config.dropout
    changes = {}
    if data.name == "glyphs":
        train_size, test_size = full_sizes(data.name)
        changes["train_size"] = train_size if data.train_size is None else data.train_size
        changes["test_size"] = test_size if data.test_size is None else data.test_size
    elif sizes := full_sizes(data.name):
        given = zip(("train_size", "test_size"), (data.train_size, data.test_size), sizes)
        changes |= {key: None for key, size, whole in given if size == whole}
        if "train_size" in changes:
            changes["keep_memorized"] = False  # all are kept
    if data.noise_rate == 0:
        changes["noise_seed"] = DataConfig.noise_seed
    if data.split != "atypical":
        changes["c_scores"] = None
    if data.split != "human":
        changes["human_labels"] = HumanLabelsConfig()
    if train.peak_epoch == train.epochs:  # the rate never falls
        train = dataclasses.replace(train, schedule=TrainConfig.schedule)
    always_or_never = {"example_tied": dropout.p_mem, "sparse": dropout.p_gen}
    if dropout.p_gen == 1 or always_or_never.get(dropout.kind) in (0, 1):
        dropout = dataclasses.replace(dropout, seed=DropoutConfig.seed)
    data = dataclasses.replace(data, **changes)
    return dataclasses.replace(config, data=data, train=train, dropout=dropout)


def short_name(model: str) -> str:
    """Return a model's name, without the folder where a network's file lies."""
    path = network_file(model)
    return model if path is None else f"{path.name}:{model.rpartition(':')[2]}"


def digest_of(path: Path) -> str:
    """SHA-256 of a file; the runs of a sweep read a large one once."""
    try:
        state = path.stat()
    except OSError:
        return file_digest(path)  # its message names the error
    return _digest_once(path, state.st_size, state.st_mtime_ns)


@lru_cache
def _digest_once(path: Path, size: int, changed: int) -> str:
    return file_digest(path)


def identity_of(config: Config) -> str:
    return _digest(deciding_settings(config))


def _digest(settings: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def run_directory(config: Config) -> Path:
    """Return output_dir/<name>/seed<k>, where the name is `run_name` or that of an earlier version.

    Every version ended the name with the digest of the settings, by which its runs are found.
    """
    settings = deciding_settings(config)
    name, seed = run_name(config, settings), f"seed{config.seed}"
    output_dir = expanded(config.output_dir)
    if (output_dir / name / seed).exists():
        return output_dir / name / seed
    earlier = sorted(path for path in output_dir.glob(f"*-{name[-DIGITS:]}") if path.is_dir())
    trained = [folder for folder in earlier if (folder / seed).is_dir()]
    # Seeds share a folder, so that they share figures.
    folder = next(iter([*trained, *earlier]), output_dir / name)
    return folder / seed


def run_name(config: Config, settings: Mapping[str, object]) -> str:
    """Return <data>-<model>-<split>[-<dropout>][-<settings>]-<digest>, at most 60 characters.

    Settings that differ from the defaults follow in the order of `_NAMED`, as far as there is room.
    """
    data = Path(config.data.path).stem if config.data.path else config.data.name
    split = {
        "noise": f"noise{config.data.noise_rate:g}",
        "human": config.data.human_labels.column,
        "atypical": f"atypical{config.data.c_score_threshold:g}",
    }[config.data.split]
    dropout = {"none": [], "example_tied": ["tied"]}
    words = [data[:16], str(settings["model.name"])[:20], split]
    words += dropout.get(config.dropout.kind, [config.dropout.kind])
    room = LONGEST_NAME - DIGITS - 1
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words)).strip(".-")[:room]
    for key, word in _NAMED.items():
        if key in settings:
            more = re.sub(r"[^A-Za-z0-9._-]+", "_", f"-{word}{settings[key]}")
            name += more if len(name + more) <= room else ""
    apart = {key: value for key, value in settings.items() if key != "seed"}
    return f"{name}-{_digest(apart)[:DIGITS]}"


def without_accounting(config: Config) -> Config:
    """Return the settings under which example_tied_dropout.py trains."""
    train = dataclasses.replace(config.train, account_gradients=False)
    return dataclasses.replace(config, train=train)


def without_dropout(config: Config) -> Config:
    """The plain training, which all scripts but example_tied_dropout.py read."""
    return dataclasses.replace(config, dropout=DropoutConfig())


def title(config: Config) -> str:
    """Return a run in a few words, for the beginning of its line."""
    dropout = "" if config.dropout.kind == "none" else ","
    return f"{family_title(config)}{dropout} seed {config.seed}"


def family_title(config: Config) -> str:
    """Return what runs that differ only in their seed have in common, in a few words."""
    own = config.data.name == "npz" and config.data.human_labels == HumanLabelsConfig()
    split = {
        "noise": f"noise {config.data.noise_rate:g}",
        "human": "human labels" if own else config.data.human_labels.column,
        "atypical": "atypical",
    }[config.data.split]
    data = Path(config.data.path).stem if config.data.path else config.data.name
    data = data.replace("$", "")  # it would begin a formula in a figure
    size = f" {config.data.train_size:,}" if config.data.train_size else ""
    width = config.model.arguments.get("width", 1)
    width = "" if width == 1 else f" width {width:g}"
    trained = f"{data}{size} {short_name(config.model.name)}{width} {split}"
    return ", ".join(filter(None, (trained, describe_dropout(config.dropout))))


def describe_dropout(dropout: DropoutConfig) -> str:
    """Return the kind of dropout with its rates; nothing without dropout."""
    if dropout.kind == "none":
        return ""
    if dropout.kind == "example_tied":
        return f"example-tied {dropout.p_gen:g}, {dropout.p_mem:g}"
    if dropout.kind == "standard":
        units = "" if dropout.units == "activations" else ", whole channels"
        return f"standard, {dropout.standard}s {100 * dropout.p_gen:g}%{units}"
    return f"{dropout.kind} {dropout.p_gen:g}"
