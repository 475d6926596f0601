"""The command line that all scripts share: CONFIG, overrides, --dry-run, --device."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from data import DataError, expanded
from engine.config.load import SECTIONS, describe_keys, load_configs
from engine.config.schema import Config
from engine.errors import RunFailed, UserError
from engine.launch.memory import free_memory_of, out_of_memory
from engine.runs import provenance
from engine.runs.commands import printable
from engine.runs.experiment import Experiment
from engine.runs.identity import without_dropout
from engine.runs.locking import lock
from engine.runs.run import Run, each_once
from engine.runs.stopping import Terminated, ending_on_signals
from engine.training.devices import describe_computing

TRAINING_SECTIONS = ("data", "train")
UNFINISHED = 75  # exit status: nothing failed, and a rerun resumes (EX_TEMPFAIL)


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line."""

    def error(self, message: str) -> None:
        message = message.replace("CONFIG, key.path=value", "CONFIG")  # overrides are optional
        raise UserError(f"command line: {message}; see --help")


class _HelpOfAllKeys(argparse.Action):
    """Print the help with every key of a configuration, then exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.epilog = describe_sections(["", *SECTIONS])
        parser.print_help()
        parser.exit()


def describe_sections(sections: Sequence[str]) -> str:
    """Describe each key of the given sections in one line, and name the other sections."""
    lines, others = [], {}
    for key, default, allowed, meaning in describe_keys():
        section = key.partition(".")[0] if "." in key else ""
        if section in sections:
            lines.append(f"  {key}: {meaning}; {allowed} [{default}]")
        else:
            others[section or key] = None
    if others:
        lines.append(f"others, see --help-all: {', '.join(others)}")
    return "\n".join(["keys: meaning; allowed [default]", *lines])


def make_parser(
    description: str, sections: Sequence[str] = (), default_config: str | None = None
) -> argparse.ArgumentParser:
    """Make the parser of all scripts; its help describes the keys of the given sections.

    Without a default, the configuration is a required argument.
    """
    parser = Parser(
        description=description,
        epilog=describe_sections(sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    optional = {"help": "a YAML file, or the directory of a run"}
    if default_config is not None:
        optional = {"help": "a YAML file", "nargs": "?", "default": default_config}
    parser.add_argument("config", metavar="CONFIG", **optional)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="overrides; values are YAML"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print what would be done"
        + (" and the disk of this measurement" if default_config is None else ", time and disk"),
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    if default_config is None:
        parser.add_argument(
            "--trust", action="store_true", help="run the code of the network in a run's directory"
        )
    parser.add_argument(
        "--wait", action="store_true", help="wait for runs that another process has locked"
    )
    parser.add_argument("--help-all", action=_HelpOfAllKeys, help="describe every key, then exit")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="do not resume a training with other code, torch, device or threads",
    )
    return parser


def find_runs(
    config: str,
    overrides: Sequence[str] = (),
    training: Callable[[Config], Config] = without_dropout,
    trust: bool = False,
) -> list[Run]:
    """Return the runs of a configuration's sweep, or the run in a directory.

    `training` maps a configuration to the training that a script reads; by default, the plain one.
    The code of a network that a run's directory holds runs only with `trust`.
    """
    if Path(config).is_dir():
        own_file = any(override.startswith("model.name=") for override in overrides)
        return [Run.at(Path(config), tuple(overrides)).trusting(own_file, trust)]
    return each_once(Run.of(training(found)) for found in load_configs(config, overrides))


def require_output(config: Config) -> None:
    """Refuse an output folder that is not there and cannot be made."""
    folder = expanded(config.output_dir).absolute()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        reason = f"{above} is a file"
    elif above != folder and not os.access(above, os.W_OK):
        reason = f"no permission to write in {above}"
    else:
        return
    raise UserError(f"output_dir: {config.output_dir} cannot be made: {reason}; choose another")


def run_script(
    experiment: Experiment,
    description: str,
    arguments: Sequence[str] | None = None,
    check: Callable[[Sequence[Run]], None] = lambda runs: None,
) -> int:
    """Measure every run of the command line, print a line for each, and return the exit status.

    Each line ends with the run's directory, or with the folder of the runs that it summarizes.
    `check` may refuse the runs before any work.
    """
    with reporting_ends() as ending, ending_on_signals():
        sections = [experiment.key] if experiment.key in SECTIONS else TRAINING_SECTIONS
        given = make_parser(description, sections).parse_intermixed_args(arguments)
        device = [f"device={given.device}"] if given.device else []
        done = []
        runs = find_runs(
            given.config, [*given.overrides, *device], experiment.training, given.trust
        )
        check(runs)
        if not Path(given.config).is_dir():
            require_output(runs[0].config)
        announce(runs)
        ending.several = len(runs) > 1
        for run in runs:
            with ending.one_of_several(run.directory):
                if given.dry_run:
                    result = experiment.plan(run)
                else:
                    alone = nullcontext() if experiment.shared else lock(run.directory, given.wait)
                    with alone, provenance.strict(given.strict):
                        result = experiment.main(run)
                print(f"{result}  {run.directory}", flush=True)
                done.append(run)
        summaries = () if given.dry_run or ending.refused else experiment.conclude(done)
        for result, folder in summaries:
            print(f"{result}  {folder}", flush=True)
    return ending.status


def announce(runs: Sequence[Run]) -> None:
    """Say on stderr on which device, and in which precision, the runs compute."""
    if any(run.config.device == "cuda" for run in runs) and not torch.cuda.is_available():
        return  # computing will end with an error; a dry run is allowed
    print(describe_computing([run.config for run in runs]), file=sys.stderr, flush=True)


class Ending:
    """Exit status of a command that works on one or more runs."""

    def __init__(self) -> None:
        self.status = 0
        self.several = False
        self.refused: dict[str, Path] = {}  # what the user must mend: the message, and the run

    @contextmanager
    def one_of_several(self, directory: Path) -> Iterator[None]:
        """Report a run that fails, or that runs out of memory, and continue with the others.

        Also report a run with a damaged file. A mistake that two runs share ends the command.
        """
        try:
            yield
        except RunFailed as error:
            self._report(directory, str(error))
        except (UserError, DataError) as error:
            if not self.several:
                raise
            self._refuse(directory, error)
        except (MemoryError, RuntimeError) as error:
            if (reason := out_of_memory(error)) is None:
                raise
            free_memory_of(error)
            self._report(directory, reason)

    def _refuse(self, directory: Path, error: Exception) -> None:
        """Report what names this run at once, other messages when no second run has the same."""
        message, self.status = str(error), 2  # also if it is reported later
        if self.refused.get(message, directory) != directory:
            del self.refused[message]
            raise error
        if message not in self.refused and str(directory) in message:
            self._report(directory, message, status=2)
        self.refused[message] = directory

    def report_rest(self) -> None:
        """Report the mistakes that turned out to be of one run."""
        for message, directory in self.refused.items():
            if str(directory) not in message:
                self._report(directory, message, status=2)

    def _report(self, directory: Path, reason: str, status: int = 1) -> None:
        place = "" if str(directory) in reason else f"{directory}: "
        tqdm.write(printable(f"{place}{reason}"), file=sys.stderr)  # apart from a bar
        self.status = max(self.status, status)


@contextmanager
def reporting_ends() -> Iterator[Ending]:
    """Turn whatever ends a command early into one line on stderr and an exit status."""
    ending = Ending()
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # may not be able to write every name
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield ending
        finally:
            ending.report_rest()
    except (UserError, DataError) as error:
        print(printable(error), file=sys.stderr)
        ending.status = 2
    except (MemoryError, RuntimeError) as error:
        if (reason := out_of_memory(error)) is None:
            raise
        print(printable(reason), file=sys.stderr)
        ending.status = 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = f"{place}{error.strerror or error}"
        print(f"{printable(reason)}; fix this, then rerun to resume", file=sys.stderr)
        ending.status = 1
    except (KeyboardInterrupt, Terminated) as error:
        ending.status = getattr(error, "status", 130)
        try:
            print("\nInterrupted. Rerun the same command to resume.", file=sys.stderr, flush=True)
        except OSError:  # the terminal was closed; what is still buffered leads nowhere
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2):
                os.dup2(nowhere, stream)


def _open_standard_streams() -> None:
    """Let a closed stdout or stderr lead nowhere; else the next file would get its descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for good
