"""Agreement with planted units, permuted masks at chance, and deletion, against slow twins."""

import numpy as np
import pytest
import torch

from beyond.agreement import (
    SHARES_AT,
    closed_gate,
    compute_agreement,
    compute_cost,
    compute_deletion,
    compute_interval,
    make_rows,
    order_planted,
    order_units,
    permute_planted,
)
from beyond.localizers import UnitGates, run_gated
from tests.beyond.small_network import make, make_batch, named, slow_logits


def made_up(units: int = 40, seed: int = 0):
    """Scores with ties, units that are on, and planted ones among them."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(12, (units,), generator=generator).double()
    on = torch.rand(units, generator=generator) < 0.7
    planted = on & (torch.rand(units, generator=generator) < 0.3)
    return score, on, planted


def test_agreement_is_that_of_counting():
    score, on, planted = made_up()
    found = compute_agreement(score, on, planted)
    units = sorted((u for u in range(40) if on[u]), key=lambda u: (-score[u].item(), u))
    for share, k in zip(found.shares, SHARES_AT):
        assert share == pytest.approx(sum(planted[u].item() for u in units[:k]) / k)
    count = int(planted.sum())
    assert found.recall == pytest.approx(sum(planted[u].item() for u in units[:count]) / count)
    assert found.chance == pytest.approx(count / len(units))
    pairs = [
        1.0 if score[p] > score[n] else 0.5 if score[p] == score[n] else 0.0
        for p in units
        for n in units
        if planted[p] and not planted[n]
    ]
    assert found.auc == pytest.approx(np.mean(pairs))


def test_without_planted_units_there_is_no_agreement():
    score, on, planted = made_up()
    assert compute_agreement(score, on, torch.zeros_like(planted)) is None
    assert compute_agreement(score, planted, planted) is None


def test_perfect_and_reversed_scores_reach_the_ends():
    _, on, planted = made_up()
    best = compute_agreement(planted.double(), on, planted)
    worst = compute_agreement(-planted.double(), on, planted)
    assert (best.auc, best.recall, best.shares[0]) == (1, 1, 1)
    assert (worst.auc, worst.shares[0]) == (0, 0)


def test_permuted_masks_are_as_many_and_lie_at_chance():
    score, on, planted = made_up()
    permuted = [permute_planted(on, planted, index) for index in range(400)]
    for mask in permuted:
        assert int(mask.sum()) == int(planted.sum())
        assert not (mask & ~on).any()
    chance = compute_agreement(score, on, planted).chance
    found = [compute_agreement(score, on, mask) for mask in permuted]
    for values, expected in (([a.auc for a in found], 0.5), ([a.recall for a in found], chance)):
        error = np.std(values, ddof=1) / np.sqrt(len(values))
        assert abs(np.mean(values) - expected) < 4 * error


def test_the_interval_covers_the_mean_as_often_as_it_says():
    random, inside = np.random.default_rng(0), 0
    for seed in range(200):
        mean, low, high = compute_interval(random.normal(3, 1, size=40), seed)
        assert low < mean < high
        inside += low < 3 < high
    assert 0.88 < inside / 200 < 0.985
    assert np.isnan(compute_interval([], 0)).all()


def test_rows_average_over_examples_and_keep_layers_apart():
    examples = [made_up(seed=seed) for seed in range(5)]
    scores, on, planted = (torch.stack(columns) for columns in zip(*examples))
    first = torch.arange(40) < 20
    rows = list(make_rows({"localizer": "x"}, scores, on, planted, {"low": first}, 0))
    assert [row["layer"] for row in rows] == ["all", "low"]
    for row, units in zip(rows, (torch.ones(40, dtype=torch.bool), first)):
        each = [compute_agreement(s, o & units, p) for s, o, p in examples]
        assert row["auc"] == pytest.approx(np.mean([a.auc for a in each]))
        assert row["expected_by_chance"] == pytest.approx(np.mean([a.chance for a in each]))


def test_deletion_closes_the_first_units_of_each_example():
    model, batch = make(), make_batch(4)
    generator = torch.Generator().manual_seed(5)
    with UnitGates(model) as gates:
        scores = torch.rand(4, gates.count, generator=generator)
        orders = order_units(scores, gates.on(batch.index))
        found = compute_deletion(model, gates, batch, orders, (0, 3, 9))
    for place, count in enumerate((0, 3, 9)):
        for row in range(4):
            closed = named(gates, orders[row][:count])
            assert found[place, row] == slow_logits(model, batch, row, closed).argmax()


def test_planted_orders_hold_the_memorization_neurons_and_no_others():
    model, batch = make(), make_batch()
    gates = UnitGates(model)
    planted = gates.planted(batch.index)
    for row, order in enumerate(order_planted(planted, batch.index)):
        assert sorted(order) == planted[row].nonzero().flatten().tolist()


def test_the_cost_is_the_accuracy_with_the_units_closed_for_everyone():
    model, others = make(), make_batch()
    with UnitGates(model) as gates:
        closed = [0, 3, 11]
        kept, tested = compute_cost(model, gates, closed, others, others)
        rows = [slow_logits(model, others, row, named(gates, closed)) for row in range(14)]
        gate = closed_gate(gates, [closed], torch.device("cpu"))
        with gates.set(gate):
            expected = (model(others.images).argmax(1) == others.label).double().mean()
        together = run_gated(model, gates, others, gate)
    right = [logits.argmax().item() == label for logits, label in zip(rows, others.label.tolist())]
    assert kept == pytest.approx(np.mean(right))
    assert torch.allclose(together, torch.cat(rows))
    assert tested == pytest.approx(expected.item())
