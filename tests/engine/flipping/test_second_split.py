"""Second-split forgetting: halves, two phases, and going on after an interruption."""

import numpy as np
import pytest
import torch

import gradient_accounting
from data import normalize
from engine.flipping import second_split
from engine.flipping.second_split import compute_forgetting, halves
from engine.runs.run import Run
from engine.training.build import load_split, make_model
from engine.training.evaluation import evaluate
from engine.training.loop import train_epoch
from models.dropout import examples


def test_the_halves_are_a_partition():
    first, second = halves(101, seed=3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(101))
    assert (len(first), len(second)) == (50, 51)
    assert not torch.equal(first, halves(101, seed=4)[0])


def test_a_subset_is_the_same_problem_with_fewer_examples(tiny):
    split = load_split(tiny())
    rows = torch.tensor([5, 2, 40])
    part = split.subset(rows)
    assert part.n == 3
    for name in ("images", "label", "true_label", "memorized", "index"):
        assert torch.equal(getattr(part, name), getattr(split, name)[rows])
    assert part.test_images is split.test_images


def test_forgetting_against_a_loop(tiny):
    config = tiny("train.epochs=4")
    split = load_split(config)
    own, other = halves(split.n, 0)
    found = compute_forgetting(config, split, own, other)

    first, second = split.subset(own), split.subset(other)
    model = make_model(config, split)
    forgotten = np.full(first.n, 5)
    for phase, half in enumerate((first, second)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0, momentum=0.9, weight_decay=5e-4)
        for epoch in (1, 2, 3, 4):
            train_epoch(model, optimizer, half, config, epoch)
            for i, right in enumerate(evaluate(model, first.images, first.label).correct):
                if phase and right:
                    forgotten[i] = 5
                elif phase and forgotten[i] == 5:
                    forgotten[i] = epoch
    assert found.tolist() == forgotten.tolist()
    assert len(set(found)) > 1


def test_under_example_tied_dropout_every_example_has_its_own_mask(tiny):
    """In training and when it is looked at, in both orders; the slow twin goes one by one."""
    config = tiny("train.epochs=2", "dropout.kind=example_tied", "model.width=0.2")
    split = load_split(config)
    for own, other in (halves(split.n, 0), halves(split.n, 0)[::-1]):
        found = compute_forgetting(config, split, own, other)
        model = make_model(config, split)
        wrong = []
        for phase, half in enumerate((split.subset(own), split.subset(other))):
            optimizer = torch.optim.SGD(model.parameters(), lr=0, momentum=0.9, weight_decay=5e-4)
            for epoch in (1, 2):
                train_epoch(model, optimizer, half, config, epoch)
                if phase:
                    one_by_one = []
                    for row in own.tolist():
                        with torch.no_grad(), examples(model.eval(), split.index[row : row + 1]):
                            logits = model(normalize(split.images[row : row + 1]))
                        one_by_one.append(int(logits.argmax()) != int(split.label[row]))
                    wrong.append(one_by_one)
        expected = [(1 if first else 2) if last else 3 for first, last in zip(*wrong)]
        assert found.tolist() == expected
        assert len(set(expected)) > 1


def test_an_order_that_is_done_is_not_trained_again(tiny, monkeypatch):
    run = Run.of(tiny("train.epochs=2"))
    gradient_accounting.EXPERIMENT.main(run)
    split, calls = load_split(run.config), []
    compute = second_split.compute_forgetting

    def die_in_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*arguments)

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
