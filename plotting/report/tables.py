"""Tables 1 to 3, the AUCs, and the stability of searches, as Markdown, CSV and LaTeX."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from beyond.example_scores import AREAS, SCORES, WITH_NEURONS
from data.random_streams import random_stream
from engine.runs.identity import describe_dropout
from engine.stats import compute_auc, rank_correlation
from example_tied_dropout import DROPOUT
from neuron_flipping import DETECTION, FLIPPING
from plotting.beyond.scores import PAPER_AUC, readable
from plotting.families import Family, by_numbers, refusing_malformed
from plotting.neurons import read_searched

KINDS = ("clean", "noisy", "test")
ON = ("all", "searched")
CHOICES = 50  # of trainings to average over
LATEX = str.maketrans(
    {char: f"\\{char}" for char in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$"}
)

# The paper's numbers: Table 1 (before and after: clean, noisy, test), Table 3 (clean, noisy) and
# Table 2 by (p_gen, p_mem), all on 10% noise; in Section 6.1 the AUCs on CIFAR-10.
PAPER_TABLE_1 = {
    "cifar10": ((0.999, 0.993, 0.793), (0.908, 0.031, 0.827)),
    "mnist": ((1.0, 1.0, 0.990), (0.992, 0.001, 0.993)),
    "svhn": ((0.999, 0.996, 0.895), (0.958, 0.014, 0.896)),
}
PAPER_TABLE_2 = {
    (0.1, 0.1): (0.842, 0.029), (0.2, 0.1): (0.869, 0.028), (0.3, 0.1): (0.871, 0.029),
    (0.4, 0.1): (0.899, 0.031), (0.5, 0.1): (0.920, 0.039), (0.6, 0.1): (0.930, 0.049),
    (0.1, 0.2): (0.869, 0.028), (0.2, 0.2): (0.882, 0.030), (0.3, 0.2): (0.908, 0.031),
    (0.4, 0.2): (0.917, 0.034), (0.5, 0.2): (0.936, 0.047), (0.6, 0.2): (0.950, 0.069),
}  # fmt: skip
PAPER_TABLE_3 = {"standard": (1.0, 0.995), "sparse": (1.0, 0.998), "example_tied": (0.908, 0.031)}


@dataclass(frozen=True)
class Table:
    """A table of text, ready to be written in any form.

    `plain` is the content of the CSV file, its header first, where that differs from the text.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    plain: tuple[tuple[str, ...], ...] = ()

    @property
    def measured(self) -> bool:
        """Return True if the table holds more than the paper's own numbers."""
        return any(not row[0].startswith("paper") for row in self.rows)

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)

    def csv(self) -> str:
        text = io.StringIO()
        # A spreadsheet would compute a cell that begins as a formula does.
        formula = re.compile(r"^(?=[=@\t\r]|[-+](?![\d.]|$))")
        content = self.plain or (self.header, *self.rows)
        lines = [[formula.sub("'", cell) for cell in line] for line in content]
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue()

    def latex(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return " & ".join(cell.translate(LATEX) for cell in cells) + r" \\" + "\n"

        columns = "l" * len(self.header)
        body = line(self.header) + "\\hline\n" + "".join(line(row) for row in self.rows)
        return f"% {self.caption}\n\\begin{{tabular}}{{{columns}}}\n{body}\\end{{tabular}}\n"


def spread(values: Sequence[float], digits: int = 1, percent: bool = True) -> str:
    """Return the mean, with the standard deviation of several values; a dash without any."""
    values = [value * (100 if percent else 1) for value in values if not math.isnan(value)]
    if not values:
        return "-"
    unit = "%" if percent else ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean}{unit}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}{unit}"


def _dropout_rows(family: Family, state: str) -> list[dict]:
    """Return one row per seed."""
    rows = family.rows(DROPOUT)
    return [row for row in rows if row["state"] == state]


def _with_dropout(families: Sequence[Family], *kinds: str) -> list[Family]:
    wanted = [family for family in families if family.config.dropout.kind in kinds]
    return [measured for family in wanted if (measured := family.having(DROPOUT.name))]


