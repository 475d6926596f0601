"""The pages are true: their tables, commands and links, and the example of one's own data."""

import csv
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import gradient_accounting
import reproduce
from engine.config.load import describe_keys, load_configs
from engine.launch.cli import run_script

REPOSITORY = Path(__file__).resolve().parents[1]
README, CONFIGURATION = REPOSITORY / "README.md", REPOSITORY / "docs" / "configuration.md"
PAGES = [README] + [
    page
    for folder in ("docs", "benchmarks", "results")
    for page in sorted((REPOSITORY / folder).rglob("*.md"))
    if not page.name.startswith("table_")  # those are measured
]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def kept_table(page: Path, name: str) -> str:
    """What stands between two comments of this name."""
    text = page.read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL).group(1)


def commands() -> list[str]:
    """Every call of a script, in the pages' shell blocks and at the head of every config."""
    shell = "".join(block for page in PAGES for block in blocks(page, "sh"))
    lines = shell.replace("\\\n", " ").splitlines()
    for path in CONFIGS:
        lines += [line[1:] for line in path.read_text().splitlines() if line.startswith("#   ")]
    calls = [call.partition("#")[0].strip() for line in lines for call in line.split("&&")]
    return sorted({c for c in calls if c.startswith("python ") and not c.startswith("python -m")})


def test_the_table_of_keys_is_that_of_the_code():
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    rows += ["| " + " | ".join((f"`{k}`", d, a, m)) + " |" for k, d, a, m in describe_keys()]
    expected = "\n".join(rows)
    found = kept_table(CONFIGURATION, "keys")
    assert found == expected, f"put this into docs/configuration.md:\n{expected}"


def claims_at_small_size() -> list[str]:
    """Every claim about label noise, as the kept results have it: ours, and of how many seeds."""
    columns = {
        "MNIST, 4,000": ("mnist_4000", "width 0.25"),
        "the same, width 1": ("mnist_4000_full_width", "resnet9"),
        "CIFAR-10 (JPEG), 5,000": ("cifar10_jpeg_5000", "width 0.25"),
        "CIFAR-10 (JPEG), 20,000": ("cifar10_jpeg_20000", "width 0.25"),
        "CIFAR-10 (JPEG), 50,000": ("cifar10_jpeg_50000", "width 0.25"),
        "the same, width 0.5": ("cifar10_jpeg_50000_half_width", "width 0.5"),
    }
    papers, cells = defaultdict(dict), defaultdict(dict)
    for column, (folder, model) in columns.items():
        path = REPOSITORY / "results" / folder / "tables" / "table_claims.csv"
        for row in csv.DictReader(path.open(encoding="utf-8", newline="")):
            if re.search(rf"{model} noise 0\.1(,|$)", row["data, model"]):
                papers[row["claim"]][row["paper"]] = None
                n = "" if row["n"] == "-" else f" ({row['n']})"
                assert column not in cells[row["claim"]]
                cells[row["claim"]][column] = row["ours ± std"] + n
    rows = [("claim", "paper", *columns), ("---",) * (2 + len(columns))]
    for claim, found in cells.items():
        ours = (found.get(column, "-") for column in columns)
        rows.append((claim, "; ".join(papers[claim]), *ours))
    return ["| " + " | ".join(row) + " |" for row in rows]


def test_the_table_of_claims_is_that_of_the_kept_results():
    expected = "\n".join(claims_at_small_size())
    assert kept_table(README, "claims") == expected, f"put this into the README:\n{expected}"


@pytest.mark.parametrize("command", commands())
def test_every_command_names_a_script_and_a_configuration_that_are_there(command):
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    assert (REPOSITORY / script).exists()
    if script.startswith("benchmarks/"):  # each with options of its own
        return
    if script == "reproduce.py":
        given = reproduce.parse(arguments)
        config, overrides = given.config, given.overrides
    else:
        named = [argument for argument in arguments if not argument.startswith("--")]
        config, *overrides = named or [str(reproduce.QUICKSTART)]
    assert load_configs(REPOSITORY / config, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_begins_with_what_one_wants_to_know(path):
    head = path.read_text(encoding="utf-8").partition("\nname:")[0]
    for word in ("python ", "Hardware:", "Duration", "Disk:", "Expect:"):
        assert word.lower() in head.lower(), f"{path.name} does not say: {word}"
    assert f"configs/{path.relative_to(REPOSITORY / 'configs')}" in head


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_ci_installs_and_tests_as_the_readme_says():
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert "pip install -r requirements-dev.txt && python -m pytest" in README.read_text("utf-8")
    assert "pip install --quiet -r requirements-dev.txt" in ci
    assert "python -m pytest" in ci


def test_your_own_data(tmp_path, monkeypatch, capsys):
    """The example makes a file, and the command beside it trains on that."""
    monkeypatch.chdir(tmp_path)
    (example,) = [block for block in blocks(README, "python") if "bars.npz" in block]
    subprocess.run([sys.executable, "-c", example], check=True, timeout=60)
    (command,) = [c for c in commands() if "bars.npz" in c]
    _, script, config, *overrides = shlex.split(command)
    assert script == "gradient_accounting.py"
    small = ["train.epochs=2", "train.peak_epoch=1", "model.width=0.1", "device=cpu"]
    arguments = [str(REPOSITORY / config), *overrides, *small]
    status = run_script(gradient_accounting.EXPERIMENT, "", arguments)
    assert status == 0, capsys.readouterr().err
    assert (tmp_path / capsys.readouterr().out.split()[-1] / "history.csv").exists()
