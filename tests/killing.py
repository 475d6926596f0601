"""The death of a process at a chosen moment, without a process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from engine.runs import files
from engine.training import resume


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@contextmanager
def _dying(module: ModuleType, name: str, work: Callable) -> Iterator[None]:
    """Replace a function of a module by `work`, which raises Killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, work)
        with pytest.raises(Killed):
            yield


@contextmanager
def killed_at_write(moment: int, before: bool = False) -> Iterator[None]:
    """Raise Killed just after the file of this number, from 0, got its name, or just before."""
    write, count = files.write_atomically, iter(range(10_000))

    def write_or_die(path, content):
        number = next(count)
        if number == moment and before:
            raise Killed
        write(path, content)
        if number == moment:
            raise Killed

    with _dying(files, "write_atomically", write_or_die):
        yield


@contextmanager
def killed_after_epoch(epoch: int) -> Iterator[None]:
    """A training inside dies when it has saved this epoch."""
    save = resume.save_epoch

    def save_and_die(run, number, *rest):
        save(run, number, *rest)
        if number == epoch:
            raise Killed

    with _dying(resume, "save_epoch", save_and_die):
        yield