def table_1(families: Sequence[Family]) -> Table:
    """Table 1: accuracies before and after dropping the memorization neurons."""
    rows = []
    for family in _with_dropout(families, "example_tied"):
        cells = [family.title, str(len(family.runs))]
        for state in ("before", "after"):
            found = _dropout_rows(family, state)
            cells += [
                spread([row[f"acc_{k}"] for row in found]) for k in ("clean", "noisy", "test")
            ]
        rows.append(tuple(cells))
    for name, states in PAPER_TABLE_1.items():
        cells = (spread([value]) for state in states for value in state)
        rows.append((f"paper: {name}", "-", *cells))
    parts = [
        f"{state}: {kind}" for state in ("before", "after") for kind in ("clean", "noisy", "test")
    ]
    caption = "Table 1: accuracy before and after dropping the memorization neurons"
    return Table("table_1", caption, ("data", "n", *parts), tuple(rows))


def table_2(families: Sequence[Family]) -> Table:
    """Clean and noisy accuracy after dropping: a row for each p_mem, a column for each p_gen."""
    cells: dict[tuple[str, float], dict[float, str]] = {}
    for family in _with_dropout(families, "example_tied"):
        p, after = family.config.dropout, _dropout_rows(family, "after")
        cell = ", ".join(spread([row[f"acc_{kind}"] for row in after]) for kind in KINDS[:2])
        n = f" (n = {len(after)})" if len(after) > 1 else ""
        cells.setdefault((family.trained, p.p_mem), {})[p.p_gen] = cell + n
    order = sorted(cells, key=lambda place: (by_numbers(place[0]), place[1]))
    for (p_gen, p_mem), values in PAPER_TABLE_2.items():
        cell = ", ".join(spread([value]) for value in values)
        cells.setdefault(("paper: cifar10", p_mem), {})[p_gen] = cell
        order = list(dict.fromkeys([*order, ("paper: cifar10", p_mem)]))
    columns = sorted({p_gen for row in cells.values() for p_gen in row})
    rows = [
        (data, f"{p_mem:g}", *(cells[data, p_mem].get(p_gen, "-") for p_gen in columns))
        for data, p_mem in order
    ]
    header = ("data", "p_mem", *(f"p_gen {p_gen:g}" for p_gen in columns))
    caption = "Table 2: clean, noisy accuracy after dropping over p_gen and p_mem"
    return Table("table_2", caption, header, tuple(rows))


def table_3(families: Sequence[Family]) -> Table:
    """Compare example-tied dropout, after dropping, with both baselines and no dropout."""
    rows = []
    for family in _with_dropout(families, "standard", "sparse", "example_tied", "none"):
        after = _dropout_rows(family, "after")
        dropout = family.config.dropout
        ours = (spread([row[f"acc_{k}"] for row in after]) for k in ("clean", "noisy"))
        paper = (spread([value]) for value in PAPER_TABLE_3.get(dropout.kind, (math.nan, math.nan)))
        method = describe_dropout(dropout) or "none"
        rows.append((family.title, method, str(len(family.runs)), *ours, *paper))
    paper = ("paper (CIFAR-10): clean", "paper (CIFAR-10): noisy")
    header = ("data", "method", "n", "clean", "noisy", *paper)
    caption = "Table 3: accuracy of example-tied dropout and its baselines"
    return Table("table_3", caption, header, tuple(rows))


def table_auc(families: Sequence[Family]) -> Table:
    """AUC of each score for detecting the memorized set, on the searched examples."""
    rows = []
    for family in filter(None, (family.having(DETECTION.name) for family in families)):
        found = family.rows(DETECTION)
        for method in (*PAPER_AUC, "summed loss"):
            areas = [r["auc"] for r in found if (r["method"], r["on"]) == (method, "searched")]
            if areas:
                ours, paper = spread(areas, 3, percent=False), PAPER_AUC.get(method, "-")
                rows.append((family.title, method, str(len(areas)), ours, str(paper)))
    header = ("data", "score", "n", "AUC", "paper (CIFAR-10)")
    caption = "AUC of each score for detecting the memorized set, on the searched examples"
    return Table("table_auc", caption, header, tuple(rows))


