"""The search closes the gates that a slow, obvious search closes, and finds what was planted."""

import pytest
import torch

from data import Examples
from engine.flipping.cached_passes import ReferenceGradient
from engine.flipping.gates import Gates
from engine.flipping.search import Candidate, best_gates, search
from tests.flipping_problems import EVERYTHING, Problem
from tests.slow_neurons import make, slow_search


@pytest.mark.parametrize("ablate", ["activation", "weight"])
@pytest.mark.parametrize(
    "name", ["resnet9", "single_conv", "vit_small", "resnet18", "pre_activation", "mixed"]
)
def test_same_gates_as_the_slow_search(name, ablate):
    problem = Problem(name)
    expected = {}
    for row in problem.rows:
        image, label = problem.copies[row], problem.label[row]
        closed, flipped, _ = slow_search(
            problem.model, name, ablate, image, label,
            problem.reference.images, problem.reference.label, most=9,
        )  # fmt: skip
        expected[row] = closed, flipped
    assert len({tuple(closed) for closed, _ in expected.values()}) > 1
    assert max(len(closed) for closed, _ in expected.values()) > 1
    assert problem.search(ablate, chunk=4, most=9) == expected


def test_in_float32_too():
    """The precision of real runs, where nothing is exact but the results must be the same."""
    problem = Problem("resnet9")
    problem.model = problem.model.float()
    problem.copies = problem.copies.float()
    problem.reference = Examples(problem.copies[28:], problem.label[28:])
    expected = {}
    for row in problem.rows:
        closed, flipped, _ = slow_search(
            problem.model, "resnet9", "activation", problem.copies[row], problem.label[row],
            problem.reference.images, problem.reference.label, most=8,
        )  # fmt: skip
        expected[row] = closed, flipped
    for chunk in (1, 4):
        assert problem.search("activation", chunk, 8) == expected


def test_a_stale_reference_is_used_between_refreshes():
    problem = Problem("resnet9")
    exact = problem.search("activation", chunk=4, most=6)
    assert problem.search("activation", chunk=4, most=6, refresh=1) == exact
    stale = problem.search("activation", chunk=4, most=6, refresh=100)
    assert all(stale[row][0][:1] == exact[row][0][:1] for row in exact)
    assert stale != exact


@pytest.mark.parametrize("ablate", ["activation", "weight"])
@pytest.mark.parametrize("kind", ["channel", "weight"])
def test_a_planted_neuron_is_found_first_and_alone(kind, ablate):
    """Channel 5, or the weight of class 2 for channel 5, alone carries the label of one example.

    The example has a bright spot, which only channel 5 responds to; all other channels are constant
    and vote for class 1.
    """
    model = make("single_conv").requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.conv.bias[:] = 0.2
    model.conv.weight[5, 0] = -0.05
    model.conv.weight[5, 0, 1:4, 1:4] = 0.2
    model.linear.weight[1] = 0.3
    if kind == "channel":  # silent on all other examples
        model.conv.bias[5] = -1.0
        model.linear.weight[:, 5] = 0
        model.linear.weight[2, 5] = 15.0
    else:  # which holds up the other examples' label with another weight
        model.conv.bias[5] = 1.0
        model.linear.weight[1, 5] = 5.0
        model.linear.weight[2, 5] = 8.0
        model.linear.bias[2] = -4.0
    plain = torch.full((16, 1, 20, 20), 0.5)
    odd = plain[:1].clone()
    odd[:, :, 6:11, 6:11] = 12.0
    assert int(model(odd).argmax()) == 2
    label = model(plain).argmax(1)
    assert (label == 1).all()
    with Gates(model, ablate) as gates:
        reference = ReferenceGradient(model, gates, Examples(plain[:, None], label), EVERYTHING)
        candidate = Candidate(0, torch.tensor(2), odd)
        ((found, flipped),) = search(model, gates, reference, [candidate], 8, 20)
        names = [gates.site_of(gate).describe(gate) for gate in found.closed]
    assert flipped
    assert names == [{"channel": "conv:5", "weight": "linear:2:5"}[kind]]


def test_equal_scores_go_to_the_lowest_gate():
    score = torch.tensor([1.0, 2.0, 2.0001, 2.0])
    scores = torch.stack([score, score, -score, torch.zeros(4)])
    assert best_gates(scores, [[], [1], [], [0, 1]]) == [1, 2, 0, 2]
    assert best_gates(scores, [[]] * 4) == [1, 1, 0, 0]


def test_every_gate_closed_ends_the_search():
    problem = Problem("single_conv", count=1, copies=1)
    problem.model.linear.bias[:] = 0
    problem.model.linear.bias[int(problem.label[0])] = 100.0
    found = problem.search("activation", chunk=4, most=10_000)
    with Gates(problem.model) as gates:
        closed, flipped = found[0]
        assert not flipped
        assert sorted(closed) == list(range(gates.count))
