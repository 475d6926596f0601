"""plot_results.py --compare: what differs between two summaries, and files that are none."""

import json

import pytest

import plot_results
from plotting.report.compare import compare_summaries


def entry(claim: str, mean: float | None, about: str = "mnist", **changed: object) -> dict:
    verdict = "not measured" if mean is None else "agrees" if mean > 0 else "differs"
    base = {"claim": claim, "about": about, "paper": "1", "mean": mean, "std": None, "n": 1}
    return base | {"agrees_if": "above 0", "verdict": verdict} | changed


def write(folder, name: str, *entries: dict):
    path = folder / name
    path.write_text(json.dumps({"runs": [], "claims": entries}))
    return path


@pytest.fixture
def two(tmp_path):
    return lambda ours, theirs: (
        write(tmp_path, "a.json", *ours),
        write(tmp_path, "b.json", *theirs),
    )


def test_equal_summaries_do_not_differ(two):
    entries = [entry("x.a", 0.5), entry("x.b", None), entry("x.a", 0.7, "cifar10")]
    found = compare_summaries(*two(entries, entries[::-1]))
    assert (found.compared, found.differing) == (3, 0)
    assert found.lines == ("3 claims compared, 0 differ (tolerance 0.01); 0 in one summary only",)


def test_numbers_and_verdicts_that_differ_are_named(two):
    ours = [entry("x.a", 0.5, std=0.25, n=3), entry("x.b", 1.0), entry("x.c", 0.001)]
    theirs = [entry("x.a", 0.52), entry("x.b", None), entry("x.c", -0.001)]
    first, second, third, last = compare_summaries(*two(ours, theirs)).lines
    assert first == "x.a (mnist): 0.5 ± 0.25 (n = 3) -> 0.52 (n = 1)"
    assert second == "x.b (mnist): 1 (n = 1) -> no number; agrees -> not measured"
    assert third == "x.c (mnist): agrees -> differs", "the numbers are within the tolerance"
    assert last.startswith("3 claims compared, 3 differ")


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "differ"),
    [
        (0.50, 0.509, 0.01, False),
        (0.50, 0.511, 0.01, True),
        (50.0, 50.4, 0.01, False),  # above 1 the tolerance is relative
        (50.0, 50.6, 0.01, True),
        (-50.0, 50.0, 0.01, True),
        (0.5, 0.5, 0, False),
        (0.5, 0.500001, 0, True),
        (0.5, 0.9, 1, False),
    ],
)
def test_the_tolerance(two, a, b, tolerance, differ):
    for pair in (a, b), (b, a):
        files = two(*([entry("x", value, verdict="agrees")] for value in pair))
        assert compare_summaries(*files, tolerance).differing == differ


def test_single_claims_about_different_runs_are_compared(two):
    found = compare_summaries(*two([entry("x", 0.5, "mnist")], [entry("x", 0.9, "cifar10")]))
    assert found.lines[0] == "x (mnist | cifar10): 0.5 (n = 1) -> 0.9 (n = 1)"


def test_what_only_one_summary_has_is_named(two):
    several = [entry("x", 0.5, "mnist"), entry("x", 0.9, "svhn")]
    paths = two([*several, entry("y", 0.1)], [entry("x", 0.5, "cifar10"), entry("x", 0.9, "svhn")])
    line, last = compare_summaries(*paths).lines
    assert line == f"y (mnist): only in {paths[0]}, agrees"
    assert last == "2 claims compared, 0 differ (tolerance 0.01); 1 in one summary only"


def test_the_command_prints_the_comparison_and_draws_nothing(two, tmp_path, capsys):
    paths = two([entry("x", 0.5)], [entry("x", 0.6)])
    before = sorted(tmp_path.iterdir())
    assert plot_results.main(["--compare", *map(str, paths), "--tolerance", "0.05"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "x (mnist): 0.5 (n = 1) -> 0.6 (n = 1)"
    assert out[1].startswith("1 claims compared, 1 differ (tolerance 0.05)")
    assert sorted(tmp_path.iterdir()) == before


MALFORMED = {
    "": "not valid JSON",
    "[]": "not a JSON object",
    "{}": "no list of claims",
    '{"claims": {}}': "no list of claims",
    '{"claims": [1]}': "claim 1: 1 is not an object",
    '{"claims": [{"claim": "x", "about": "y"}]}': "claim 1: verdict is not text",
    '{"claims": [{"claim": "x", "about": [], "verdict": "agrees"}]}': "about is not text",
    '{"claims": [{"claim": "x", "about": "y", "verdict": "", "mean": "1"}]}': "mean: '1' is not",
    '{"claims": [{"claim": "x", "about": "y", "verdict": "", "mean": NaN}]}': "mean: nan is not",
    '{"claims": [{"claim": "x", "about": "y", "verdict": "", "std": true}]}': "std: True is not",
    '{"claims": [{"claim": "x", "about": "y", "verdict": "", "n": 1' + 400 * "0" + "}]}": "n: 1000",
    "[" * 100_000: "not valid JSON",
}


@pytest.mark.parametrize("text", MALFORMED, ids=[str(i) for i in range(len(MALFORMED))])
def test_a_file_that_is_no_summary_is_one_line(tmp_path, capsys, text):
    good, bad = write(tmp_path, "good.json", entry("x", 1.0)), tmp_path / "bad.json"
    bad.write_text(text)
    for pair in ((good, bad), (bad, good)):
        assert plot_results.main(["--compare", *map(str, pair)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{bad}: ")
        assert MALFORMED[text] in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "GOOD", "nowhere.json"], "nowhere.json: no such file"),
        (["--compare", "GOOD"], "argument --compare: expected 2 arguments"),
        (["--compare", "GOOD", "GOOD", "--tolerance", "-1"], "--tolerance: -1 is not allowed"),
        (["--compare", "GOOD", "GOOD", "--tolerance", "nan"], "--tolerance: nan is not allowed"),
        (["--compare", "GOOD", "GOOD", "--tolerance", "x"], "invalid float value: 'x'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, arguments, message):
    good = write(tmp_path, "good.json", entry("x", 1.0))
    words = [str(good) if word == "GOOD" else word for word in arguments]
    assert plot_results.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
