"""Localizers agree with slow, obvious twins, and gates leave a model as it was."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from beyond.localizers import (
    LOCALIZERS,
    UnitGates,
    compute_activations,
    compute_gate_gradients,
    compute_losses,
    compute_reference_gradient,
    rank_units,
    score_flipping,
    score_integrated_gradients,
    score_zero_out,
)
from models.dropout import examples
from tests.beyond.small_network import N, make, make_batch, named, slow_logits


def slow_loss(model, batch, row, closed=None, scale=1.0) -> float:
    logits = slow_logits(model, batch, row, closed or {}, scale)
    return F.cross_entropy(logits, batch.label[row : row + 1]).item()


@pytest.mark.parametrize("tied", [True, False])
def test_closed_gates_zero_the_channels_that_leave_a_site(tied):
    model, batch = make(tied=tied), make_batch(3)
    with UnitGates(model) as gates:
        closed = [0, gates.sites[2].first + 1, gates.sites[4].first, gates.count - 2]
        gate = torch.ones(3, gates.count)
        gate[1, closed] = 0
        found = compute_losses(model, gates, batch, gate).tolist()
    expected = [
        slow_loss(model, batch, row, named(gates, closed if row == 1 else [])) for row in range(3)
    ]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[1] != pytest.approx(slow_loss(model, batch, 1), rel=1e-6)


def test_gate_gradients_are_finite_differences():
    model, batch, step = make(), make_batch(2), 1e-5
    generator = torch.Generator().manual_seed(3)
    with UnitGates(model) as gates:
        gate = torch.rand(2, gates.count, dtype=torch.float64, generator=generator) + 0.5
        found = compute_gate_gradients(model, gates, batch, gate)
        for unit in range(gates.count):
            shift = torch.zeros_like(gate)
            shift[:, unit] = step
            ends = [compute_losses(model, gates, batch, gate + s * shift) for s in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert torch.allclose(found[:, unit], slope, atol=1e-6)
    assert (found != 0).any()
    off = ~gates.on(batch.index)
    assert off.any()
    assert (found[off] == 0).all()


def test_the_reference_gradient_is_the_mean_of_its_examples_gradients():
    model, batch = make(), make_batch()
    with UnitGates(model) as gates:
        closed = frozenset([1, 9])
        gate = torch.ones(N, gates.count)
        gate[:, list(closed)] = 0
        each = compute_gate_gradients(model, gates, batch, gate)
        found = compute_reference_gradient(model, gates, batch, closed)
    assert torch.allclose(found, each.mean(0))


def test_integrated_gradients_are_complete():
    model, batch = make(), make_batch(4)
    with UnitGates(model) as gates:
        found = score_integrated_gradients(model, gates, batch, batch, nodes=400).sum(1)
    expected = [
        slow_loss(model, batch, row, scale=0) - slow_loss(model, batch, row) for row in range(4)
    ]
    assert found.tolist() == pytest.approx(expected, abs=2e-3)
    assert max(map(abs, expected)) > 0.1


def test_zero_out_is_one_pass_for_each_unit():
    model, batch = make(), make_batch(2)
    with UnitGates(model) as gates:
        found, on = score_zero_out(model, gates, batch, batch), gates.on(batch.index)
    for row in range(2):
        for unit in on[row].nonzero().flatten().tolist():
            rise = slow_loss(model, batch, row, named(gates, [unit])) - slow_loss(model, batch, row)
            assert found[row, unit].item() == pytest.approx(rise, abs=1e-9)


def slow_greedy(model, gates, batch, reference, row: int, steps: int) -> list[int]:
    """The greedy order by finite differences of losses, one unit after the other."""
    on, step, closed = gates.on(batch.index)[row].tolist(), 1e-5, []

    def difference(gate: torch.Tensor) -> float:
        own = compute_losses(model, gates, batch.take(slice(row, row + 1)), gate[None])
        common = compute_losses(model, gates, reference, gate.expand(len(reference), -1))
        return (own.mean() - common.mean()).item()

    for _ in range(steps):
        gains = {}
        for unit in range(gates.count):
            if not on[unit] or unit in closed:
                continue
            ends = []
            for sign in (1, -1):
                gate = torch.ones(gates.count, dtype=torch.float64)
                gate[closed] = 0
                gate[unit] += sign * step
                ends.append(difference(gate))
            gains[unit] = -(ends[0] - ends[1]) / (2 * step)
        closed.append(max(gains, key=gains.get))
    return closed


def test_flipping_closes_units_in_the_order_of_brute_force():
    model, reference, steps = make(), make_batch(), 4
    batch = reference.take(slice(3))
    with UnitGates(model) as gates:
        score, on = score_flipping(model, gates, batch, reference, steps), gates.on(batch.index)
        for row in range(3):
            expected = slow_greedy(model, gates, batch, reference, row, steps)
            ranked = rank_units(score[row], on[row]).tolist()
            assert ranked[:steps] == expected
            assert sorted(ranked) == on[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("masks", [(0, 1), (1, 0), (5, 8)])
def test_selectivity_is_that_of_the_formula(masks):
    """Under another example's mask it is still the example itself that is no reference."""
    model, batch = make(), make_batch()
    asked = batch.take(slice(2)).under_masks_of(torch.tensor(masks))
    with UnitGates(model) as gates:
        scores = {
            name: LOCALIZERS[name](model, gates, asked, batch)
            for name in ("unitmem", "unitmem_own_masks")
        }
        alone = compute_activations(model, gates, batch)
        own = compute_activations(model, gates, asked)
        for row, name in itertools.product(range(2), scores):
            others = [other for other in range(N) if other != row]
            if name == "unitmem":
                under = batch.take(others).under_masks_of(asked.index[row])
                seen = compute_activations(model, gates, under)
            else:
                seen = alone[others]
            for unit in range(gates.count):
                a, m = own[row, unit].item(), seen[:, unit].mean().item()
                expected = (a - m) / (a + m) if a + m else 0
                assert scores[name][row, unit].item() == pytest.approx(expected, abs=1e-9)


