"""report.html: one file that shows what was run, what came out, and how that compares to the paper.

Pictures and style are inside of the file, and it needs no script, so it can be mailed and kept.
"""

import base64
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from engine.launch.experiments import load_experiments
from engine.runs import files
from engine.runs.commands import shell_command
from engine.runs.provenance import REPOSITORY
from plotting.families import Family, refusing_malformed
from plotting.figures import Drawing
from plotting.report.findings import Finding
from plotting.report.headline_numbers import LEARNED as LEARNED_AT
from plotting.report.tables import Table
from plotting.style import PAGE, SETTINGS

NAME = "report.html"
UNFOLDED = 2  # families whose own figures a chapter shows without a click
NUMBERS = r"[\d.]+( ± [\d.]+)?%?"  # of a cell that stays on one line
LEARNED = (
    "'While noisy examples are learned' means the epochs that end with a noisy accuracy above "
    f"chance (10% with ten classes) and below {LEARNED_AT:.0%}."
)
PART_OF = {"atypical": "gradients"}  # claims about atypical examples have no chapter of their own

STYLE = """
:root { --ink: #1d2733; --soft: #5b6875; --line: #d9dfe5; --paper: #fff; --tint: #f5f7f9;
  --good: #00664b; --bad: #a04000; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header, footer { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p.lead { color: var(--soft); margin-top: 0; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; }
a { color: #0a5a94; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; margin: .75rem 0; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem .4rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 600; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td small { color: var(--soft); display: block; }
.verdict { font-weight: 600; white-space: nowrap; }
.agrees { color: var(--good); } .agrees::before { content: "\\2713\\00a0"; }
.differs { color: var(--bad); } .differs::before { content: "\\2260\\00a0"; }
.mixed { color: var(--bad); } .mixed::before { content: "~\\00a0"; }
.none, .inapplicable { color: var(--soft); font-weight: 400; }
figure { margin: 1.5rem 0; max-width: 46rem; break-inside: avoid; }
figure img { height: auto; display: block; border: 1px solid var(--line); }
figcaption { font-size: .875rem; color: var(--soft); margin-top: .4rem; }
figcaption b { color: var(--ink); }
figcaption small { display: block; }
code, pre { font: .85em/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { background: var(--tint); padding: .6rem .8rem; overflow-x: auto; border-radius: 4px; }
code { overflow-wrap: break-word; }
details { margin: 1rem 0; } summary { cursor: pointer; color: #0a5a94; }
li { margin: .4rem 0; }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 3rem; }
@media (max-width: 40rem) {
  h1 { font-size: 1.5rem; }
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  td, td.number, .verdict { border: 0; padding: .1rem 0; white-space: normal; }
  td.empty { display: none; }
  td:not(:first-child):not(.verdict)::before { content: attr(data-name) ": "; color: var(--soft);
    font-weight: 400; }
}
@media print {
  body { font-size: 10pt; } main, header, footer { max-width: none; padding: 0; }
  nav { display: none; } h2 { break-after: avoid; } tr { break-inside: avoid; }
  details > *:not(summary) { display: block; }
}
"""


@refusing_malformed
def write_report(
    title: str,
    families: Sequence[Family],
    findings: Sequence[Finding],
    drawings: Sequence[Drawing],
    tables: Sequence[Table],
    folder: Path,
) -> Path:
    """`title` is the name of a configuration, or empty."""
    measured = {drawing.kind.experiment for drawing in drawings}
    chapters = [key for key, e in load_experiments().items() if e.section or key in measured]
    body = [
        _header(title, families, findings, chapters),
        "<main>",
        _overview(findings, chapters),
        *(
            _chapter(
                name,
                families,
                [f for f in findings if _chapter_of(f) == name],
                [d for d in drawings if d.kind.experiment == name],
            )
            for name in chapters
        ),
        _tables(tables),
        _what_was_run(families),
        _deviations(),
        "</main>",
        "<footer><p>'Ours' is the mean over seeds ± their standard deviation, n is how many. "
        "A verdict goes by each seed on its own, and by the rule that stands below the "
        "claim; the paper's numbers are of networks of full width on all data. "
        f"{LEARNED}</p></footer>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
    path = folder / NAME
    files.update_text(path, page)
    return path


def _chapter_of(finding: Finding) -> str:
    experiment = finding.claim.experiment
    return PART_OF.get(experiment, experiment)


@dataclass(frozen=True)
class Cell:
    """The HTML of a table's cell, and its classes."""

    html: str
    kind: str = ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table that a narrow screen shows as a list: each cell below its column's name."""

    def row_of(cells: Sequence[Cell]) -> str:
        named = zip(cells, header)
        tds = (f'<td data-name="{escape(n)}" class="{c.kind}">{c.html}</td>' for c, n in named)
        return f"<tr>{''.join(tds)}</tr>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(map(row_of, rows))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


# ---------------------------------------------------------------- verdicts


def _manner(finding: Finding) -> str:
    """Return the kind of verdict: agrees, differs, mixed, inapplicable or none."""
    if finding.values and finding.reason:
        return "inapplicable"
    if finding.verdict in ("agrees", "differs"):
        return finding.verdict
    return "mixed" if finding.values else "none"


def _header(
    title: str, families: Sequence[Family], findings: Sequence[Finding], chapters: Sequence[str]
) -> str:
    counts = Counter(map(_manner, findings))
    said = sum(counts[manner] for manner in ("agrees", "differs", "mixed"))
    several = any(finding.n > 1 for finding in findings)
    seeds = (
        f"and {counts['mixed']} depend on the seed"
        if several
        else "each from a single seed (n = 1), so that dependence on the seed is unknown"
    )
    links = "".join(f'<a href="#{key}">{load_experiments()[key].title}</a>' for key in chapters)
    runs = sum(len(family.runs) for family in families)
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="lead">{runs} training{"s" if runs > 1 else ""}, compared with <i>Can Neural '
        f"Network Memorization Be Localized?</i> (Maini et al., ICML 2023). Of {said} "
        f"statements that were measured {counts['agrees']} agree with the paper, "
        f"{counts['differs']} differ, {seeds}; {counts['inapplicable']} do not apply to these "
        f"runs, {counts['none']} not measured.</p>"
        f'<nav>{links}<a href="#tables">Tables</a><a href="#runs">What was run</a>'
        f'<a href="#deviations">Deviations</a></nav></header>'
    )


