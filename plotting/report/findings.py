"""Findings: measured numbers for the paper's claims, and verdicts."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from engine.config.schema import Config
from engine.stats import rank_correlation
from plotting.families import (
    Family,
    differing,
    families_over,
    refusing_malformed,
    setting_of,
    shown_value,
)
from plotting.report.claims import CLAIMS, Claim
from plotting.report.preconditions import explain_not_applicable
from plotting.report.tables import PAPER_TABLE_1, Table, spread


@dataclass(frozen=True)
class Finding:
    """Measured numbers for a claim."""

    claim: Claim
    about: str
    families: tuple[Family, ...]
    values: tuple[float, ...]  # one per seed; none where it was not measured
    reason: str = ""  # reason why the claim does not apply to these runs, or ''

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def ours(self) -> str:
        percent = self.claim.percent and not self.claim.over
        return spread(self.values, 1 if percent else 2, percent)

    @property
    def verdict(self) -> str:
        """Return the verdict; each seed is judged separately."""
        if not self.values:
            return "not measured"
        if self.reason:
            return "not applicable"
        agreeing = sum(map(self.claim.rule.holds, self.values))
        if 0 < agreeing < len(self.values):
            return f"{agreeing} of {len(self.values)} seeds agree"
        return "agrees" if agreeing else "differs"


@refusing_malformed
def find(families: Sequence[Family]) -> list[Finding]:
    """Judge every claim for each of the runs that it concerns, in the paper's order."""
    found = []
    for claim in CLAIMS:
        concerned = [family for family in families if claim.concerns(family.config)]
        found += _trends(claim, concerned) if claim.over else map(partial(_judge, claim), concerned)
    return found


@refusing_malformed
def _judge(claim: Claim, family: Family) -> Finding:
    measured = family.having(claim.source)
    values = claim.measure(measured) if measured else ()
    finite = tuple(float(value) for value in values if np.isfinite(value))
    about = (measured or family).title
    reason = explain_not_applicable(claim.name, measured) if finite else ""
    return Finding(_of_data_set(claim, family.config), about, (family,), finite, reason)


def _trends(claim: Claim, families: Sequence[Family]) -> Iterator[Finding]:
    """Yield rank correlations of the measure with the claim's setting, for every common seed."""
    measured = [part for family in families if (part := family.having(claim.source))]
    # A noise rate of 0 leaves nothing to measure, and no place in a trend.
    measured = [family for family in measured if np.isfinite(claim.measure(family)).any()]
    groups = families_over(claim.over, measured)
    named = {claim.over, "data.name", "data.train_size", "model.name", "model.width"}
    apart = [key for key in differing([group[0] for group in groups]) if key not in named]
    for group in groups:
        settings = [setting_of(family, claim.over) for family in group]
        each = [
            dict(zip((run.config.seed for run in family.runs), claim.measure(family)))
            for family in group
        ]
        common = sorted(set.intersection(*map(set, each)))
        of_seed = [[float(found[seed]) for found in each] for seed in common]
        trends = [rank_correlation(settings, own) for own in of_seed if np.isfinite(own).all()]
        values = tuple(trend for trend in trends if np.isfinite(trend))
        first = group[0]
        about = (
            f"{first.data}, {first.model}, {claim.over} from {settings[0]:g} to {settings[-1]:g}"
        )
        about += "".join(f", {key}={shown_value(key, first.values.get(key))}" for key in apart)
        lacking = (explain_not_applicable(claim.name, family) for family in group)
        reason = next(filter(None, lacking), "") if values else ""
        yield Finding(claim, about, tuple(group), values, reason)


def _of_data_set(claim: Claim, config: Config) -> Claim:
    """Return the claim with Table 1's number for this data set, if its number is in Table 1."""
    if claim.paper != "Table 1":
        return claim
    name = config.data.name if config.data.name in PAPER_TABLE_1 else "cifar10"
    state, kind = claim.name.split(".")[1].split("_")
    row = PAPER_TABLE_1[name][("before", "after").index(state)]
    number = row[("clean", "noisy", "test").index(kind)]
    return replace(claim, paper=f"{number:.1%} ({name})", value=number)


def table_claims(findings: Sequence[Finding]) -> Table:
    """Every claim with the paper's number, the measured one, the verdict and its rule."""
    header = (
        "claim", "paper", "ours ± std", "n", "verdict", "agrees if", "data, model", "hardware",
    )  # fmt: skip
    rows = [
        (
            finding.claim.text,
            finding.claim.paper,
            finding.ours,
            str(finding.n or "-"),
            finding.verdict,
            finding.claim.rule.words,
            finding.about,
            _hardware(finding.families),
        )
        for finding in findings
    ]
    plain = (PLAIN, *map(_plain_row, findings))
    return Table(
        "table_claims", "The paper's claims: paper, ours, verdict", header, tuple(rows), plain
    )


PLAIN = (
    "name", "claim", "paper", "paper_value", "mean", "std", "n", "verdict", "agrees_if", "reason",
    "data_model", "hardware",
)  # fmt: skip


def _plain_row(finding: Finding) -> tuple[str, ...]:
    """Return the row of the CSV file: numbers alone, shares as fractions, empty cells for none."""
    claim, values = finding.claim, finding.values
    numbers = (
        claim.value,
        np.mean(values) if values else None,
        np.std(values, ddof=1) if len(values) > 1 else None,
    )
    return (
        claim.name,
        claim.text,
        claim.paper,
        *("" if number is None else f"{number:.6g}" for number in numbers),
        str(finding.n),
        finding.verdict,
        claim.rule.words,
        finding.reason,
        finding.about,
        _hardware(finding.families),
    )


def _hardware(families: Sequence[Family]) -> str:
    """Name the hardware; the number of threads of a CPU changes the time only."""
    devices = [device for family in families for device in family.devices]
    return "; ".join(sorted({re.sub(r" \(\d+ threads\)$", "", device) for device in devices}))
