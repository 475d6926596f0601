"""Run directories: which one belongs to a training, and what lies in it.

What decides the weights decides the directory. `deciding_settings` names those settings, a digest
over them is the run's identity, and the identity is written into every checkpoint: a run never
reads another run's files by mistake, and a run that was moved elsewhere is still itself.
"""

import dataclasses
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import Split, file_digest
from engine.config.load import SCHEMA, flatten, load_configs, to_yaml
from engine.config.schema import Config
from engine.errors import RunFailed, UserError
from engine.runs import files
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
from engine.runs.tables import HISTORY
from models import network_file

_AGAIN = "the script that trained this run makes it again"


@dataclass(frozen=True)
class Run:
    """One training's directory, and the settings that made it."""

    directory: Path
    config: Config
    expected: str | None = None  # the identity that the directory must have, if anything is there

    @classmethod
    def of(cls, config: Config) -> "Run":
        """Return the run that a configuration asks for, whether it is there yet or not.

        Where a precision is left to the machine, a run that another machine began is found again.
        """
        found = [
            cls(run_directory(chosen), chosen, identity_of(chosen))
            for chosen in resolutions(config)
        ]
        return next((run for run in found if run.provenance_path.exists()), found[0])

    @classmethod
    def at(cls, directory: Path, overrides: tuple[str, ...] = ()) -> "Run":
        """The run that lies in a directory, wherever it was made.

        Overrides can change what a measurement does and where data lie, never what was trained.
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
        """What config.yaml says, if it is this run's own; only the places of data may change."""
        path = directory / "config.yaml"
        try:
            made, *more = load_configs(path)
        except UserError as error:
            raise UserError(f"{error}{_remedy(directory)}") from None
        run, own = cls(directory, made), deciding_settings(made, contents=False)
        trained = {k: v for k, v in (run._trained or own).items() if not k.endswith(".sha256")}
        if more or trained != own:
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
        """From the files of a run that exists (it may have been moved), else from its settings."""
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
        """What a finished training must have left behind, and is not there."""
        paths = [self.checkpoint_path(self.config.train.epochs)]
        paths += [self.split_path, self.history_path, self.examples_path]
        paths += [self.directory / accounts] if accounts else []
        return [path for path in paths if not path.exists()]

    def require_intact(self, accounts: str = "") -> None:
        """A finished run has all that its training wrote, as it was written.

        From the run's record, the script that trained it makes everything again but weights.
        """
        for path in self.missing_results(accounts):
            restorable = self.record_path.exists() and path.suffix != ".pt"
            remedy = f"; {_AGAIN}" if restorable else _remedy(self.directory)
            raise UserError(f"{path}: is missing from a finished run{remedy}")
        self.require_undamaged()

    def require_undamaged(self) -> None:
        """The results that are there are those that the training of a finished run wrote."""
        again = self.record_path.exists()
        remedy = f"; delete it, and {_AGAIN}" if again else _remedy(self.directory)
        for name, digest in (self._provenance().get("files") or {}).items():
            if (path := self.directory / name).exists() and file_digest(path) != digest:
                raise UserError(f"{path}: damaged, or another run's{remedy}")

    @property
    def settings(self) -> dict[str, object]:
        """What decides the weights: as the training wrote it down, if there was one."""
        return self._trained or deciding_settings(self.config)

    @property
    def _trained(self) -> dict[str, object]:
        """What decided the weights; empty before a training, and of an earlier version's."""
        found = self._provenance().get("settings") if self.provenance_path.exists() else None
        return found if isinstance(found, dict) else {}

    def _provenance(self) -> dict:
        try:
            return files.read_json(self.provenance_path)
        except UserError as error:
            raise UserError(f"{error}{_remedy(self.directory)}") from None

    @property
    def state(self) -> str:
        """In words, for a person: what there is of this run."""
        if self.finished:
            return "finished"
        epochs = self.resumable_epochs()
        return f"interrupted after epoch {epochs[0]}" if epochs else "to do"

    def require_finished(self) -> None:
        """A measurement needs a training that came to its end, and all that it wrote."""
        if self.finished:
            return self.require_intact()
        if not self.provenance_path.exists():
            # Other scripts have options that this one lacks.
            given = [a for a in sys.argv[1:] if "=" in a or a.endswith("yaml") or Path(a).is_dir()]
            command = shlex.join(["gradient_accounting.py", *given])
            raise UserError(f"{self.directory}: no such run; `python {command}` trains it")
        command = files.read_json(self.provenance_path).get("command")
        raise UserError(
            f"{self.directory}: its training is {self.state}; `python {command}` finishes it"
        )

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
        """Where an epoch that a signal ended goes on with its next step."""
        return self.directory / "resume" / "within_epoch.pt"

    def resumable_epochs(self) -> list[int]:
        """Epochs after which training could go on, the latest first."""
        return self.epochs_in("resume")[::-1]

    def epochs_in(self, folder: str) -> list[int]:
        """Epochs that have a file in checkpoints/ or resume/."""
        names = [path.stem for path in (self.directory / folder).glob("epoch_*.pt")]
        return sorted(int(name.removeprefix("epoch_")) for name in names)

    def kept(self, epoch: int) -> bool:
        """Whether this epoch's weights are to stay on disk."""
        keep = self.config.checkpoints.keep
        return keep == "all" or epoch in keep or epoch == self.config.train.epochs

    def discard(self, epochs: list[int]) -> None:
        """Drop what it took to go on from these epochs or within one, and weights not to keep."""
        paths = [self.resume_path(epoch) for epoch in epochs] + [self.within_path]
        paths += [self.checkpoint_path(epoch) for epoch in epochs if not self.kept(epoch)]
        for path in filter(
            Path.exists, paths
        ):  # a finished run may lie where nothing can be removed
            path.unlink()

    # ------------------------------------------------------------ writing and reading

    def write_settings(self, split: Split) -> None:
        """config.yaml and split.npz; those of an earlier start must say the same."""
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
        """The data set must still be the one that this run was trained on."""
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
            if path and digest not in (None, digest_of(Path(path).expanduser())):
                raise UserError(f"{path}: is not the file that the run was trained on ({key})")

    def require_present(self) -> None:
        """A folder that was removed while its run is worked on is not made anew, half empty."""
        if not self.provenance_path.exists():
            raise RunFailed(f"{self.directory} vanished; the same command begins anew")

    def write_checkpoint(self, epoch: int, state: Mapping[str, torch.Tensor]) -> None:
        """Weights (a state_dict on the CPU) after an epoch."""
        self.require_present()
        content = {"identity": self.identity, "epoch": epoch, "model": dict(state)}
        files.write_tensors(self.checkpoint_path(epoch), content)

    def read_checkpoint(self, epoch: int) -> dict[str, torch.Tensor]:
        """The weights (state_dict) after an epoch, on the CPU; 0 is the initialization."""
        path = self.checkpoint_path(epoch)
        if not path.exists():
            kept = ", ".join(map(str, self.epochs_in("checkpoints")))
            raise UserError(f"{path}: no such file; the epochs kept are {kept or 'none'}")
        state = self.read_own(path, epoch).get("model")
        if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
            raise UserError(f"{path}: damaged: it holds no weights")
        return state

    def read_own(self, path: Path, epoch: int) -> dict:
        """A file of tensors that this very run wrote at this epoch."""
        try:
            content = files.read_tensors(path)
            if content.get("identity") != self.identity:
                raise UserError(f"{path}: belongs to another run, not to {self.directory}")
            if content.get("epoch") != epoch:
                raise UserError(f"{path}: is of epoch {content.get('epoch')}, not {epoch}")
        except UserError as error:
            # An interrupted training goes back an epoch instead.
            raise UserError(f"{error}{_remedy(self.directory) if self.finished else ''}") from None
        return content


def _remedy(directory: Path) -> str:
    return f"; put it back, or delete {directory} and train again"


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Put a checkpoint's weights into a model that must be of the same shape."""
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
    """Different runs; a sweep cannot ask for the same one to be measured in two ways."""
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
