"""Standard dropout: its random gates, and its two readings of p and of what is drawn."""

import numpy as np
import pytest
import torch

from models.dropout import StandardDropout, random_gate


def slow_gate(shape: tuple[int, ...], p: float) -> torch.Tensor:
    """Decide number after number by its 16 bits of the same random words, in plain Python."""
    count = int(np.prod(shape))
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).tolist()
    raw = b"".join(word.to_bytes(8, "little", signed=True) for word in words)
    share = round(p * 2**16)
    gates = []
    for i in range(count):
        value = int.from_bytes(raw[2 * i : 2 * i + 2], "little", signed=True)
        gates.append(2**16 / share if value + 2**15 < share else 0.0)
    return torch.tensor(gates, dtype=torch.float32).view(shape)


@pytest.mark.parametrize("p", [0.1, 0.4, 0.6, 0.999])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7, 5)])
def test_gates_are_those_of_the_slow_way(p, shape):
    state = torch.get_rng_state()
    gates = random_gate(torch.empty(shape), p)
    torch.set_rng_state(state)
    assert torch.equal(gates, slow_gate(shape, p))


@pytest.mark.parametrize("p", [0.05, 0.4, 0.6, 0.95])
def test_gates_have_the_share_and_are_independent_of_their_neighbours(p):
    """Allow five standard errors of a million draws: for the share, and for pairs of places."""
    n = 1_000_003
    gates = random_gate(torch.empty(n), p)
    assert gates.unique().tolist() == pytest.approx([0, 1 / p], rel=1e-3)
    kept = (gates > 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean().item() - p) < 5 * deviation / n**0.5 + 2**-16
    centred = (kept - p) / deviation
    for distance in (1, 2, 3, 4, 5, 8, 64, 1000):  # four gates share a word
        correlation = (centred[distance:] * centred[:-distance]).mean().item()
        assert abs(correlation) < 5 / (n - distance) ** 0.5, distance


def test_sums_of_gates_spread_as_those_of_independent_draws():
    """Counts of eight neighbouring gates follow the binomial distribution (chi-squared test)."""
    from scipy import stats

    p, groups = 0.4, 100_000
    counts = (random_gate(torch.empty(groups, 8), p) > 0).sum(1)
    observed = torch.bincount(counts, minlength=9).numpy()
    expected = groups * stats.binom.pmf(np.arange(9), 8, round(p * 2**16) / 2**16)
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_two_passes_draw_anew_and_a_restored_state_draws_again():
    layer, x = StandardDropout(0.4), torch.ones(4, 8, 6, 6)
    state = torch.get_rng_state()
    first, second = layer(x), layer(x)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_no_share_is_rounded_to_never_or_always(share):
    gates = random_gate(torch.empty(2_000_000), share)
    assert 0 < (gates > 0).sum() < len(gates)
    assert gates.mean().item() == pytest.approx(1, abs=1)


def test_memory_order_gradient_and_precision_are_those_of_the_activations():
    x = torch.randn(4, 8, 6, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = StandardDropout(0.5)(x.requires_grad_())
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert torch.equal(x.grad * x.detach(), out.detach())


@pytest.mark.parametrize(("shape", "dim"), [((6, 40, 5, 5), 1), ((6, 7, 40), -1)])
def test_whole_channels_are_kept_or_dropped_for_each_example(shape, dim):
    layer = StandardDropout(0.5, whole_channels=True, dim=dim)
    out = layer(torch.ones(shape)).movedim(dim, 1).flatten(2)
    assert torch.equal(out, out[:, :, :1].expand_as(out))
    kept = out[:, :, 0] > 0
    assert 0.3 < kept.double().mean() < 0.7
    assert not torch.equal(kept[0], kept[1])
    x = torch.randn(shape)
    assert torch.equal(layer.eval()(x), x)
