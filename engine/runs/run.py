"""Run directories: the one that belongs to a training, and the files in it.

The settings that decide the weights decide the directory. `deciding_settings` names them, a digest
over them is the run's identity, and the identity is written into every checkpoint: a run never
reads another run's files by mistake, and a moved run keeps its identity.
"""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import Split, expanded, file_digest
from engine.config.load import SCHEMA, flatten, load_configs, to_yaml
from engine.config.schema import Config
from engine.errors import RunFailed, UserError
from engine.runs import files, provenance
from engine.runs.commands import shell_command
from engine.runs.identity import (
    DECIDING,
    PLACES,
    deciding_settings,
    digest_of,
    identity_of,
    resolutions,
    run_directory,
    short_name,
)
from engine.runs.locking import Holder, is_held, known_holder, require_held
from engine.runs.tables import HISTORY
from models import network_file

_FILE_NAME = re.compile(r"[A-Za-z0-9_]+\.[a-z]+")

# Examples that rounding alone may classify otherwise on another machine: some, and a share.
_ROUNDING = {"fp32": (1, 0.002), "tf32": (2, 0.02), "bf16": (2, 0.05)}


@dataclass(frozen=True)
class Run:
    """The directory of one training, and the settings that made it."""

    directory: Path
    config: Config
    expected: str | None = None  # the identity that the directory must have, if anything is there

    @classmethod
    def of(cls, config: Config) -> "Run":
        """Return the run that a configuration asks for, also if it does not exist yet.

        Where a precision is left to the machine, a run that another machine began is found again.
        """
        found = [
            cls(run_directory(chosen), chosen, identity_of(chosen))
            for chosen in resolutions(config)
        ]
        return next((run for run in found if run.provenance_path.exists()), found[0])

    @classmethod
    def at(cls, directory: Path, overrides: tuple[str, ...] = ()) -> "Run":
        """Return the run in a directory, also if it was moved.

        Overrides can change measurements and the places of data, never what was trained.
        """
        path = directory / "config.yaml"
        if not path.exists():
            raise UserError(f"{directory}: is not the directory of a run: it has no config.yaml")
        made = cls._settings_in(directory)
        configs = load_configs(path, overrides)
        decisive = [key for key in SCHEMA if DECIDING.fullmatch(key) and key not in PLACES]
        for config in configs:
            for key in decisive:
                same = short_name(config.model.name) == short_name(made.model.name)
                if key == "model.name" and same:  # the same file may lie elsewhere
                    continue
                if flatten(config)[key] != (value := flatten(made)[key]):
                    raise UserError(
                        f"command line: {key}: cannot be changed, {directory} was trained "
                        f"with {value!r}"
                    )
        if len(configs) != 1:
            raise UserError("command line: a sweep needs a configuration file, not one run")
        return cls(directory, configs[0])

    @classmethod
    def _settings_in(cls, directory: Path) -> Config:
        """Read config.yaml if it is this run's own; only the places of data may change."""
        path = directory / "config.yaml"
        try:
            made, *more = load_configs(path)
        except UserError as error:
            raise UserError(f"{error}{_remedy(directory)}") from None
        run, own = cls(directory, made), deciding_settings(made, contents=False)
        trained = {k: v for k, v in (run._trained or own).items() if not k.endswith(".sha256")}
        # An earlier version recorded settings without effect too.
        values = {key: field.default for key, field in SCHEMA.items()} | trained
        known = flatten(made) | {"model.name": short_name(made.model.name)}
        known = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
        if more or any(values[key] != known.get(key) for key in {*own, *trained}):
            raise UserError(
                f"{path} and {run.provenance_path} are not of the same run; one is damaged, or "
                f"another run's{_remedy(directory)}"
            )
        return made

    def trusting(self, own_file: bool, trust: bool) -> "Run":
        """Return a run found by its directory, whose network's code may be run.

        The code of a network from a file runs because the user names the file (`own_file`) or
        trusts the run's own copy of it, never because a run's settings name it.
        """
        if network_file(self.config.model.name) is None or own_file:
            return self
        if not trust:
            raise UserError(
                f"{self.directory}: its network is a file, and this would run its code; read "
                f"{self.network_path} and add --trust, or name your own copy: "
                "model.name=FILE.py:CALLABLE"
            )
        name = f"{self.network_path}:{self.config.model.name.rpartition(':')[2]}"
        model = dataclasses.replace(self.config.model, name=name)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

    # ------------------------------------------------------------ identity and state

    @cached_property
    def identity(self) -> str:
        """Read the identity of an existing run from its files; derive a new run's from settings."""
        path = self.provenance_path
        if not path.exists():
            return self.expected or identity_of(self.config)
        identity = self._provenance().get("identity")
        if not isinstance(identity, str):
            raise UserError(f"{path}: damaged: it has no identity{_remedy(self.directory)}")
        if self.expected not in (None, identity):
            raise UserError(f"{path}: belongs to another run; move {self.directory} away")
        return identity

    @property
    def finished(self) -> bool:
        path = self.provenance_path
        return bool(path.exists() and self.identity and self._provenance().get("finished"))

    def missing_results(self, accounts: str = "") -> list[Path]:
        """List the results of a finished training that are missing."""
        paths = [self.checkpoint_path(self.config.train.epochs)]
        paths += [self.split_path, self.history_path, self.examples_path]
        paths += [self.directory / accounts] if accounts else []
        return [path for path in paths if not path.exists()]

    def require_intact(self, accounts: str = "") -> None:
        """Refuse a finished run of which a result is missing or damaged.

        The script that trained it restores everything except weights from the run's record.
        """
        for path in self.missing_results(accounts):
            restorable = self.record_path.exists() and path.suffix != ".pt"
            restored = f"; `{self.training_command}` restores it"
            remedy = restored if restorable else _remedy(self.directory)
            raise UserError(f"{path}: is missing from a finished run{remedy}")
        self.require_undamaged()

    def require_undamaged(self) -> None:
        """Refuse a finished run of which an existing result is not as its training wrote it."""
        again = f"; delete it, then `{self.training_command}` restores it"
        remedy = again if self.record_path.exists() else _remedy(self.directory)
        digests = self._provenance().get("files") or {}
        # A name with a folder in it would lead out of the run.
        if not isinstance(digests, dict) or not all(map(_FILE_NAME.fullmatch, digests)):
            raise UserError(
                f"{self.provenance_path}: damaged: its files are not a run's"
                f"{_remedy(self.directory)}"
            )
        for name, digest in digests.items():
            if (path := self.directory / name).exists() and file_digest(path) != digest:
                raise UserError(f"{path}: damaged, or another run's{remedy}")

    @property
    def settings(self) -> dict[str, object]:
        """The settings that decide the weights, as the training recorded them if there was one."""
        return self._trained or deciding_settings(self.config)

    @property
    def _trained(self) -> dict[str, object]:
        """The recorded settings; empty before a training, and in runs of an earlier version."""
        found = self._provenance().get("settings") if self.provenance_path.exists() else None
        return found if isinstance(found, dict) else {}

    def starts(self) -> list[dict[str, object]]:
        """List the starts of this run's training so far, as provenance.json has them."""
        there = self.provenance_path.exists()
        return provenance.earlier_starts(self._provenance() if there else {})

    def _provenance(self) -> dict:
        try:
            return files.read_json(self.provenance_path)
        except UserError as error:
            raise UserError(f"{error}{_remedy(self.directory)}") from None

    @property
    def state(self) -> str:
        """The progress of this run in words."""
        if self.finished:
            return "finished"
        epochs = self.resumable_epochs()
        if holder := self._other_holder():
            return f"locked by {holder}, after epoch {max(epochs, default=0)}"
        return f"interrupted after epoch {epochs[0]}" if epochs else "to do"

    def _other_holder(self) -> Holder | None:
        """Return the process that holds this run, unless it is this one or cannot be told."""
        return None if is_held(self.directory) else known_holder(self.directory)

    def require_finished(self) -> None:
        """Refuse to measure a run whose training is not finished and intact."""
        if self.finished:
            return self.require_intact()
        if not self.provenance_path.exists():
            # Other scripts have options that this one lacks.
            given = [a for a in sys.argv[1:] if "=" in a or a.endswith("yaml") or Path(a).is_dir()]
            command = shell_command(["python", self._training_script, *given])
            raise UserError(f"{self.directory}: no such run; `{command}` trains it")
        finishes = f"`{self.training_command}` finishes it"
        remedy = "rerun when that has ended" if self._other_holder() else finishes
        raise UserError(f"{self.directory}: its training is {self.state}; {remedy}")

    @property
    def training_command(self) -> str:
        """The command that trains this run, or restores what is missing of it."""
        return shell_command(["python", self._training_script, self.directory])

    @property
    def _training_script(self) -> str:
        plain = self.config.dropout.kind == "none"
        return "gradient_accounting.py" if plain else "example_tied_dropout.py"

    # ------------------------------------------------------------ files

    @property
    def provenance_path(self) -> Path:
        return self.directory / "provenance.json"

    @property
    def network_path(self) -> Path:
        """The copy of the file that holds the network, if it comes from a file."""
        path = network_file(self.config.model.name)
        return self.directory / "network" / (path.name if path else "none")

    @property
    def config_path(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def split_path(self) -> Path:
        return self.directory / "split.npz"

    @property
    def history_path(self) -> Path:
        return HISTORY.path(self.directory)

    @property
    def examples_path(self) -> Path:
        return self.directory / "examples.npz"

    @property
    def record_path(self) -> Path:
        return self.directory / "record.pt"

    def checkpoint_path(self, epoch: int) -> Path:
        return self.directory / "checkpoints" / f"epoch_{epoch:03d}.pt"

    def resume_path(self, epoch: int) -> Path:
        return self.directory / "resume" / f"epoch_{epoch:03d}.pt"

    @property
    def within_path(self) -> Path:
        """The state within an epoch that a signal ended, from which its next step resumes."""
        return self.directory / "resume" / "within_epoch.pt"

    def resumable_epochs(self) -> list[int]:
        """List the epochs after which training can resume, the latest first."""
        return self.epochs_in("resume")[::-1]

    def epochs_in(self, folder: str) -> list[int]:
        """List the epochs that have a file in checkpoints/ or resume/, not counting copies."""
        names = [path.name for path in (self.directory / folder).glob("epoch_*.pt")]
        found = [re.fullmatch(r"epoch_([0-9]{3,9})\.pt", name) for name in names]
        return sorted(int(match[1]) for match in found if match)

    def kept(self, epoch: int) -> bool:
        """Return whether this epoch's weights stay on disk."""
        keep = self.config.checkpoints.keep
        return keep == "all" or epoch in keep or epoch == self.config.train.epochs

    def discard(self, epochs: list[int]) -> None:
        """Remove the resume files of these epochs and within one, and weights not to keep."""
        paths = [self.resume_path(epoch) for epoch in epochs] + [self.within_path]
        paths += [self.checkpoint_path(epoch) for epoch in epochs if not self.kept(epoch)]
        # A finished run may lie where nothing can be removed, and others may be tidying it too.
        for path in filter(Path.exists, paths):
            require_held(path)
            path.unlink(missing_ok=True)

    def set_aside(self, epoch: int) -> None:
        """Rename a resume file that cannot be used, so that no start takes it for an epoch's."""
        path = self.resume_path(epoch)
        require_held(path)
        path.replace(path.with_suffix(".unusable"))

    # ------------------------------------------------------------ writing and reading

    def write_settings(self, split: Split) -> None:
        """Write config.yaml and split.npz; an earlier start's split must be equal."""
        self.check_images(split)
        if self.split_path.exists():
            self.check_split(split)
        else:
            arrays = {
                "label": split.label, "true_label": split.true_label,
                "memorized": split.memorized, "index": split.index,
            }  # fmt: skip
            if split.typicality is not None:
                arrays["typicality"] = split.typicality
            files.write_arrays(self.split_path, **{k: v.cpu().numpy() for k, v in arrays.items()})
        files.write_text(self.config_path, to_yaml(self.config))
        if (path := network_file(self.config.model.name)) not in (None, self.network_path):
            files.write_atomically(self.network_path, lambda file: file.write(path.read_bytes()))

    def check_split(self, split: Split) -> None:
        """Refuse a data set that is not the one that this run was trained on."""
        try:
            arrays = files.read_arrays(self.split_path, "label", "true_label", "memorized", "index")
        except UserError as error:
            raise UserError(f"{error}{_remedy(self.directory)}") from None
        for name, saved in arrays.items():
            if not np.array_equal(saved, getattr(split, name).cpu().numpy()):
                raise UserError(
                    f"{self.split_path}: its {name} is not what the data set gives now; "
                    "the data changed since this run began, or the file is another run's"
                )
        paths = {key: flatten(self.config)[key] for key in PLACES[1:]}
        paths["model.name"] = network_file(self.config.model.name)
        for key, path in paths.items():
            digest = self._trained.get(f"{key}.sha256")
            if path and digest not in (None, digest_of(expanded(path))):
                raise UserError(f"{path}: is not the file that the run was trained on ({key})")
        self.check_images(split)

    def check_images(self, split: Split) -> None:
        """Refuse images that are not those of the run's first start, if it recorded them."""
        recorded = self._provenance().get("images") if self.provenance_path.exists() else None
        if recorded not in (None, images_digest(split)):
            data = self.config.data
            raise UserError(
                f"{data.path or data.root}: the images of {data.name} are not those of "
                f"{self.provenance_path}: they changed since this run began, or that file is "
                f"another run's{_remedy(self.directory)}"
            )

    def require_reproduced(self, split: Split, correct: torch.Tensor) -> None:
        """Refuse a final network whose accuracies are not those of history.csv's last row.

        `correct` tells which training examples it classifies as trained. Rounding may change a few.
        """
        *_, last = HISTORY.read(self.directory) or [{}]
        if last.get("epoch") != self.config.train.epochs:
            raise UserError(
                f"{self.history_path}: damaged: it does not end with epoch "
                f"{self.config.train.epochs}{_remedy(self.directory)}"
            )
        some, share = _ROUNDING[self.config.precision]
        for name, subset in (("clean", ~split.memorized), ("noisy", split.memorized)):
            count, found = int(subset.sum()), int(correct[subset].sum())
            differ = abs(found - last[f"acc_{name}"] * count)
            if count and not differ <= some + share * count:
                raise UserError(
                    f"{self.history_path}: says {last[f'acc_{name}']:.2%} {name} accuracy after "
                    f"the last epoch, but the final network has {found / count:.2%} here: images, "
                    f"code or versions differ from the training's; restore them, or delete "
                    f"{self.directory} and train again"
                )

    def require_present(self) -> None:
        """Refuse to write into a folder that was deleted: it would become half a run."""
        if not self.provenance_path.exists():
            raise RunFailed(f"{self.directory} was deleted; rerun to start from scratch")

    def write_checkpoint(self, epoch: int, state: Mapping[str, torch.Tensor]) -> None:
        """Save the weights (a state_dict on the CPU) after an epoch."""
        self.require_present()
        content = {"identity": self.identity, "epoch": epoch, "model": dict(state)}
        files.write_tensors(self.checkpoint_path(epoch), content)

    def read_checkpoint(self, epoch: int) -> dict[str, torch.Tensor]:
        """Load the weights (state_dict) after an epoch, on the CPU; 0 is the initialization."""
        path = self.checkpoint_path(epoch)
        if not path.exists():
            if not self.finished:
                raise UserError(f"{path}: no such file")
            kept = ", ".join(map(str, self.epochs_in("checkpoints")))
            raise UserError(
                f"{path}: no such file; the epochs kept are {kept or 'none'}; name some of these, "
                f"or train again elsewhere (output_dir=FOLDER)"
            )
        state = self.read_own(path, epoch).get("model")
        if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
            raise UserError(f"{path}: damaged: it holds no weights")
        return state

    def read_own(self, path: Path, epoch: int) -> dict:
        """Read a file of tensors, which this run must have written at this epoch."""
        try:
            content = files.read_tensors(path)
            if content.get("identity") != self.identity:
                raise UserError(f"{path}: belongs to another run, not to {self.directory}")
            if content.get("epoch") != epoch:
                raise UserError(f"{path}: is of epoch {content.get('epoch')!r:.20}, not {epoch}")
        except UserError as error:
            # An interrupted training goes back an epoch instead.
            raise UserError(f"{error}{_remedy(self.directory) if self.finished else ''}") from None
        return content


def images_digest(split: Split) -> str:
    """SHA-256 of the training and the test images, as they lie in memory."""
    digest = hashlib.sha256()
    for images in (split.images, split.test_images):
        digest.update(str(tuple(images.shape)).encode())
        digest.update(images.contiguous().cpu().numpy())
    return digest.hexdigest()


def _remedy(directory: Path) -> str:
    return f"; put it back, or delete {directory} and train again"


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a checkpoint's weights into a model, which must have the same shapes."""
    try:
        model.load_state_dict(state)
    except RuntimeError:
        own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        wrong = next(n for n in (*own, *found) if own.get(n) != found.get(n))
        raise UserError(
            f"{path}: of another model: {wrong} is {found.get(wrong, 'missing')} there "
            f"and {own.get(wrong, 'missing')} in this run's model"
        ) from None


def each_once(runs: Iterable[Run]) -> list[Run]:
    """Drop repeated runs; refuse a sweep that would measure one run in two ways."""
    found: dict[Path, Run] = {}
    for run in runs:
        first = found.setdefault(run.directory, run)
        settings = flatten(first.config) if first is not run else {}
        for key, value in flatten(run.config).items():
            if settings.get(key, value) != value and not DECIDING.fullmatch(key):
                raise UserError(
                    f"sweep: {key}: changes no training, and a run has one table of each kind; "
                    "measure with one value at a time"
                )
    return list(found.values())
