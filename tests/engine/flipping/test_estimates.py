"""Estimates from samples agree with what they estimate, and draw whom they say."""

import copy
import math

import pytest
import torch
from torch import Tensor

from data import Examples, normalize
from engine.flipping.cached_passes import Correctness, ReferenceGradient
from engine.flipping.estimates import SampledCorrectness, SampledGradient, draw_weighted
from engine.flipping.gates import Gates
from models.dropout import ExampleTiedDropout, examples, insert_dropout
from tests.flipping_problems import EVERYTHING, Problem
from tests.slow_neurons import SlowNeurons


def slow_draw(merit: list[float], size: int) -> dict[int, float]:
    """Return the weight of each drawn row, by walking along the summed shares."""
    n, share = len(merit), [m / sum(merit) * 0.9 + 0.1 / len(merit) for m in merit]
    weight, below, row = {}, 0.0, 0
    for step in range(size):
        while below + share[row] < (step + 0.5) / size:
            below += share[row]
            row += 1
        weight[row] = weight.get(row, 0) + 1 / (size * n * share[row])
    return weight


def test_what_is_drawn_more_often_weighs_less():
    merit = torch.tensor([0.0, 5.0, 0.1, 2.0, 0.0, 1.0], dtype=torch.double)
    rows, weight = draw_weighted(merit, 4)
    assert dict(zip(rows.tolist(), weight.tolist())) == pytest.approx(slow_draw(merit.tolist(), 4))
    rows, weight = draw_weighted(merit, 100_000)
    assert rows.tolist() == [*range(6)]
    torch.testing.assert_close(weight, torch.full_like(weight, 1 / 6), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- the reference batch's gradient


def sampled(problem: Problem, gates: Gates, rows: int) -> SampledGradient:
    return SampledGradient(problem.model, gates, problem.reference, EVERYTHING, rows)


def test_a_large_sample_has_the_gradient_of_the_whole_batch():
    problem = Problem("resnet9")
    with Gates(problem.model) as gates:
        reference = ReferenceGradient(problem.model, gates, problem.reference, EVERYTHING)
        closed = [gates.count - 2, 3, 40, gates.count - 9, 7, 90]
        for k in range(len(closed) + 1):
            exact = reference.of(closed[:k])
            found = sampled(problem, gates, 100_000).of(closed[:k])
            torch.testing.assert_close(found.double(), exact.double(), rtol=1e-2, atol=1e-4)


def test_a_sample_takes_the_examples_with_the_largest_errors():
    problem = Problem("resnet9")
    closed = [3, 40]
    with Gates(problem.model) as gates:
        reference = sampled(problem, gates, 6)
        slow = SlowNeurons(copy.deepcopy(problem.model), "resnet9", "activation")
        for gate in closed:
            slow.close(gate)
        images, label = problem.reference.images, problem.reference.label
        probability = slow.averaged(images).softmax(1).detach()
        error = [
            sum(abs(float(p) - (c == int(y))) for c, p in enumerate(row))
            for row, y in zip(probability, label)
        ]
        rows, weight = reference._draw(frozenset(closed))
        found = dict(zip(rows.tolist(), weight.tolist()))
        assert found == pytest.approx(slow_draw(error, 6), rel=1e-4)
        assert len(found) > 1


def test_samples_are_redrawn_after_every_fourth_gate_only(monkeypatch):
    problem, drawn = Problem("resnet9"), []
    draw = SampledGradient._draw
    monkeypatch.setattr(
        SampledGradient, "_draw", lambda self, closed: (drawn.append(closed), draw(self, closed))[1]
    )
    with Gates(problem.model) as gates:
        reference = sampled(problem, gates, 6)
        for k in range(9):
            reference.of(range(k))
    assert drawn == [frozenset(range(k)) for k in (0, 4, 8)]


# ---------------------------------------------------------------- the accuracy on other images


def slow_margins(model: torch.nn.Module, name: str, images: Tensor, label: Tensor) -> Tensor:
    """Return each image's margin and its derivatives by the gates, [n, 1 + gates]."""
    slow, found = SlowNeurons(model, name, "activation"), []
    for image, own in zip(images, label.tolist()):
        logits = slow.model(normalize(image[None]).to(slow.final.dtype))[0]
        margin = logits[own] - max(value for c, value in enumerate(logits) if c != own)
        found.append(torch.cat([margin.detach()[None], slow.gradient(margin)]))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["resnet9", "vit_small"])
def test_uncertain_images_are_drawn_and_weighted(name):
    problem = Problem(name)
    model, images, label = problem.model.float(), problem.images, problem.label
    fresh = copy.deepcopy(model)
    margins = slow_margins(fresh, name, images, label).double()
    with Gates(model) as gates:
        accuracy = SampledCorrectness(model, gates, problem.examples, EVERYTHING, 12)
        for closed in ([3], [gates.count - 2, 5, 40], [*range(20)]):
            predicted = margins[:, 0] - margins[:, [1 + gate for gate in closed]].sum(1)
            blur = 0.2 * margins[:, 0].abs().median()
            wrong = [1 / (1 + math.exp(float(margin / blur))) for margin in predicted]
            merit = [math.sqrt(p * (1 - p)) for p in wrong]
            order = sorted(range(len(merit)), key=lambda row: predicted[row])
            expected = slow_draw([merit[row] for row in order], 12)
            slow = SlowNeurons(fresh, name, "activation")
            for gate in closed:
                slow.close(gate)
            with torch.no_grad():
                logits = slow.model(normalize(images))
            correct = (logits.argmax(1) == label).tolist()
            weight = {order[place]: w for place, w in expected.items()}
            for without in (None, next(iter(weight))):
                kept = {row: w for row, w in weight.items() if row != without}
                found = sum(w * correct[row] for row, w in kept.items()) / sum(kept.values())
                assert accuracy.accuracy(closed, without) == pytest.approx(found, rel=1e-2)
        assert accuracy.accuracy(()) == (model(normalize(images)).argmax(1) == label).float().mean()


def test_a_large_sample_has_the_accuracy_of_all_images():
    """Also where kept states are few, and with more images than one pass takes."""
    problem = Problem("resnet9")
    model, found = problem.model.float(), set()
    with Gates(model) as gates:
        exact = Correctness(model, gates, problem.examples, EVERYTHING)
        for memory in (0, 100_000, EVERYTHING):
            sample = SampledCorrectness(model, gates, problem.examples, memory, 100_000)
            for closed in ([3], [*range(0, 60, 2)], [*range(gates.count - 60, gates.count)]):
                found.add(exact.accuracy(closed))
                expected = exact.accuracy(closed, 5)
                assert sample.accuracy(closed, 5) == pytest.approx(expected, abs=1e-3)
    assert len(found) > 1


def test_margins_are_those_under_each_examples_own_mask():
    problem = Problem("resnet9")
    model, images, label = problem.model.float(), problem.images, problem.label
    channels = model.conv4.conv.out_channels
    insert_dropout(model, {"conv4": ExampleTiedDropout(channels, len(label))})
    model.eval()
    index = torch.arange(len(label))
    with Gates(model) as gates:
        given = Examples(images, label, index)
        sample = SampledCorrectness(model, gates, given, EVERYTHING, 12)
    with torch.no_grad(), examples(model, index):
        logits = model(normalize(images))
    own = logits.gather(1, label[:, None])[:, 0]
    others = logits.scatter(1, label[:, None], -torch.inf).max(1).values
    torch.testing.assert_close(sample.margin.float(), own - others)
    with torch.no_grad():
        assert not torch.equal(model(normalize(images)), logits)