def _overview(findings: Sequence[Finding], chapters: Sequence[str]) -> str:
    rows = []
    for name in chapters:
        words = load_experiments()[name].title
        counts = Counter(_manner(f) for f in findings if _chapter_of(f) == name)
        manners = ("agrees", "differs", "mixed", "inapplicable", "none")
        cells = [
            Cell(str(counts[manner]), "number") if counts[manner] else Cell("-", "empty")
            for manner in manners
        ]
        rows.append([Cell(f'<a href="#{name}">{words}</a>'), *cells])
    header = (
        "experiment",
        "agrees",
        "differs",
        "depends on the seed",
        "not applicable",
        "not measured",
    )
    return "<h2>In short</h2>" + _table(header, rows)


def _reason(finding: Finding) -> str:
    return f"; not applicable: {escape(finding.reason)}" if finding.reason else ""


def _claims(findings: Sequence[Finding]) -> str:
    rows = []
    for finding in findings:
        claim = finding.claim
        words = (
            f"{escape(claim.text)}<small>Section {escape(claim.where)}; agrees if "
            f"{escape(claim.rule.words)}; {escape(finding.about)}{_reason(finding)}</small>"
        )
        rows.append(
            (
                Cell(words),
                Cell(escape(claim.paper)),
                Cell(escape(finding.ours), "number"),
                Cell(str(finding.n or "-"), "number"),
                Cell(escape(finding.verdict), f"verdict {_manner(finding)}"),
            )
        )
    return _table(("claim", "paper", "ours ± std", "n", "verdict"), rows)


# ---------------------------------------------------------------- one experiment


def _chapter(
    name: str,
    families: Sequence[Family],
    findings: Sequence[Finding],
    drawings: Sequence[Drawing],
) -> str:
    experiment = load_experiments()[name]
    where = f" (Section {experiment.section})" if experiment.section else ""
    parts = [f'<h2 id="{name}">{experiment.title}</h2>']
    parts.append(f'<p class="lead">{experiment.question}{where}</p>')
    if findings:
        parts.append(_claims(findings))
    elif experiment.section or not drawings:
        parts.append("<p>No run of this kind.</p>")
    parts.append(_figures([drawing for drawing in drawings if drawing.paths]))
    parts += [f"<p>{escape(str(drawing))}</p>" for drawing in drawings if drawing.lack]
    if missing := {drawing.command for drawing in drawings if drawing.command}:
        parts.append(f"<p>Not measured yet; these commands do it:</p>{_commands(missing)}")
    script = experiment.command.split()
    again = [shell_command([*script, run]) for run in _runs_of(name, families)]
    parts.append(
        "<details><summary>How to run this again</summary><p>Finished work is kept: delete a "
        f"result file of a run, and these commands make it again.</p>{_commands(again)}</details>"
    )
    return "\n".join(parts)


def _runs_of(name: str, families: Sequence[Family]) -> list[Path]:
    """Return the runs that a script measures: of beyond/, those that it has measured."""
    experiment = load_experiments()[name]
    if experiment.section:  # the paper's
        chosen = [f for f in families if (f.config.dropout.kind != "none") == (name == "dropout")]
    else:
        chosen = [f for f in families if any(f.having(table.name) for table in experiment.tables)]
    return [run.directory for family in chosen for run in family.runs]


def _commands(commands: Iterable[str]) -> str:
    return f"<pre>{escape(chr(10).join(sorted(commands)))}</pre>"


