"""The published files: what the paper counts, and that scores and images belong together."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from data import (
    load_c_scores,
    load_dataset,
    load_human_labels,
    make_split,
    normalize,
    outline,
)
from data.c_scores import PUBLISHED
from data.images import Outline

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def mnist(real_data):
    return load_dataset("mnist", root=real_data)


@pytest.fixture(scope="module")
def cifar10(real_data):
    """The photographs after JPEG compression, as an npz; the labels and the order are the real."""
    return load_dataset("npz", path=real_data / "cifar10.npz")


def test_mnist_has_its_size(mnist):
    assert mnist.images.shape == (60_000, 1, 28, 28)
    assert mnist.test_images.shape == (10_000, 1, 28, 28)
    assert mnist.label[:5].tolist() == [5, 0, 4, 1, 9]
    assert outline("mnist") == Outline((1, 28, 28), 10, 60_000)


def test_1098_atypical_digits(mnist, real_data):
    scores = load_c_scores(mnist, root=real_data)
    split = make_split(
        mnist, kind="atypical", c_scores=scores, train_size=4098, keep_memorized=True
    )
    assert split.memorized.sum() == 1098
    assert split.n == 4098
    assert torch.equal(split.typicality, scores[split.index])


def test_4838_atypical_photographs(cifar10, real_data):
    path = real_data / "c_scores" / PUBLISHED["cifar10"].file
    scores = load_c_scores(cifar10, root="nowhere", path=path)
    assert make_split(cifar10, kind="atypical", c_scores=scores).memorized.sum() == 4838
    published = load_c_scores(dataclasses.replace(cifar10, name="cifar10"), root=real_data)
    assert torch.equal(published, scores)


@pytest.mark.parametrize(
    ("column", "percent"),
    [
        ("aggre_label", 9.01),
        ("random_label1", 17.23),
        ("random_label2", 18.12),
        ("random_label3", 17.64),
        ("worse_label", 40.21),
    ],
)
def test_human_errors(cifar10, real_data, column, percent):
    label = load_human_labels(cifar10, root=real_data, column=column)
    split = make_split(cifar10, kind="human", human_label=label)
    assert round(100 * split.memorized.double().mean().item(), 2) == percent
    assert torch.equal(split.label, label)


@pytest.fixture(scope="module")
def held_out_loss(mnist):
    """The loss of each digit under a linear classifier that was trained on the other half."""
    images = normalize(mnist.images).flatten(1)
    halves = torch.arange(60_000) % 2
    loss = torch.empty(60_000)
    for held_out in (0, 1):
        seen = (halves != held_out).nonzero().flatten()
        weight = torch.zeros(10, images.shape[1], requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.03)
        for rows in seen.repeat(3).split(200):
            error = functional.cross_entropy(images[rows] @ weight.T, mnist.label[rows])
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        with torch.no_grad():
            rows = halves == held_out
            loss[rows] = functional.cross_entropy(
                images[rows] @ weight.T, mnist.label[rows], reduction="none"
            )
    return loss


def test_mnist_scores_belong_to_the_digits_only_in_the_official_order(
    mnist, real_data, held_out_loss
):
    """Held-out models fail on atypical digits; on a wrong order they could not tell."""

    def loss_ratio(scores: torch.Tensor) -> float:
        atypical = scores < 0.5
        return (held_out_loss[atypical].mean() / held_out_loss[~atypical].mean()).item()

    in_tfds_order = torch.from_numpy(np.load(real_data / "c_scores" / PUBLISHED["mnist"].file))
    assert loss_ratio(load_c_scores(mnist, root=real_data)) > 5
    assert 0.8 < loss_ratio(in_tfds_order) < 1.25
