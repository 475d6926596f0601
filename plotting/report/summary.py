"""summary.json: every headline number beside the paper's; and copies of all runs' tables."""

import lzma
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from beyond.counterfactual import COUNTERFACTUAL
from beyond.example_scores import EXAMPLES
from data import file_digest
from engine.errors import UserError
from engine.runs import files
from example_tied_dropout import FORGOTTEN
from plotting.families import Family, measured, refusing_malformed
from plotting.report.findings import Finding

NAME = "summary.json"
SOURCES = "provenance.json"
# Long tables, with a row for every example: kept as .csv.xz.
PACKED = (EXAMPLES.name, COUNTERFACTUAL.name, FORGOTTEN.name)
DIGITS = 6  # significant ones: two machines' sums differ in the last ones of all


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def summarize(families: Sequence[Family], findings: Sequence[Finding]) -> dict[str, object]:
    """Make the content of summary.json, which depends on the results alone."""
    runs = []
    for family in families:
        seeds = [run.config.seed for run in family.runs]
        about = {"about": family.title, "seeds": seeds, "settings": family.settings}
        runs.append(about | {"measured_with": family.measured_with})
    return {"runs": runs, "claims": [_entry(finding) for finding in findings]}


def _entry(finding: Finding) -> dict[str, object]:
    values = finding.values
    reason = {"reason": finding.reason} if finding.reason else {}
    return {
        "claim": finding.claim.name,
        "about": finding.about,
        "paper": finding.claim.paper,
        "mean": _rounded(np.mean(values)) if values else None,
        "std": _rounded(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": finding.n,
        "agrees_if": finding.claim.rule.words,
        "verdict": finding.verdict,
    } | reason


@refusing_malformed
def keep_results(families: Sequence[Family], folder: Path) -> Path:
    """Copy all tables of all runs and over seeds, with a file that says where each came from.

    The file names settings (no paths), how each table was measured, code, versions and machine. The
    copies are small enough to be kept without the weights.
    """
    sources = {}
    for family in families:
        _require_own([*family.folder.glob("*.csv"), *family.folder.glob("*.json")])
        for run in family.runs:
            _require_own(run.directory.glob("*.csv"))
            place = Path("tables") / family.name / run.directory.name
            settings = {"settings": run.settings, "measured_with": {}}
            for table in sorted(run.directory.glob("*.csv")):
                if table.name in PACKED:
                    packed = _pack(table, folder / place / f"{table.name}.xz")
                    settings.setdefault("sha256", {})[packed.name] = file_digest(packed)
                else:
                    files.write_text(folder / place / table.name, files.read_text(table))
                if (own := measured(run, table.name)) is not None:
                    settings["measured_with"][table.name] = own
            source = files.read_json(run.provenance_path)
            kept = ("git_commit", "git_dirty", "versions", "device", "started", "seconds")
            sources[str(place)] = settings | {key: source.get(key) for key in kept}
        over_seeds = [*family.folder.glob("*.csv"), *family.folder.glob("*.json")]
        for path in over_seeds:  # a JSON file says of which seeds its table is
            files.write_text(folder / "tables" / family.name / path.name, files.read_text(path))
    files.write_json(folder / SOURCES, sources)
    return folder / SOURCES


def _require_own(paths: Iterable[Path]) -> None:
    """Refuse links among the tables to be copied: they may lead to what is not for publication."""
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path}: is a link, not a table; put the table itself there")


def _pack(table: Path, path: Path) -> Path:
    """Write a compressed copy of a table, which pandas reads as it is."""
    content = lzma.compress(files.read_text(table).encode())
    files.write_atomically(path, lambda file: file.write(content))
    return path


@refusing_malformed
def write_summary(families: Sequence[Family], findings: Sequence[Finding], folder: Path) -> Path:
    path = folder / NAME
    files.update_json(path, summarize(families, findings))
    return path
