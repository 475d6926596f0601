"""Shared by the tests of data/: no network, no global randomness, small data, and the real."""

import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from data import Dataset


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that would download fails as it does on a machine without a network."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(autouse=True)
def untouched_global_randomness():
    """Whatever data/ does, the global generators are where they were."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.fixture
def tiny_dataset() -> Dataset:
    """60 one-channel images of 6x6 pixels, 4 classes; image i is filled with the value i."""
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 1, 6, 6).clone()
    return Dataset(
        name="npz",
        images=images,
        label=torch.arange(60) % 4,
        test_images=images[:20],
        test_label=torch.arange(20) % 4,
        class_names=("0", "1", "2", "3"),
        typicality=torch.linspace(0, 1, 60, dtype=torch.float64),
    )
