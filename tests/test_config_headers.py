"""Headers of configurations say what a dry run estimates and what kept trainings took."""

import re

import pytest

from engine.launch.experiments import load_experiments
from tests.headers import (
    BYTES,
    REPOSITORY,
    SECONDS,
    disk_of,
    header_of,
    jobs_of,
    numbers,
    recorded_seconds,
)

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
CLOSE = 0.06  # two digits are shown


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_disk_in_a_header_is_that_of_the_dry_run(path):
    """The least and the most of a run, and the sum."""
    found = disk_of(jobs_of(path))
    expected = {min(found), max(found), sum(found)}
    said = numbers(re.search(r"Disk: (.*?)\.(?: |$)", header_of(path)).group(1), BYTES)
    for amounts, others in ((said, expected), (expected, said)):
        for amount in amounts:
            assert any(amount == pytest.approx(other, rel=CLOSE) for other in others), (
                f"{path.name}: header {[f'{n / 1e6:.1f} MB' for n in said]}, "
                f"dry run {[f'{n / 1e6:.1f} MB' for n in sorted(expected)]}"
            )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_recorded_time_in_a_header_is_that_of_the_kept_trainings(path):
    recorded = recorded_seconds(jobs_of(path))
    said = re.search(r"Recorded: (.*?) of training per run", header_of(path))
    assert bool(said) == bool(recorded), f"{path.name}: kept trainings took {recorded} seconds"
    if said:
        seconds = numbers(said.group(1), SECONDS)
        expected = pytest.approx((recorded[0], recorded[-1]), rel=CLOSE)
        assert (min(seconds), max(seconds)) == expected


def test_kept_trainings_are_found_for_most_small_configurations():
    small = [path for path in CONFIGS if path.parent.name == "small"]
    assert all(recorded_seconds(jobs_of(path)) for path in small)


@pytest.mark.parametrize("experiment", load_experiments().values(), ids=lambda e: e.key)
def test_the_first_example_of_a_script_s_help_takes_minutes(experiment):
    words = experiment.command.split()
    script = words[-1] if words[1] != "-m" else words[-1].replace(".", "/") + ".py"
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    examples = re.findall(rf"^    {re.escape(experiment.command)} (\S+\.yaml)", text, re.M)
    (recorded, *_) = recorded_seconds(jobs_of(REPOSITORY / examples[0]))
    assert recorded < 300
