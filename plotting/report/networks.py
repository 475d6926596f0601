"""The claims of the paper over networks: a row a claim, a column a network on a data set."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace

from plotting.families import Family
from plotting.report.findings import Finding
from plotting.report.tables import Table


def table_networks(families: Sequence[Family], findings: Sequence[Finding]) -> Table:
    """Our number and its verdict for every claim that was measured; no rows for a single network.

    The cells are those of the report and of summary.json. Runs with and without dropout share the
    column of their training.
    """
    columns: dict[Hashable, str] = {}
    for family in families:
        key = _training(family)  # of its titles the longest tells it from most others
        columns[key] = max(columns.get(key, ""), family.trained, key=len)
    several = len({repr(family.config.model) for family in families}) > 1
    rows: dict[str, dict[str, str]] = {}
    for finding in findings if several else ():
        if not finding.claim.over and finding.values:
            cells = rows.setdefault(finding.claim.name, {"paper": finding.claim.paper})
            column = _training(finding.families[0])
            cell = f"{finding.ours} {finding.verdict}"
            cells[column] = f"{cells[column]}; {cell}" if column in cells else cell
    body = tuple(
        (name, cells["paper"], *(cells.get(column, "-") for column in columns))
        for name, cells in rows.items()
    )
    caption = "The paper's claims over networks: our number, and its verdict"
    return Table("table_networks", caption, ("claim", "paper", *_apart([*columns.values()])), body)


def _training(family: Family) -> Hashable:
    """Return what decides a family's training, except dropout and what is accounted."""
    config = family.config
    train = replace(config.train, account_gradients=True)
    return config.data, config.model, train, config.precision


def _apart(titles: Sequence[str]) -> list[str]:
    """Return the titles without what all of them have; a number and its name go together."""
    parts = [re.findall(r"[a-z_]+ [\d.,]+|\S+", title) for title in titles]
    common = set.intersection(*map(set, parts)) if parts else set()
    short = [" ".join(part for part in own if part not in common) for own in parts]
    return [words or title for words, title in zip(short, titles)]
