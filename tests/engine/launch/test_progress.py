"""The line over all jobs: it counts them, and foresees the rest from what the first ones took."""

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


def test_the_rest_takes_as_long_as_its_work(jobs, monkeypatch):
    clock = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress(with_passes(jobs, gradients=30.0, rewinding=10.0)) as line:
        line.show("training")
        assert line.bar.postfix == ""  # nobody waits at a terminal, and nothing is known yet
        line.passed(jobs[0])  # 30 of 80 passes in 30 seconds
        line.show("rewinding")
        assert line.bar.postfix == "about 50 s left"
        line.passed(*jobs[1:])
        line.show("")
        assert (line.bar.n, line.bar.total, line.bar.postfix) == (4, 4, "")


def test_who_waits_at_a_terminal_gets_a_guess_at_once(jobs, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    calibrations = []
    monkeypatch.setattr(estimates, "calibrate", lambda *what: calibrations.append(what) or 2.0)
    with Progress(with_passes(jobs, gradients=60.0, rewinding=60.0)) as line:
        line.show("training")
        assert line.bar.postfix == "about 8.0 min left"
        line.show("training still")
        assert len(calibrations) == 1


def test_what_is_done_already_takes_no_time(jobs):
    gradient_accounting.EXPERIMENT.main(jobs[0].run)
    with Progress(jobs) as line:
        line.show("rewinding")
        assert line.bar.n == 1
        assert line.to_do == pytest.approx(sum(line.work.values()) - line.work[jobs[0]])
