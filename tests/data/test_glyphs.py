import time

import numpy as np
import torch
from torch.nn import functional

from data import load_dataset, normalize
from data.glyphs import GLYPH_NAMES, SEGMENTS, _distance, make_glyphs


def test_shape_type_and_balance():
    images, label, typicality = make_glyphs(995)
    assert images.shape == (995, 1, 20, 20)
    assert images.dtype == torch.uint8
    assert label.dtype == torch.int64
    assert typicality.dtype == torch.float64
    assert ((typicality > 0) & (typicality <= 1)).all()
    assert set(label[:990].bincount().tolist()) == {99}  # every ten glyphs show each class
    assert len(set(GLYPH_NAMES)) == 10


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    large, again = make_glyphs(700), make_glyphs(700)
    for n in (1, 13, 256, 257):
        for part, whole, same in zip(make_glyphs(n), large, again):
            assert torch.equal(part, whole[:n])
            assert torch.equal(whole, same)


def test_training_and_test_glyphs_differ():
    dataset = load_dataset("glyphs", train_size=300, test_size=300)
    assert not torch.equal(dataset.label, dataset.test_label)
    assert not (dataset.images[:, None] == dataset.test_images[None]).flatten(2).all(2).any()
    assert torch.equal(dataset.images, make_glyphs(300, "train")[0])


def test_five_thousand_take_less_than_two_seconds():
    start = time.process_time()
    make_glyphs(5000)
    assert time.process_time() - start < 2


def test_the_tail_is_atypical_and_thin():
    _, _, typicality = make_glyphs(10_000)
    assert 0.08 <= (typicality < 0.5).double().mean() <= 0.12
    assert (typicality > 0.7).double().mean() > 0.8
    assert len(typicality.unique()) == 10_000  # continuous


def test_distances_agree_with_one_pixel_at_a_time():
    generator = np.random.default_rng(0)
    segments = generator.uniform(-1, 1, (2, SEGMENTS, 2, 2)).astype(np.float32)
    segments[0, 0, 1] = segments[0, 0, 0]  # a segment without length
    kept = generator.random((2, SEGMENTS)) < 0.6
    fast = _distance(segments, kept).reshape(2, 20, 20)
    for image, row, column in [(0, 0, 0), (0, 7, 12), (1, 19, 3), (1, 10, 10)]:
        pixel = np.array([(column + 0.5) / 10 - 1, (row + 0.5) / 10 - 1])
        points = np.linspace(0, 1, 5001)[:, None]
        distances = [
            np.linalg.norm(start * (1 - points) + end * points - pixel, axis=1).min()
            for (start, end), keep in zip(segments[image].astype(float), kept[image])
            if keep
        ]
        assert abs(fast[image, row, column] - min(distances)) < 1e-3


def small_convnet(generator: torch.Generator) -> list[torch.Tensor]:
    shapes = [(16, 1, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64)]
    return [
        (torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5).requires_grad_()
        for shape in shapes
    ]


def logits(weights: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    x = images
    for weight in weights[:-1]:
        x = functional.relu(functional.conv2d(x, weight, stride=2, padding=1))
    return x.amax((2, 3)) @ weights[-1].T


def test_a_small_convnet_learns_glyphs_and_finds_the_atypical_harder():
    images, label, _ = make_glyphs(3000, "train")
    test_images, test_label, typicality = make_glyphs(1000, "test")
    generator = torch.Generator().manual_seed(0)
    weights = small_convnet(generator)
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for _ in range(10):
        for rows in torch.randperm(len(label), generator=generator).split(100):
            loss = functional.cross_entropy(logits(weights, normalize(images[rows])), label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        correct = logits(weights, normalize(test_images)).argmax(1) == test_label
    typical = typicality >= 0.5
    assert correct.double().mean() > 0.93
    assert correct[typical].double().mean() > 0.97
    assert correct[~typical].double().mean() < correct[typical].double().mean() - 0.1