def test_activations_are_those_behind_the_residual_sum():
    model, batch = make(), make_batch(3)
    with UnitGates(model) as gates:
        found = compute_activations(model, gates, batch)
    seen = {}
    hooks = [
        getattr(model, site).register_forward_hook(
            lambda m, i, o, site=site: seen.update({site: o})
        )
        for site in model.dropout_sites()
    ]
    with examples(model, batch.index):
        model(batch.images)
    for hook in hooks:
        hook.remove()
    expected = torch.cat([seen[site].abs().mean((2, 3)) for site in model.dropout_sites()], dim=1)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("name", LOCALIZERS)
def test_examples_are_scored_independently(name):
    model, batch = make(), make_batch()
    with UnitGates(model) as gates:
        together = LOCALIZERS[name](model, gates, batch.take(slice(4)), batch)
        alone = LOCALIZERS[name](model, gates, batch.take(slice(2, 3)), batch)
        on = gates.on(batch.index[2:3])[0]
    assert together.shape == (4, gates.count)
    assert torch.allclose(together[2, on], alone[0, on], atol=1e-9)


def test_units_that_are_on_are_shared_ones_and_the_example_s_own():
    model, batch = make(), make_batch()
    gates = UnitGates(model)
    on, planted = gates.on(batch.index), gates.planted(batch.index)
    for site, layer in zip(gates.sites, model.inserted_dropout):
        assert on[:, site.first : site.first + layer.generalization].all()
        assert not planted[:, site.first : site.first + layer.generalization].any()
        memory = slice(site.first + layer.generalization, site.first + site.count)
        assert torch.equal(on[:, memory], layer.masks[batch.index])
        assert torch.equal(planted[:, memory], layer.masks[batch.index])


def test_leaving_the_gates_restores_the_model_also_after_an_error():
    model, batch = make(), make_batch(3)
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with (
        pytest.raises(RuntimeError),
        UnitGates(model) as gates,
        gates.set(torch.zeros(1, gates.count)),
    ):
        raise RuntimeError
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert gates._gate is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with UnitGates(model) as gates:
        own = compute_losses(model, gates, batch).tolist()
    assert own == pytest.approx([slow_loss(model, batch, row) for row in range(3)])
