"""Second-split forgetting: halves, two phases, and going on after an interruption."""

import numpy as np
import pytest
import torch

import gradient_accounting
from engine import second_split
from engine.evaluation import evaluate
from engine.runs import Run
from engine.second_split import compute_forgetting, halves, subset
from engine.setup import load_split, make_model
from engine.training import PlainBackward, train_epoch


def test_the_halves_are_a_partition():
    first, second = halves(101, seed=3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(101))
    assert (len(first), len(second)) == (50, 51)
    assert not torch.equal(first, halves(101, seed=4)[0])


def test_a_subset_is_the_same_problem_with_fewer_examples(tiny):
    split = load_split(tiny())
    rows = torch.tensor([5, 2, 40])
    part = subset(split, rows)
    assert part.n == 3
    for name in ("images", "label", "true_label", "memorized", "index"):
        assert torch.equal(getattr(part, name), getattr(split, name)[rows])
    assert part.test_images is split.test_images


def test_forgetting_against_a_loop(tiny):
    config = tiny("train.epochs=4")
    split = load_split(config)
    first, second = (subset(split, rows) for rows in halves(split.n, 0))
    found = compute_forgetting(config, first, second)

    model = make_model(config, first)
    forgotten = np.full(first.n, 5)
    for phase, half in enumerate((first, second)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0, momentum=0.9, weight_decay=5e-4)
        for epoch in (1, 2, 3, 4):
            train_epoch(model, optimizer, half, config, epoch, PlainBackward().backward)
            for i, right in enumerate(evaluate(model, first.images, first.label).correct):
                if phase and right:
                    forgotten[i] = 5
                elif phase and forgotten[i] == 5:
                    forgotten[i] = epoch
    assert found.tolist() == forgotten.tolist()
    assert len(set(found)) > 1


def test_an_order_that_is_done_is_not_trained_again(tiny, monkeypatch):
    run = Run.of(tiny("train.epochs=2"))
    gradient_accounting.main(run)
    split, calls = load_split(run.config), []
    compute = second_split.compute_forgetting

    def die_in_the_second(config, first, second):
        calls.append(first.n)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(config, first, second)

    monkeypatch.setattr(second_split, "compute_forgetting", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        second_split.measure_forgetting(run, split)
    second_split.measure_forgetting(run, split)
    second_split.measure_forgetting(run, split)
    assert len(calls) == 3
    times = second_split.read_forgetting(run)
    assert times.shape == (split.n,)
    assert times.min() >= 1
    assert times.max() <= 3
