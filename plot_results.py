"""Figures, tables, summary and report from result files: nothing here trains or measures.

    python plot_results.py                          # every finished run below runs/
    python plot_results.py runs/NAME --figure 2     # some runs, one figure
    python plot_results.py --format png
    python plot_results.py runs plotting.window='[10, 20]'  # other epochs in Figure 1
    python plot_results.py RUNS... --output results/NAME    # all in one folder, to be kept
    python plot_results.py RUNS... --output results/NAME --figure 3 --format pdf    # one as PDF

Runs that differ in nothing but the seed share a figure: lines are means over seeds, bands a
standard deviation. Such a figure lies in figures/ beside its seeds' folders; one that compares
different runs, in figures/ below the folder that was named. One whose data are missing is named
with the command that makes them; seeds that were measured with other settings than the first are
named and left out.

Which figures: examples (a contact sheet of the training set), 1 (also 8 and 11 to 14: gradient
norms; those of several noise rates or models are compared in one figure), 2 (their cosines),
learning-curves, 10 (gradient norms over training), 3 (also 9 and 15 to 17: rewinding),
rewinding-map (the same, layer by epoch), 4 (also 18 and 19: retraining; those of several data sets
and noise rates are compared), 5 (neurons to flip; those of several models are compared in one
figure), 6 (masks of example-tied dropout), 7 (clean examples that it forgets). Figures 8, 9 and 19
need an atypical split. plotting.window and plotting.windows choose the epochs of Figures 1, 8 and
10, in a run's configuration or on the command line.

    python plot_results.py --compare A/summary.json B/summary.json [--tolerance 0.01]

prints the claims whose numbers or verdicts differ between two summaries, and draws nothing.

All together lie below the folder that was named: report.html, summary.json, and Tables 1 to 3, the
AUCs and all claims in tables/, as Markdown, CSV and LaTeX. With --output everything lies there,
with copies of the runs' own tables and provenance.json, which says where each came from; figures
are then PNG unless --format says PDF, in figures/ itself where all runs differ in nothing but the
seed, and one contact sheet per training set.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from engine.config.kinds import nearest
from engine.errors import UserError
from engine.launch.cli import Parser, reporting_ends
from engine.runs import files
from engine.runs.stopping import ending_on_signals
from models import network_file
from plotting.families import Family, find_families, name_other_settings
from plotting.figure_kind import FigureKind
from plotting.figures import draw_all, figure_kinds
from plotting.report.compare import TOLERANCE, compare_summaries
from plotting.report.findings import Finding, find, table_claims
from plotting.report.html import write_report
from plotting.report.networks import table_networks
from plotting.report.summary import keep_results, write_summary
from plotting.report.tables import TABLES, Table

TITLE = "Where neural networks memorize"


def choose_kinds(numbers: Sequence[str]) -> list[FigureKind]:
    """Return the kinds with one of these numbers."""
    known = list(dict.fromkeys(n for kind in figure_kinds() for n in kind.numbers))
    for number in numbers:
        if number not in known:
            hint = nearest(number, known) or f"; allowed: {', '.join(known)}"
            raise UserError(f"command line: --figure: {number!r} is not a figure{hint}")
    return [kind for kind in figure_kinds() if set(numbers) & set(kind.numbers)]


def write_table(table: Table, folder: Path) -> Path:
    """In three forms; the one to read."""
    forms = {"csv": table.csv(), "tex": table.latex(), "md": table.markdown()}
    for suffix, text in forms.items():
        path = folder / "tables" / f"{table.name}.{suffix}"
        files.update_text(path, text)
    return path


def name_lost_networks(families: Sequence[Family]) -> Iterator[str]:
    """Yield a line for each run whose network is a file that is not there anymore."""
    for run in (run for family in families for run in family.runs):
        path = network_file(run.config.model.name)
        if path is not None and not path.is_file():
            yield (
                f"{run.directory}: its network {path} is gone; its tables are drawn, and --trust "
                "measures with the copy in it"
            )


def describe_not_applicable(findings: Sequence[Finding]) -> str:
    """Return how many claims do not apply to these runs, with the first reason; or ''."""
    reasons = [finding.reason for finding in findings if finding.reason]
    return f" ({len(reasons)} claims not applicable; first: {reasons[0]})" if reasons else ""


def present(
    families: Sequence[Family],
    folder: Path,
    formats: Sequence[str] = ("pdf", "png"),
    title: str = TITLE,
    gather: bool = False,
) -> Iterator[str]:
    """Everything that the runs allow, the report last; a line for each."""
    yield from name_lost_networks(families)
    yield from name_other_settings(families)
    drawings = []
    for drawing in draw_all(families, folder, formats=formats, gather=gather):
        drawings.append(drawing)
        yield str(drawing)
    findings = find(families)
    tables = [*(make(families) for make in TABLES), table_networks(families, findings)]
    tables = [table for table in tables if table.measured]
    for table in [*tables, table_claims(findings)]:
        yield f"table: {write_table(table, folder)}"
    if gather:
        yield f"tables of all runs: {keep_results(families, folder)}"
    yield f"summary: {write_summary(families, findings, folder)}{describe_not_applicable(findings)}"
    yield f"report: {write_report(title, families, findings, drawings, tables, folder)}"


def require_tolerance(tolerance: float) -> None:
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"command line: --tolerance: {tolerance:g} is not allowed: 0 or more")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = "finished runs, or folders of them (default: runs); also plotting.KEY=VALUE"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=words)
    parser.add_argument(
        "--figure", metavar="NUMBER", action="append", default=[],
        help="draw this figure alone; repeat the option for several",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="collect all output in FOLDER"
    )
    parser.add_argument(
        "--format", choices=("pdf", "png"), help="default: both, or PNG with --output"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="SUMMARY", help="compare two summary.json files"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="--compare: allowed difference of two means, as a share of the larger mean where that "
        f"is above 1 (default {TOLERANCE:g})",
    )
    with reporting_ends() as ending, ending_on_signals():
        given = parser.parse_args(arguments)
        if given.compare:
            require_tolerance(given.tolerance)
            print(compare_summaries(*given.compare, given.tolerance), flush=True)
            return ending.status
        overrides = tuple(word for word in given.runs if re.match(r"plotting\.\w+=", word))
        places = [Path(word) for word in given.runs if word not in overrides] or [Path("runs")]
        folder, gather = given.output or places[0], given.output is not None
        formats = [given.format] if given.format else ["png"] if gather else ["pdf", "png"]
        kinds = choose_kinds(given.figure)
        families = find_families(places, overrides)
        if gather and len({family.name for family in families}) < len(families):
            raise UserError("command line: --output: two folders hold seeds of the same run")
        if given.figure:
            drawings = draw_all(families, folder, kinds, formats, concerning=False, gather=gather)
            lines = chain(name_other_settings(families), drawings)
        else:
            lines = present(families, folder, formats, gather=gather)
        for line in lines:
            print(line, flush=True)
    return ending.status


if __name__ == "__main__":
    sys.exit(main())