def table_stability(families: Sequence[Family]) -> Table:
    """Stability of an example's number of neurons over trainings, and the gain of averaging.

    Rank correlations of two trainings' numbers are computed within clean and within noisy examples,
    because the difference between these two kinds would raise a joint one. The AUC is that of
    numbers averaged over k trainings; its mean is over all choices of k of a family's trainings,
    or over CHOICES random ones where there are more.
    """
    rows = []
    for family in filter(None, (family.having(FLIPPING.name) for family in families)):
        counts, memorized = counts_of_all_seeds(family)
        n = len(counts)
        if n < 2:
            continue
        alike = [_mean_agreement(counts[:, kind]) for kind in (~memorized, memorized)]
        for k in range(1, n + 1):
            means = (counts[chosen].mean(0) for chosen in _choices(n, k))
            areas = [compute_auc(-m[memorized], -m[~memorized]) for m in means]
            agreement = alike if k == 1 else ("", "")
            area = spread([np.mean(areas)], 3, percent=False)
            rows.append((family.title, str(len(memorized)), *agreement, f"{k} of {n}", area))
    header = (
        "data", "examples", "rank correlation of two trainings: clean", "noisy",
        "trainings", "AUC, mean",
    )  # fmt: skip
    caption = (
        "Stability of the number of neurons over trainings, and AUC of averages over trainings"
    )
    return Table("table_stability", caption, header, tuple(rows))


def _choices(n: int, k: int) -> list[list[int]]:
    """Return all choices of k of n, or CHOICES random ones where there are more."""
    if math.comb(n, k) <= CHOICES:
        return [list(chosen) for chosen in combinations(range(n), k)]
    draw = random_stream("choices of trainings", k)
    return [sorted(draw.permutation(n)[:k].tolist()) for _ in range(CHOICES)]


def _mean_agreement(counts: np.ndarray) -> str:
    """Return the mean rank correlation of two seeds of [seeds, examples], or a dash."""
    pairs = np.array([rank_correlation(a, b) for a, b in combinations(counts, 2)])
    return spread([pairs[np.isfinite(pairs)].mean()] if np.isfinite(pairs).any() else [], 2, False)


def counts_of_all_seeds(family: Family) -> tuple[np.ndarray, np.ndarray]:
    """Return neurons [seeds, examples] of the examples that all seeds searched, and `memorized`."""
    tables = [
        {row["example"]: (row["neurons"], row["memorized"] == 1) for row in read_searched(run)}
        for run in family.runs
    ]
    common = sorted(set.intersection(*map(set, tables)))
    counts = np.array([[table[example][0] for example in common] for table in tables])
    return counts, np.array([tables[0][example][1] for example in common], bool)


def table_scores(families: Sequence[Family]) -> Table:
    """AUC of every example score, alone and with the number of neurons."""
    rows = []
    for family in filter(None, (family.having(AREAS.name) for family in families)):
        areas, added = family.rows(AREAS), family.rows(WITH_NEURONS)
        for name in SCORES:
            of = [[r["auc"] for r in areas if (r["score"], r["on"]) == (name, on)] for on in ON]
            own = [row for row in added if row["score"] == name]
            if any(of):
                cells = [spread(values, 3, percent=False) for values in of]
                for column in ("auc_with_neurons", "partial"):
                    cells.append(spread([row[column] for row in own], 3, percent=False))
                rows.append((family.title, readable(name), str(len(family.runs)), *cells))
    header = (
        "data", "score", "n", "AUC, all examples", "AUC, searched examples",
        "AUC with neurons, searched examples", "partial correlation of neurons and memorized set",
    )  # fmt: skip
    caption = "AUC of every example score for detecting the memorized set"
    return Table("table_scores", caption, header, tuple(rows))


TABLES: tuple[Callable[[Sequence[Family]], Table], ...] = tuple(
    map(
        refusing_malformed,
        (table_1, table_2, table_3, table_auc, table_stability, table_scores),
    )
)
