"""Fixtures of the tests of training."""

import pytest

import gradient_accounting
from engine.runs.run import Run


@pytest.fixture
def finished(tiny) -> Run:
    """A finished run of the tiny configuration."""
    run = Run.of(tiny())
    gradient_accounting.EXPERIMENT.main(run)
    return run