def _figures(drawings: Sequence[Drawing]) -> str:
    """Figures in their order; where there are many families, those of each are folded."""
    compared = [drawing for drawing in drawings if drawing.kind.compares]
    single: dict[str, list[Drawing]] = {}
    for drawing in drawings:
        if drawing not in compared:
            single.setdefault(drawing.about, []).append(drawing)
    if len(single) <= UNFOLDED:
        return "\n".join(map(_figure, drawings))
    folded = (
        f"<details><summary>Figures of {escape(about)}</summary>"
        + "\n".join(map(_figure, own))
        + "</details>"
        for about, own in single.items()
    )
    return "\n".join([*map(_figure, compared), *folded])


def _figure(drawing: Drawing) -> str:
    path = next((path for path in drawing.paths if path.suffix == ".png"), None)
    if path is None:
        where = escape(", ".join(map(str, drawing.paths)))
        return (
            f"<p><b>{escape(drawing.kind.subject)}</b> Not a PNG, and not shown here: {where}</p>"
        )
    content = path.read_bytes()
    picture = base64.b64encode(content).decode("ascii")
    # As wide as its share of a page, so that text has the same size on every figure.
    inches = int.from_bytes(content[16:20], "big") / SETTINGS["savefig.dpi"]
    numbers = [number for number in drawing.kind.numbers if number[0].isdigit()]
    word = "Figures" if len(numbers) > 1 else "Figure"
    like = f" Compare {word} {', '.join(numbers)} of the paper." if numbers else ""
    kind = drawing.kind
    caption = (
        f"<b>{escape(kind.subject)}</b> {escape(kind.see)}{like}"
        f"<small>{escape(drawing.about)}</small>"
    )
    return (
        f'<figure><img alt="{escape(kind.subject)}" style="width: {inches / PAGE:.1%}" '
        f'src="data:image/png;base64,{picture}"><figcaption>{caption}</figcaption></figure>'
    )


# ---------------------------------------------------------------- the end matter


def _tables(tables: Sequence[Table]) -> str:
    parts = ['<h2 id="tables">Tables</h2>']
    for table in tables:
        rows = (
            [Cell(escape(cell), "number" if re.fullmatch(NUMBERS, cell) else "") for cell in row]
            for row in table.rows
        )
        parts.append(f"<h3>{escape(table.caption)}</h3>{_table(table.header, rows)}")
    return "\n".join(parts if tables else [*parts, "<p>No run with dropout, no search.</p>"])


def _what_was_run(families: Sequence[Family]) -> str:
    rows = []
    for family in families:
        sources = [files.read_json(run.provenance_path) for run in family.runs]
        settings = family.settings.items()
        words = ", ".join(f"{k}={v}" for k, v in settings if not k.endswith(".sha256"))
        versions = sorted({_versions(source) for source in sources})
        devices = "; ".join(family.devices)
        seeds = ", ".join(str(run.config.seed) for run in family.runs)
        seconds = ", ".join(f"{source.get('seconds', 0):,.0f}" for source in sources)
        training = f"{escape(family.title)}<small>{escape(words)}</small>"
        training += f"<small>{escape(_measured_with(family))}</small>"
        where = f"{escape(devices)}<small>{escape('; '.join(versions))}</small>"
        rows.append((Cell(training), Cell(seeds), Cell(seconds, "number"), Cell(where)))
    header = ("training, and its settings", "seeds", "seconds", "on what, with which versions")
    return '<h2 id="runs">What was run</h2>' + _table(header, rows)


def _measured_with(family: Family) -> str:
    """Return the settings of its tables that are not the defaults."""
    values = (f"{key}={value!s:.60}" for key, value in family.measured_with.items())
    words = ", ".join(values)
    return f"measured with {words}" if words else ""


def _versions(source: dict) -> str:
    commit = str(source.get("git_commit") or "unknown commit")[:10]
    changed = " with changes" if source.get("git_dirty") else ""
    versions = source.get("versions", {})
    return ", ".join([*(f"{name} {number}" for name, number in versions.items()), commit + changed])


def _deviations() -> str:
    """Return the section with the numbered list of docs/deviations.md."""
    page = REPOSITORY / "docs" / "deviations.md"
    heading = '<h2 id="deviations">Deviations from the paper</h2>'
    if not page.exists():
        return f"{heading}<p>See docs/deviations.md of the code.</p>"
    _, text = files.read_text(page).split("\n", 1)  # its title
    intro, *items = re.split(r"\n(?=[0-9]+[.] )", text.strip())
    lines = "\n".join(f"<li>{_inline(re.sub(r'^[0-9]+[.] ', '', item))}</li>" for item in items)
    return f"{heading}<p>{_inline(intro)}</p><ol>{lines}</ol>"


def _inline(markdown: str) -> str:
    """Bold, code and links of a paragraph."""
    text = escape(" ".join(markdown.split()), quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    return re.sub(r"\[(.+?)\]\(.+?\)", r"\1", text)
