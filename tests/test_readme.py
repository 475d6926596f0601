"""The pages are true: their numbers, tables, commands, links and examples."""

import csv
import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import example_tied_dropout
import gradient_accounting
import reproduce
from engine.config.load import describe_keys, load_configs
from engine.launch.cli import run_script
from engine.runs.run import Run
from plotting.report.claims import CLAIMS
from tests.conftest import TINY

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "results"
README, CONFIGURATION = REPOSITORY / "README.md", REPOSITORY / "docs" / "configuration.md"
PAGES = [README] + [
    page
    for folder in ("docs", "benchmarks", "results")
    for page in sorted((REPOSITORY / folder).rglob("*.md"))
    if not page.name.startswith("table_")  # those are measured
]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))

# The columns of the claims in results/README.md: folder, and the end of `about` in summary.json.
COLUMNS = {
    "CIFAR-10 (JPEG), paper's size": ("paper_size", "cifar10 resnet9 noise 0.1"),
    "MNIST, paper's size": ("paper_size", "mnist resnet9 noise 0.1"),
    "CIFAR-10 (JPEG) 50,000, width 0.5": ("cifar10_jpeg_50000_half_width", "width 0.5 noise 0.1"),
    "CIFAR-10 (JPEG) 50,000": ("cifar10_jpeg_50000", "width 0.25 noise 0.1"),
    "CIFAR-10 (JPEG) 20,000": ("cifar10_jpeg_20000", "width 0.25 noise 0.1"),
    "CIFAR-10 (JPEG) 5,000": ("cifar10_jpeg_5000", "width 0.25 noise 0.1"),
    "MNIST 4,000, width 1": ("mnist_4000_full_width", "resnet9 noise 0.1"),
    "MNIST 4,000": ("mnist_4000", "width 0.25 noise 0.1"),
}
# The rows of the README's table of results: folder and claim.
SHOWN = {
    "gradient accounting": ("paper_size", "gradients.norm_ratio"),
    "layer rewinding": ("paper_size", "rewinding.last_layer"),
    "layer retraining": ("paper_size", "retraining.layers"),
    "neuron flipping": ("paper_size", "flipping.neurons_clean"),
    "example-tied dropout": ("paper_size", "dropout.after_noisy"),
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's fenced blocks of this language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def kept_tables(page: Path, name: str) -> list[list[list[str]]]:
    """Return the tables between pairs of comments of this name, as rows of cells."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    return [[split_row(line) for line in table.splitlines()] for table in found]


def split_row(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_below(page: Path, heading: str) -> list[list[str]]:
    """Return the rows, without their head, of the first table below a heading."""
    _, _, text = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")
    lines = re.search(r"((?:^\|.*\n)+)", text, re.MULTILINE).group(1).splitlines()
    return [split_row(line) for line in lines[2:]]


def commands() -> list[str]:
    """Return every call of Python in the pages' shell blocks and at the head of every config."""
    shell = "".join(block for page in PAGES for block in blocks(page, "sh"))
    lines = shell.replace("\\\n", " ").splitlines()
    for path in CONFIGS:
        lines += [line[1:] for line in path.read_text().splitlines() if line.startswith("#   ")]
    calls = [call.partition("#")[0].strip() for line in lines for call in line.split("&&")]
    return sorted({c for c in calls if c.startswith("python ")})


# ---------------------------------------------------------------- the README


def test_the_readme_is_short_and_shows_the_result_first():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert lines[0].startswith("# ")
    first = next(i for i, line in enumerate(lines) if line.startswith("!["))
    assert first < 10
    assert [line for line in lines if line.startswith("## ")] == [
        "## Results",
        "## Run",
        "## Scripts",
        "## Example-tied dropout in your own training loop",
        "## Read on",
        "## Compared with the authors' published code",
        "## Citation",
    ]


def kept_claims(folder: str) -> list[dict]:
    """Return the claims of a folder's summary.json that were measured."""
    summary = json.loads((RESULTS / folder / "summary.json").read_text(encoding="utf-8"))
    return [claim for claim in summary["claims"] if claim["n"]]


def kept_claim(folder: str, name: str) -> dict:
    """Return a claim about 10% random label noise, on CIFAR-10 where the folder has both."""
    found = [
        claim
        for claim in kept_claims(folder)
        if claim["claim"] == name and re.search(r" noise 0\.1(,|$)", claim["about"])
    ]
    (claim,) = [c for c in found if c["about"].startswith("cifar10 ")] or found
    return claim


def as_shown(claim: dict, like: str) -> str:
    """Return mean ± standard deviation of a claim, in the unit and digits of another cell."""
    scale, unit = (100, "%") if like.split(" (")[0].endswith("%") else (1, "")
    digits = 1 if unit else 2
    values = [claim["mean"]] + ([] if claim["std"] is None else [claim["std"]])
    return " ± ".join(f"{scale * value:.{digits}f}" for value in values) + unit


def test_the_five_results_are_those_of_the_kept_summaries():
    rows = table_below(README, "## Results")
    assert [row[0] for row in rows] == list(SHOWN)
    for experiment, _, paper, ours, where, agrees in rows:
        claim = kept_claim(*SHOWN[experiment])
        assert ours == as_shown(claim, ours)
        assert paper.strip("'") in claim["paper"]
        assert agrees == {"agrees": "yes", "differs": "no"}[claim["verdict"]]
        (seeds,) = re.fullmatch(r"the paper's size, (\d) seeds?", where).groups()
        assert claim["about"].startswith("cifar10 resnet9 noise")
        assert int(seeds) == claim["n"]


def test_the_disagreements_in_the_readme_are_those_of_the_kept_summaries():
    (text,) = re.findall(r"Disagreements remain: (.*?)\[All", README.read_text("utf-8"), re.DOTALL)
    area = kept_claim("paper_size", "flipping.auc_neurons")
    layers = kept_claim("mnist_4000", "retraining.layers")
    rewound = kept_claim("paper_size", "rewinding.most_layers")
    assert area["verdict"] == layers["verdict"] == rewound["verdict"] == "differs"
    assert text.startswith(f"at the paper's size {rewound['mean']:.1%} of the layers")
    text = " ".join(text.split())
    assert f"AUC of {area['mean']:.2f} (paper: {area['paper']}; " in text
    assert f"{layers['mean']:.1%} of the layers" in text


def test_the_caption_of_the_readme_s_figure_is_that_of_the_kept_tables():
    text = README.read_text(encoding="utf-8")
    (figure,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    caption = " ".join(text.partition("**Layer rewinding on all")[2].partition("##")[0].split())
    run = REPOSITORY / figure.replace("/figures/", "/tables/").rpartition("/")[0] / "seed0"
    epoch = re.search(r"At epoch (\d+) the", caption).group(1)
    history = {row["epoch"]: row for row in csv.DictReader((run / "history.csv").open())}
    assert f"predicts {float(history[epoch]['acc_noisy']):.0%} of the wrong labels" in caption
    rewound = list(csv.DictReader((run / "layer_rewinding.csv").open()))
    (last,) = [row for row in rewound if (row["group"], row["epoch"]) == ("8", epoch)]
    assert f"a noisy accuracy of {float(last['acc_noisy']):.0%}." in caption


def test_the_benchmarks_in_the_readme_are_those_of_the_benchmarks():
    measured = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")
    cells = {row[0].partition(",")[0]: row[2] for row in table_below(README, "## Compared with "
             "the authors' published code")}  # fmt: skip
    accounting = table_below(REPOSITORY / "benchmarks" / "README.md", "## training.py")
    assert {row[3] for row in accounting} - {"-"} == {cells["gradient accounting"].split()[0]}
    flipping = table_below(REPOSITORY / "benchmarks" / "README.md", "## flipping.py")
    ratios = sorted((row[6] for row in flipping if row[6] != "-"), key=float)
    assert cells["neuron flipping"].startswith(f"{ratios[0]} to {ratios[-1]} times")
    (masks,) = set(re.findall(r"([\d.]+) MB \|", measured))
    assert cells["masks of example-tied dropout"] == f"{round(float(masks))} MB"


# ---------------------------------------------------------------- results/README.md


def test_the_claims_are_those_of_the_kept_summaries():
    tables = kept_tables(RESULTS / "README.md", "claims")
    rows = {}
    for header, _, *body in tables:
        assert header == ["claim", "in `summary.json`", "paper", *COLUMNS]
        rows |= {row[1].strip("`"): row for row in body}
    expected = {}
    for column, (folder, about) in COLUMNS.items():
        for claim in kept_claims(folder):
            if re.search(rf"{re.escape(about)}(,|$)", claim["about"]):
                expected.setdefault(claim["claim"], {})[column] = claim
    assert set(rows) == set(expected)
    summary = json.loads((RESULTS / "paper_size" / "summary.json").read_text(encoding="utf-8"))
    names = dict.fromkeys(claim["claim"] for claim in summary["claims"])
    assert list(rows) == [name for name in names if name in rows]
    assert len({row[0] for row in rows.values()}) == len(rows)
    assert f"[All {len(rows)} claims" in README.read_text(encoding="utf-8")
    for name, (_, _, paper, *cells) in rows.items():
        found = expected[name]
        assert paper == "; ".join(dict.fromkeys(claim["paper"] for claim in found.values()))
        for column, cell in zip(COLUMNS, cells):
            shown = "-"
            if claim := found.get(column):
                shown = f"{as_shown(claim, cell)} ({claim['n']})"
            assert cell == shown, f"{name}, {column}"


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/summary.json")), ids=lambda p: p.parent.name
)
def test_a_kept_summary_has_all_claims_by_their_present_rules(path):
    kept = json.loads(path.read_text(encoding="utf-8"))["claims"]
    rules = {claim.name: claim.rule.words for claim in CLAIMS}
    assert [entry for entry in kept if entry["agrees_if"] != rules[entry["claim"]]] == []
    together = defaultdict(set)  # claims that the same table of the same runs answers
    for claim in CLAIMS:
        if not claim.over:
            together[claim.source, claim.splits, claim.dropout].add(claim.name)
    for about in {entry["about"] for entry in kept}:
        names = {entry["claim"] for entry in kept if entry["about"] == about}
        for group in together.values():
            assert not group & names or group <= names, about


def test_every_kept_folder_is_described():
    described = {row[0].strip("`") for row in table_below(RESULTS / "README.md", "## Folders")}
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()} - {"open_questions"}
    folders |= {
        f"open_questions/{path.name}"
        for path in (RESULTS / "open_questions").iterdir()
        if path.is_dir()
    }
    assert described == folders


