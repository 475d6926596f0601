"""Headline numbers: one for each seed, from result files alone.

'While noisy examples are learned' means the epochs that end with a noisy accuracy above chance (one
divided by the number of classes) and below 95%. A number that a run cannot give is nan.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data import outline
from engine.runs import files
from engine.stats import rank_correlation
from example_tied_dropout import DROPOUT, TYPICALITY
from layer_retraining import RETRAINING
from layer_rewinding import REWINDING
from neuron_flipping import DETECTION
from plotting.families import Family
from plotting.gradients import read_accounts, read_curves
from plotting.layers import by_group
from plotting.neurons import read_searched

Values = Sequence[float] | np.ndarray
LEARNED = 0.95
NOT_YET_LEARNED = 0.20  # the paper's bound for 'before it is memorized'
KEPT, HIGH = 0.8, 0.7
OPPOSED = -0.75


# ---------------------------------------------------------------- gradient accounting


def count_classes(family: Family) -> int:
    """Return the number of classes of the data set; of your own data, from the training labels."""
    if (name := family.config.data.name) != "npz":
        return outline(name).classes
    arrays = files.read_arrays(family.runs[0].split_path, "label", "true_label")
    return 1 + int(max(labels.max() for labels in arrays.values()))


def _medians_while_learning(family: Family, values: np.ndarray) -> np.ndarray:
    """Return [seeds, layers]: medians of values [seeds, epochs, layers] over these epochs."""
    noisy = read_curves(family)["acc_noisy"][:, 1:]
    learning = (noisy > 1 / count_classes(family)) & (noisy < LEARNED)
    nothing = np.full(values.shape[2], np.nan)
    return np.array(
        [np.median(v[when], axis=0) if when.any() else nothing for v, when in zip(values, learning)]
    )


def _share(values: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return [seeds]: the share of values [seeds, n] that `holds`; nan if a value is nan."""
    share = holds(values).mean(1)
    return np.where(np.isfinite(values).all(1), share, np.nan)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide where both are positive; without clean or without noisy examples the result is nan."""
    return np.divide(a, b, out=np.full_like(a, np.nan), where=(a > 0) & (b > 0))


def _ratios(family: Family) -> np.ndarray:
    table = read_accounts(family)
    return _quotient(table["norm_noisy"], table["norm_clean"])


def norm_ratio(family: Family) -> Values:
    return np.median(_medians_while_learning(family, _ratios(family)), axis=1)


def norm_ratio_each(family: Family) -> Values:
    memorized = files.read_arrays(family.runs[0].split_path, "memorized")["memorized"].mean()
    return np.asarray(norm_ratio(family)) * (1 - memorized) / memorized


def norm_ratio_highest(family: Family) -> Values:
    return _medians_while_learning(family, _ratios(family)).max(1)


def norm_ratio_last(family: Family) -> Values:
    medians = _medians_while_learning(family, _ratios(family))
    return medians[:, -1] / np.median(medians, axis=1)


def norm_ratio_epochs(family: Family) -> Values:
    return _share(np.median(_ratios(family), axis=2), lambda ratios: ratios >= 2 / 3)


def mean_norm_ratio(family: Family) -> Values:
    """Ratio of norms averaged over all epochs, as in Figures 8 and 11 to 14."""
    table = read_accounts(family)
    return np.median(_quotient(table["norm_noisy"].mean(1), table["norm_clean"].mean(1)), axis=1)


def cosine(family: Family) -> Values:
    return np.median(_medians_while_learning(family, read_accounts(family)["cosine"]), axis=1)


def cosine_layers(family: Family) -> Values:
    medians = _medians_while_learning(family, read_accounts(family)["cosine"])
    return _share(medians, lambda cosines: cosines < OPPOSED)


def cosine_throughout(family: Family) -> Values:
    medians = np.median(read_accounts(family)["cosine"], axis=1)
    return _share(medians, lambda cosines: cosines < OPPOSED)


# ---------------------------------------------------------------- rewinding and retraining


def _rewound(family: Family) -> dict[str, np.ndarray]:
    return by_group(family, REWINDING)


def _back_before_learning(family: Family) -> np.ndarray:
    """Return [seeds, layers]: noisy accuracy kept after rewinding a layer, as a share of the final.

    Each layer alone is rewound to the last rewound epoch with a noisy accuracy below the bound;
    the initialization is not considered.
    """
    curves, table = read_curves(family), _rewound(family)
    noisy, epochs = curves["acc_noisy"], table["epoch"]
    kept = []
    for learned, rewound in zip(noisy, table["acc_noisy"]):
        early = [
            i for i, t in enumerate(epochs)
            if t > 0 and learned[t] < NOT_YET_LEARNED and np.isfinite(rewound[0, i])
        ]  # fmt: skip
        says = early and learned[-1] >= NOT_YET_LEARNED
        nothing = np.full(len(rewound), np.nan)
        kept.append(rewound[:, early[-1]] / learned[-1] if says else nothing)
    return np.array(kept)


def kept_by_last_layer(family: Family) -> Values:
    return _back_before_learning(family)[:, -1]


def layers_that_keep(family: Family) -> Values:
    return _share(_back_before_learning(family), lambda kept: kept >= KEPT)


def last_against_others(family: Family) -> Values:
    noisy = _at_initialization(family, "noisy")
    return noisy[:, -1] - noisy[:, :-1].mean(1)


def critical_layers_alike(family: Family) -> Values:
    pairs = zip(_at_initialization(family, "clean"), _at_initialization(family, "noisy"))
    return [rank_correlation(clean, noisy) for clean, noisy in pairs]


def _at_initialization(family: Family, kind: str) -> np.ndarray:
    """Return [seeds, layers]: accuracy with each layer alone at epoch 0; nan if not measured."""
    table = _rewound(family)
    values = table[f"acc_{kind}"][:, :, 0]
    return values if table["epoch"][0] == 0 else np.full_like(values, np.nan)


def _peaks(family: Family) -> np.ndarray:
    """Return [seeds, layers]: the highest noisy accuracy after an epoch of retraining."""
    table = by_group(family, RETRAINING)
    return np.fmax.reduce(table["acc_noisy"][:, :, 1:], axis=2)


def layers_that_come_back(family: Family) -> Values:
    return _share(_peaks(family), lambda peaks: peaks >= HIGH)


def last_layer_comes_back(family: Family) -> Values:
    return _peaks(family)[:, -1]


# ---------------------------------------------------------------- neurons


def _of_each_seed(family: Family, memorized: int) -> list[list[dict]]:
    """Return the searched examples of one kind, for each seed."""
    tables = map(read_searched, family.runs)
    return [[row for row in table if row["memorized"] == memorized] for table in tables]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else np.nan


def _mean_neurons(family: Family, memorized: int) -> np.ndarray:
    each = _of_each_seed(family, memorized)
    return np.array([_mean(row["neurons"] for row in rows) for rows in each])


def neurons_noisy(family: Family) -> Values:
    return _mean_neurons(family, 1)


def neurons_ratio(family: Family) -> Values:
    return _mean_neurons(family, 0) / _mean_neurons(family, 1)


def flipped_below_ten(family: Family) -> Values:
    return [
        _mean(row["flipped"] == 1 and row["neurons"] < 10 for row in rows)
        for rows in _of_each_seed(family, 1)
    ]


def difference_after(column: str) -> Callable[[Family], Values]:
    """Return the measure of an accuracy after removal: noisy minus clean examples' mean.

    Rows without the accuracy, which an earlier version searched, are left out.
    """

    def measure(family: Family) -> Values:
        noisy, clean = (
            np.array([_mean(r[column] for r in rows if np.isfinite(r[column])) for rows in each])
            for each in (_of_each_seed(family, 1), _of_each_seed(family, 0))
        )
        return noisy - clean

    return measure


remaining_difference = difference_after("acc_remaining_after")
test_difference = difference_after("acc_test_after")


def _layer_shares(rows: list[dict], layers: int) -> np.ndarray:
    found = np.array([int(group) for row in rows for group in row["groups"].split()], int)
    return np.bincount(found, minlength=layers) / max(1, len(found))


def layers_shared(family: Family) -> Values:
    """Return the overlap of the two histograms over layers: the sum of their minima."""
    layers = 1 + max(
        (int(group) for kind in (0, 1) for rows in _of_each_seed(family, kind) for row in rows
         for group in row["groups"].split()), default=0,
    )  # fmt: skip
    shares = (
        [_layer_shares(rows, layers) for rows in pair]
        for pair in zip(_of_each_seed(family, 1), _of_each_seed(family, 0))
    )
    return [
        np.minimum(noisy, clean).sum() if noisy.any() and clean.any() else np.nan
        for noisy, clean in shares
    ]


def layers_effective(family: Family) -> Values:
    found = []
    for rows in _of_each_seed(family, 1):
        share = _layer_shares(rows, 1)
        share = share[share > 0]
        found.append(float(np.exp(-(share * np.log(share)).sum())) if len(share) else np.nan)
    return found


def area(method: str) -> Callable[[Family], Values]:
    """Return the measure of a score's AUC for detecting noisy examples, on the searched ones."""

    def measure(family: Family) -> Values:
        rows = family.rows(DETECTION)
        return [r["auc"] for r in rows if (r["method"], r["on"]) == (method, "searched")]

    return measure


# ---------------------------------------------------------------- dropout


def accuracy(state: str, kind: str) -> Callable[[Family], Values]:
    def measure(family: Family) -> Values:
        rows = family.rows(DROPOUT)
        return [row[f"acc_{kind}"] for row in rows if row["state"] == state]

    return measure


def gap_change(family: Family) -> Values:
    gaps = [
        np.array(accuracy(state, "clean")(family)) - np.array(accuracy(state, "test")(family))
        for state in ("before", "after")
    ]
    return gaps[1] - gaps[0]


def test_change(family: Family) -> Values:
    before, after = (np.array(accuracy(state, "test")(family)) for state in ("before", "after"))
    return after - before


def forgotten_less_typical(family: Family) -> Values:
    """Return differences of mean typicality; nan if nothing was forgotten or no score is known."""
    folders = [run.directory for run in family.runs]
    tables = [TYPICALITY.read(f) if TYPICALITY.path(f).exists() else [] for f in folders]
    return [table[0]["difference"] if table else np.nan for table in tables]
