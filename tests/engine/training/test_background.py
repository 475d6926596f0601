"""Writing in the background: one piece at a time, errors that come out, and copies that stay."""

import threading

import pytest

import gradient_accounting
from engine.runs import files
from engine.runs.run import Run
from engine.training import resume
from engine.training.background import BackgroundWriter
from engine.training.record import Record

PATIENCE = 30.0  # seconds after which what should happen at once does not happen


class Piece:
    """Work that begins, and ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.may_end, self.done = (threading.Event() for _ in range(3))

    def __call__(self) -> None:
        self.begun.set()
        assert self.may_end.wait(PATIENCE)
        self.done.set()


def test_the_caller_goes_on_while_a_piece_is_written():
    piece = Piece()
    with BackgroundWriter() as writer:
        writer.hand_over(piece)
        assert piece.begun.wait(PATIENCE)
        assert not piece.done.is_set()
        piece.may_end.set()
        writer.wait()
        assert piece.done.is_set()


def test_pieces_come_one_after_the_other():
    first, second = Piece(), Piece()
    with BackgroundWriter() as writer:
        writer.hand_over(first)
        assert first.begun.wait(PATIENCE)
        threading.Timer(0.05, first.may_end.set).start()
        writer.hand_over(second)
        assert first.done.is_set(), "at most one in flight"
        second.may_end.set()
    assert second.done.is_set(), "leaving waits"


def fail(error: BaseException):
    def write() -> None:
        raise error

    return write


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "f"), Killed()])
def test_an_error_comes_out_as_it_is_where_the_next_piece_is_handed_over(error):
    writer, never = BackgroundWriter(), Piece()
    never.may_end.set()

    def work() -> None:
        with writer:
            writer.hand_over(fail(error))
            writer.hand_over(never)

    with pytest.raises(type(error)) as raised:
        work()
    assert raised.value is error
    assert not never.begun.is_set(), "nothing is written after a failure"


def write_and_raise(write, error: BaseException) -> None:
    with BackgroundWriter() as writer:
        writer.hand_over(write)
        raise error


def test_an_error_of_the_last_piece_comes_out_at_the_end_before_what_happened_later():
    early = OSError(28, "No space left on device", "file")
    with pytest.raises(OSError, match="No space left") as raised:
        write_and_raise(fail(early), RuntimeError("the loss became nan"))
    assert raised.value is early


def test_an_interruption_waits_for_what_is_being_written():
    piece = Piece()
    threading.Timer(0.05, piece.may_end.set).start()
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(piece, KeyboardInterrupt())
    assert piece.done.is_set()


# ---------------------------------------------------------------- in a training


def tables_and_weights(run: Run) -> dict[str, bytes]:
    names = ("*.csv", "checkpoints/*.pt", "examples.npz")
    return {p.name: p.read_bytes() for name in names for p in run.directory.glob(name)}


def test_an_epoch_is_written_as_it_was_when_it_ended(tiny, tmp_path, monkeypatch):
    """Each epoch's files are written only after the next epoch was trained and measured."""
    whole, late = (Run.of(tiny(f"output_dir={tmp_path}/{name}")) for name in ("whole", "late"))
    gradient_accounting.EXPERIMENT.main(whole)
    measure, save = Record.measure, resume.save_epoch
    measured, rows = {epoch: threading.Event() for epoch in range(4)}, []

    def measure_and_tell(record, model, split, epoch, rate):
        row = measure(record, model, split, epoch, rate)
        measured[epoch].set()
        return row

    def save_late(run, epoch, *rest):
        assert measured[min(epoch + 1, 3)].wait(PATIENCE)
        save(run, epoch, *rest)
        rows.append(len(files.read_tensors(run.resume_path(epoch))["history"]))

    monkeypatch.setattr(Record, "measure", measure_and_tell)
    monkeypatch.setattr(resume, "save_epoch", save_late)
    gradient_accounting.EXPERIMENT.main(late)
    assert rows == [1, 2, 3, 4]
    assert len(tables_and_weights(late)) == 8
    assert tables_and_weights(late) == tables_and_weights(whole)


def test_what_a_finished_epoch_could_not_write_ends_the_training_before_another_is_saved(
    tiny, monkeypatch
):
    """The message is that of the write; epochs before it are kept, later ones are not there."""
    run, write = Run.of(tiny()), Run.write_checkpoint

    def write_or_fail(run, epoch, state):
        if epoch == 1:
            raise OSError(28, "No space left on device", "epoch_001.pt")
        write(run, epoch, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_checkpoint", write_or_fail)
        with pytest.raises(OSError, match=r"No space left on device: 'epoch_001\.pt'"):
            gradient_accounting.EXPERIMENT.main(run)
    assert run.state == "interrupted after epoch 0"
    assert not run.checkpoint_path(2).exists()
    gradient_accounting.EXPERIMENT.main(run)
    assert run.finished
