import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, add_label_noise, epoch_order


@given(
    n=st.integers(0, 200),
    rate=st.floats(0, 1),
    classes=st.integers(2, 12),
    seed=st.integers(0, 2**32),
)
def test_the_count_is_exact_and_nobody_keeps_the_true_class(n, rate, classes, seed):
    label = torch.arange(n) % classes
    noisy, memorized = add_label_noise(label, rate, classes, seed)
    assert memorized.sum() == round(rate * n)
    assert torch.equal(noisy != label, memorized)
    assert ((noisy >= 0) & (noisy < classes)).all()


@pytest.mark.parametrize(
    ("rate", "n", "count"), [(0, 50, 0), (1, 50, 50), (0.1, 4000, 400), (0.1, 25, 2), (0.1, 35, 4)]
)
def test_counts(rate, n, count):
    """2.5 and 3.5 both go to the even neighbour."""
    assert add_label_noise(torch.zeros(n, dtype=torch.int64), rate, 10, 0)[1].sum() == count


def test_every_wrong_class_is_as_likely():
    classes, each = 10, 3000
    label = torch.arange(classes).repeat(each)
    noisy, _ = add_label_noise(label, 1, classes, 0)
    counts = torch.zeros(classes, classes)
    counts.index_put_((label, noisy), torch.ones(len(label)), accumulate=True)
    assert (counts.diagonal() == 0).all()
    wrong = counts[~torch.eye(classes, dtype=torch.bool)]
    expected = each / (classes - 1)
    # Pearson's statistic of 90 cells with 80 degrees of freedom: mean 80, deviation 12.6.
    assert ((wrong - expected) ** 2 / expected).sum() < 80 + 5 * 12.6


def test_who_is_chosen_is_uniform():
    """No place in the data set is favoured: the chosen ones' mean position is the middle."""
    positions = [
        add_label_noise(torch.zeros(1000, dtype=torch.int64), 0.1, 10, seed)[1].nonzero()
        for seed in range(100)
    ]
    mean = torch.cat(positions).double().mean()
    assert abs(mean - 499.5) < 5 * 288.7 / 100  # five standard errors of 10,000 draws


def test_the_seed_decides():
    label = torch.zeros(500, dtype=torch.int64)
    first, again, other = (add_label_noise(label, 0.2, 10, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_lower_rate_is_contained_in_a_higher_one():
    label = torch.arange(500) % 10
    low, few = add_label_noise(label, 0.1, 10, 0)
    high, many = add_label_noise(label, 0.3, 10, 0)
    assert many[few].all()
    assert torch.equal(low[few], high[few])


def test_the_input_is_not_changed():
    label = torch.zeros(100, dtype=torch.int64)
    add_label_noise(label, 0.5, 10, 0)
    assert (label == 0).all()


def test_equal_seeds_do_not_tie_the_noise_to_the_order_of_the_batches():
    """The noisy examples of seed 0 are spread over the epoch, not its first batches."""
    _, memorized = add_label_noise(torch.zeros(2000, dtype=torch.int64), 0.1, 10, 0)
    in_the_first_tenth = memorized[epoch_order(2000, 0, 0)[:200]].sum()
    assert 5 <= in_the_first_tenth <= 40  # 20 expected, 200 if the streams were the same


@pytest.mark.parametrize("rate", [-0.1, 1.2, float("nan")])
def test_an_impossible_rate(rate):
    with pytest.raises(DataError, match="allowed: from 0 to 1"):
        add_label_noise(torch.zeros(10, dtype=torch.int64), rate, 10, 0)


def test_one_class_has_no_wrong_label():
    with pytest.raises(DataError, match="two classes"):
        add_label_noise(torch.zeros(10, dtype=torch.int64), 0.1, 1, 0)
