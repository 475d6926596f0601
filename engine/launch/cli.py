"""The command line that all scripts share: CONFIG, overrides, --dry-run, --device."""

import argparse
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from data import DataError
from engine.config.load import describe_keys, load_configs
from engine.config.schema import Config
from engine.errors import RunFailed, UserError
from engine.launch.memory import free_memory_of, out_of_memory
from engine.runs.identity import without_dropout
from engine.runs.locking import lock
from engine.runs.run import Run, each_once
from engine.runs.stopping import Terminated, ending_on_signals
from engine.training.devices import describe_computing


class Parser(argparse.ArgumentParser):
    """One that complains in one line."""

    def error(self, message: str) -> None:
        raise UserError(f"command line: {message}; see --help")


def make_parser(description: str, default_config: str | None = None) -> argparse.ArgumentParser:
    """The arguments of every script; without a default, the configuration must be named."""
    keys = [f"  {key}: {meaning} [{default}]" for key, default, _, meaning in describe_keys()]
    parser = Parser(
        description=description,
        epilog="\n".join(["keys, with their defaults:", *keys]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    optional = {"help": "a YAML file, or the directory of a run"}
    if default_config is not None:
        optional = {"help": "a YAML file", "nargs": "?", "default": default_config}
    parser.add_argument("config", metavar="CONFIG", **optional)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="the value is read as YAML"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--wait", action="store_true", help="wait for runs that another process works on"
    )
    return parser


def find_runs(
    config: str,
    overrides: Sequence[str] = (),
    training: Callable[[Config], Config] = without_dropout,
) -> list[Run]:
    """The runs that a command is about: those of a configuration's sweep, or the one given.

    `training` says which training a script makes of a configuration: by default, the plain one.
    """
    if Path(config).is_dir():
        return [Run.at(Path(config), tuple(overrides))]
    return each_once(Run.of(training(found)) for found in load_configs(config, overrides))


def run_script(
    description: str,
    work: Callable[[Run], str],
    plan: Callable[[Run], str],
    arguments: Sequence[str] | None = None,
    training: Callable[[Config], Config] = without_dropout,
    conclude: Callable[[list[Run]], Iterable[tuple[str, Path]]] = lambda runs: (),
) -> int:
    """Do the work of a script for every run, a line of results each; the exit status.

    `work` returns what came out, `plan` says in words what it would do; neither names the run's
    directory, which ends every line. `conclude` gives a line and its folder for what several
    finished runs show together.
    """
    with reporting_ends() as ending, ending_on_signals():
        given = make_parser(description).parse_intermixed_args(arguments)
        device = [f"device={given.device}"] if given.device else []
        done, runs = [], find_runs(given.config, [*given.overrides, *device], training)
        announce(runs)
        for run in runs:
            with ending.one_of_several(run.directory):
                if given.dry_run:
                    result = plan(run)
                else:
                    with lock(run.directory, given.wait):
                        result = work(run)
                print(f"{result}  {run.directory}", flush=True)
                done.append(run)
        for result, folder in () if given.dry_run else conclude(done):
            print(f"{result}  {folder}", flush=True)
    return ending.status


def announce(runs: Sequence[Run]) -> None:
    """Say on stderr on which device, and in which precision, the runs compute."""
    if any(run.config.device == "cuda" for run in runs) and not torch.cuda.is_available():
        return  # computing will end with an error; a dry run is allowed
    print(describe_computing([run.config for run in runs]), file=sys.stderr, flush=True)


class Ending:
    """How a command ended: its exit status."""

    status = 0

    @contextmanager
    def one_of_several(self, directory: Path) -> Iterator[None]:
        """Report a run that fails, or that runs out of memory, and continue with the others."""
        try:
            yield
        except RunFailed as error:
            self._report(directory, str(error))
        except (MemoryError, RuntimeError) as error:
            if (reason := out_of_memory(error)) is None:
                raise
            free_memory_of(error)
            self._report(directory, reason)

    def _report(self, directory: Path, reason: str) -> None:
        tqdm.write(f"{directory}: {reason}", file=sys.stderr)  # on a line without a bar
        self.status = 1


@contextmanager
def reporting_ends() -> Iterator[Ending]:
    """Whatever ends a command early becomes one line on stderr and an exit status."""
    ending = Ending()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # may not be able to write every name
            stream.reconfigure(errors="backslashreplace")
    try:
        yield ending
    except (UserError, DataError) as error:
        print(error, file=sys.stderr)
        ending.status = 2
    except (MemoryError, RuntimeError) as error:
        if (reason := out_of_memory(error)) is None:
            raise
        print(reason, file=sys.stderr)
        ending.status = 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = f"{place}{error.strerror or error}"
        print(f"{reason}; the same command goes on once this is mended", file=sys.stderr)
        ending.status = 1
    except (KeyboardInterrupt, Terminated) as error:
        ending.status = getattr(error, "status", 130)
        print("\nended by a signal; the same command goes on where this one was", file=sys.stderr)
