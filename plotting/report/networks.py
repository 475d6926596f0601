"""The claims of the paper over networks: a row a claim, a column a network on a data set."""

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
    return config.data, config.model, replace(config.train, account_gradients=True)


def _apart(titles: Sequence[str]) -> list[str]:
    """Return the titles without the words that all of them have."""
    common = set.intersection(*(set(title.split()) for title in titles)) if titles else set()
    return [" ".join(w for w in title.split() if w not in common) or title for title in titles]
