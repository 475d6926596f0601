"""What all tests of the models share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts from the same global generator, and its state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