def test_kept_results_are_small():
    """Below 30 MB in all; no figure twice, and as PDF only where a page shows it."""
    kept = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 30e6
    pictures = [path.read_bytes() for path in kept if path.suffix == ".png"]
    assert len(set(pictures)) == len(pictures) > 50
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)]+\.png)\)", page.read_text(encoding="utf-8"))
    }
    assert shown
    for path in kept:
        assert path.suffix != ".pdf" or path.with_suffix(".png").resolve() in shown, path


def test_kept_runs_have_short_names():
    folders = [path.parent for path in RESULTS.rglob("seed*") if path.is_dir()]
    assert len(folders) > 30
    assert max(len(folder.name) for folder in folders) <= 60


# ---------------------------------------------------------------- every page


def test_the_table_of_keys_is_that_of_the_code():
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    rows += ["| " + " | ".join((f"`{k}`", d, a, m)) + " |" for k, d, a, m in describe_keys()]
    expected = "\n".join(rows)
    text = CONFIGURATION.read_text(encoding="utf-8")
    found = re.search(r"<!-- keys -->\n(.*?)\n<!-- /keys -->", text, re.DOTALL).group(1)
    assert found == expected, f"put this into docs/configuration.md:\n{expected}"


@pytest.mark.parametrize("command", commands())
def test_every_command_names_a_script_and_a_configuration_that_are_there(command):
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    if script == "-m":
        module, *arguments = arguments
        if module == "pytest":
            return
        script = module.replace(".", "/") + ".py"
        if "NAME" in module:
            return
    assert (REPOSITORY / script).exists()
    if script.startswith("benchmarks/"):  # each with options of its own
        return
    if script == "plot_results.py":
        text = (REPOSITORY / script).read_text(encoding="utf-8")
        assert all(f'"{option}"' in text for option in arguments if option.startswith("--"))
        return
    if script == "reproduce.py":
        given = reproduce.parse(arguments)
        config, overrides = given.config, given.overrides
    else:
        named = [argument for argument in arguments if not argument.startswith("--")]
        config, *overrides = named or [str(reproduce.QUICKSTART)]
    if config not in ("RUN", "RUN_DIRECTORY"):
        assert load_configs(REPOSITORY / config, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_begins_with_its_purpose_command_cost_and_expectation(path):
    head = path.read_text(encoding="utf-8").partition("\nname:")[0]
    for word in ("#   python ", "Hardware: ", "Duration", "Disk: ", "Expect: "):
        assert word in head, f"{path.name} does not say: {word}"
    assert f"configs/{path.relative_to(REPOSITORY / 'configs')}" in head


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        path = page.parent / place if place else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_row_of_a_table_stands_on_its_own(page):
    rows = re.findall(r"^\|(?!-)(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    unclear = re.compile(r"\s*(the same|and|so|there|ditto|it)\b", re.IGNORECASE)
    assert not [row for row in rows if unclear.match(row)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_of_docs_is_linked_from_the_readme():
    text = README.read_text(encoding="utf-8")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text


def test_every_measurement_beyond_the_paper_is_listed():
    page = REPOSITORY / "docs" / "measurements.md"
    listed = {row[0].strip("`") for row in table_below(page, "## Beyond the paper")}
    scripts = [
        path for path in (REPOSITORY / "beyond").glob("*.py") if "__main__" in path.read_text()
    ]
    assert listed == {f"beyond.{path.stem}" for path in scripts}


WORKFLOW = REPOSITORY / ".github" / "workflows" / "tests.yml"


@pytest.mark.parametrize("path", [REPOSITORY / ".ci" / "run", WORKFLOW], ids=lambda p: p.name)
def test_ci_installs_and_tests_as_the_readme_says(path):
    ci = path.read_text(encoding="utf-8")
    assert "pip install -r requirements-dev.txt && python -m pytest" in README.read_text("utf-8")
    assert re.search(r"pip install (--quiet )?-r requirements-dev\.txt", ci)
    for command in ("ruff check .", "ruff format --check .", "python -m pytest"):
        assert command in ci


def test_your_own_data(tmp_path, monkeypatch, capsys):
    """The example makes a file, and the command beside it trains on that."""
    monkeypatch.chdir(tmp_path)
    page = REPOSITORY / "docs" / "data.md"
    (example,) = [block for block in blocks(page, "python") if "bars.npz" in block]
    subprocess.run([sys.executable, "-c", example], check=True, timeout=60)
    (command,) = [c for c in commands() if "bars.npz" in c]
    _, script, config, *overrides = shlex.split(command)
    assert script == "gradient_accounting.py"
    small = ["train.epochs=2", "train.peak_epoch=1", "model.width=0.1", "device=cpu"]
    arguments = [str(REPOSITORY / config), *overrides, *small]
    status = run_script(gradient_accounting.EXPERIMENT, "", arguments)
    assert status == 0, capsys.readouterr().err
    assert (tmp_path / capsys.readouterr().out.split()[-1] / "history.csv").exists()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Path:
    """Return a folder with a run RUN and a run TIED with example-tied dropout, of the same data."""
    place = tmp_path_factory.mktemp("python")
    config = place / "tiny.yaml"
    config.write_text(
        TINY + f"output_dir: {place / 'runs'}\nretraining: {{epochs: 2, peak_epoch: 1}}\n"
    )
    (plain,) = load_configs(config)
    tied = ["dropout.kind=example_tied", "model.width=0.1", "dropout.forget_draws=1"]
    tied = example_tied_dropout.without_accounting(load_configs(config, tied)[0])
    gradient_accounting.EXPERIMENT.main(Run.of(plain))
    example_tied_dropout.EXPERIMENT.main(Run.of(tied))
    Run.of(plain).directory.rename(place / "RUN")
    Run.of(tied).directory.rename(place / "TIED")
    return place


def test_the_examples_in_python(two_runs, monkeypatch):
    """The page's blocks run as written, and what they find agrees with the files of the run."""
    monkeypatch.chdir(two_runs)
    names: dict = {}
    for block in blocks(REPOSITORY / "docs" / "python.md", "python"):
        exec(block, names)
    split, last = names["split"], names["history"][-1]
    assert names["outcome"].correct.double().mean().item() == pytest.approx(last["acc_total"])
    score, marked = names["score"], names["marked"]
    pairs = [(a > b) + (a == b) / 2 for a in score[marked] for b in score[~marked]]
    assert names["area"].auc == pytest.approx(sum(pairs) / len(pairs))
    assert len(names["accounts"]) == len(names["correct"]) == 9
    with (two_runs / "TIED" / "example_tied_dropout.csv").open() as file:
        before, after = csv.DictReader(file)
    for state, outcome in ((before, names["before"]), (after, names["after"])):
        clean = outcome.correct[~split.memorized].double().mean().item()
        assert clean == pytest.approx(float(state["acc_clean"]))
    assert [row["epoch"] for row in names["curve"]] == [0, 1, 2]
    assert names["found"]["example"] in split.index
