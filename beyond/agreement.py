"""Compare rankings of units with the planted ones, and delete units in the order of a ranking."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from beyond.localizers import UnitGates, rank_units, run_gated
from data import Examples
from data.random_streams import random_stream
from engine.stats import compute_auc

SHARES_AT = (1, 5, 10)
CLOSED = (0, 1, 2, 3, 5, 10, 20, 40, 80)  # units closed in a deletion curve
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles

# ---------------------------------------------------------------- one ranking against the truth


@dataclass(frozen=True)
class Agreement:
    """Agreement of one example's scores with its planted units."""

    shares: tuple[float, ...]  # planted units among the first 1, 5, 10
    recall: float  # planted units among the first as many as there are
    chance: float  # share of planted units among all that are on
    auc: float


def compute_agreement(score: Tensor, on: Tensor, planted: Tensor) -> Agreement | None:
    """Compare a ranking of the units that are on with the planted ones.

    None where no unit is planted, or every one.
    """
    ranked = planted[rank_units(score, on)].double()
    count, total = int(ranked.sum()), len(ranked)
    if count in (0, total):
        return None
    shares = tuple(ranked[:k].mean().item() for k in SHARES_AT)
    sides = (score[side].cpu().numpy() for side in (on & planted, on & ~planted))
    return Agreement(shares, ranked[:count].mean().item(), count / total, compute_auc(*sides))


def permute_planted(on: Tensor, planted: Tensor, index: int) -> Tensor:
    """Return as many planted units, drawn at random from those that are on."""
    units = on.nonzero().flatten()
    count = int((planted & on).sum())
    order = random_stream("permuted masks", index).permutation(len(units))
    found = torch.zeros_like(planted)
    found[units[torch.from_numpy(order[:count]).to(units.device)]] = True
    return found


def compute_interval(values: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Return the mean and its 95% interval, from a bootstrap over examples; nan without values."""
    values = np.asarray([value for value in values if not np.isnan(value)], dtype=float)
    if not len(values):
        return np.nan, np.nan, np.nan
    draw = random_stream("planted bootstrap", seed)
    rows = draw.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[rows].mean(1), INTERVAL)
    return float(values.mean()), float(low), float(high)


def make_rows(
    names: Mapping[str, object],
    scores: Tensor,
    on: Tensor,
    planted: Tensor,
    layers: Mapping[str, Tensor],
    seed: int,
) -> Iterator[dict[str, object]]:
    """Yield a row over all units, and one for each layer (bool [units]), without `flips_at`."""
    everywhere = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    for layer, units in {"all": everywhere, **layers}.items():
        each = [compute_agreement(s, o & units, p) for s, o, p in zip(scores, on, planted)]
        found = [agreement for agreement in each if agreement is not None]
        row = {**names, "layer": layer, "examples": len(found)}
        for place, k in enumerate(SHARES_AT):
            row[f"share_planted_at_{k}"] = mean(a.shares[place] for a in found)
        row["expected_by_chance"] = mean(a.chance for a in found)
        recall = compute_interval([a.recall for a in found], seed)
        auc = compute_interval([a.auc for a in found], seed)
        row |= dict(zip(("recall", "recall_low", "recall_high"), recall))
        row |= dict(zip(("auc", "low", "high"), auc))
        row |= {f"flips_at_{k}": np.nan for k in SHARES_AT}
        yield row


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else np.nan


# ---------------------------------------------------------------- deletion


def order_units(scores: Tensor, on: Tensor) -> list[list[int]]:
    """Return each example's units that are on, the highest score first."""
    return [rank_units(score, units).tolist() for score, units in zip(scores, on)]


def order_planted(planted: Tensor, index: Tensor) -> list[list[int]]:
    """Return each example's own memorization neurons in a random order, and no other unit."""
    orders = []
    for units, example in zip(planted, index.tolist()):
        numbers = units.nonzero().flatten().cpu().numpy()
        orders.append(random_stream("planted order", example).permutation(numbers).tolist())
    return orders


def closed_gate(gates: UnitGates, sets: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return gates [sets, units] that are 0 for the units of each set."""
    gate = torch.ones(len(sets), gates.count, device=device)
    for row, numbers in enumerate(sets):
        gate[row, list(numbers)] = 0
    return gate


@torch.no_grad()
def compute_deletion(
    model: nn.Module,
    gates: UnitGates,
    batch: Examples,
    orders: Sequence[Sequence[int]],
    counts: Sequence[int] = CLOSED,
) -> Tensor:
    """Return each example's prediction [counts, n] with its first units closed."""
    found = []
    for count in counts:
        gate = closed_gate(gates, [order[:count] for order in orders], batch.label.device)
        found.append(run_gated(model, gates, batch, gate).argmax(1))
    return torch.stack(found)


@torch.no_grad()
def compute_cost(
    model: nn.Module,
    gates: UnitGates,
    closed: Sequence[int],
    others: Examples,
    test: Examples,
) -> tuple[float, float]:
    """Return the accuracy on other training examples and on test images with these units closed.

    Test images have no mask of their own (`test.index` is ignored).
    """
    gate = closed_gate(gates, [closed], others.label.device)
    kept = run_gated(model, gates, others, gate).argmax(1) == others.label
    with gates.set(gate):
        predicted = model(test.images).argmax(1)
    return kept.double().mean().item(), (predicted == test.label).double().mean().item()
