"""The progress line over all jobs: it counts them, and estimates the remaining time."""

import io
from dataclasses import replace

import pytest

import gradient_accounting
import reproduce
from engine.config.load import load_configs
from engine.launch import estimates, progress
from engine.launch.jobs import Job
from engine.launch.progress import Progress


@pytest.fixture
def jobs(tiny_file):
    return reproduce.make_jobs(load_configs(tiny_file, ["seed=[0,1]", "experiments=[rewinding]"]))


def with_passes(jobs: list[Job], **passes: float) -> list[Job]:
    """Change the jobs in place so that each experiment's work is known."""
    for number, job in enumerate(jobs):
        known = passes[job.experiment.key]
        experiment = replace(job.experiment, passes=lambda run, known=known: known)
        jobs[number] = replace(job, experiment=experiment)
    return jobs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_rest_takes_as_long_as_its_work(jobs, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(with_passes(jobs, gradients=30.0, rewinding=10.0)) as shown:
        shown.show("gradient accounting")
        assert shown.line() == "gradient accounting [0/4 jobs] 00:00 elapsed"
        clock[0] += 30
        shown.mark_done(jobs[0])  # 30 of 80 passes in 30 seconds
        shown.show("layer rewinding")
        clock[0] += 20
        shown.show("layer rewinding")  # too early for another line
    assert capsys.readouterr().err.splitlines() == [
        "gradient accounting [0/4 jobs] 00:00 elapsed",
        "layer rewinding [1/4 jobs] 00:30 elapsed, ~50 s remaining",
    ]


def test_the_rest_does_not_grow_while_a_job_works(jobs, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(with_passes(jobs, gradients=30.0, rewinding=10.0)) as shown:
        clock[0] += 30
        shown.mark_done(jobs[0])  # 50 of 80 passes are left
        for passed, rest in ((0, "~50 s"), (20, "~30 s"), (15, "~15 s")):
            clock[0] += passed
            shown.mark_done(jobs[0])  # as a parallel sweep does time and again
            shown.show("layer rewinding")
            assert shown.line().endswith(f", {rest} remaining")
        clock[0] += 60
        shown.show("layer rewinding")
        assert shown.line() == "layer rewinding [1/4 jobs] 02:05 elapsed"


def test_a_terminal_gets_an_estimate_at_once_and_a_last_line_with_all_jobs(jobs, monkeypatch):
    terminal, calibrations = Terminal(), []
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(estimates, "calibrate", lambda *what: calibrations.append(what) or 2.0)
    with Progress(with_passes(jobs, gradients=60.0, rewinding=60.0)) as shown:
        shown.show("gradient accounting")
        assert "gradient accounting [0/4 jobs] 00:00 elapsed, ~8.0 min" in terminal.getvalue()
        shown.show("gradient accounting")
        assert len(calibrations) == 1
        shown.mark_done(*jobs)
        shown.show("")
    assert "all [4/4 jobs] 00:0" in terminal.getvalue().splitlines()[-1]


def test_the_line_moves_while_a_job_works(jobs, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "TICK", 0.01)
    monkeypatch.setattr(estimates, "calibrate", lambda *what: 2.0)
    with Progress(with_passes(jobs, gradients=60.0, rewinding=60.0)) as shown:
        shown.show("gradient accounting")
        written = len(terminal.getvalue())
        deadline = progress.time.monotonic() + 30
        while len(terminal.getvalue()) == written and progress.time.monotonic() < deadline:
            progress.time.sleep(0.01)
        assert len(terminal.getvalue()) > written


def test_what_is_done_already_takes_no_time(jobs):
    gradient_accounting.EXPERIMENT.main(jobs[0].run)
    with Progress(jobs) as shown:
        shown.show("layer rewinding")
        assert "[1/4 jobs]" in shown.line()
        assert shown.to_do == pytest.approx(sum(shown.work.values()) - shown.work[jobs[0]])
