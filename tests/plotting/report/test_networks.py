"""The table of claims over networks holds what summary.json holds, and nothing for one network."""

from dataclasses import replace

from plotting.families import Family
from plotting.report.findings import find
from plotting.report.networks import _apart, table_networks
from plotting.report.summary import summarize
from tests.plotting.report.test_claims import planted

PAIR = ("fp32", "bf16")


def families(tiny, *changes: tuple[str, ...]) -> list[Family]:
    """Two runs of made-up numbers for each change of the configuration."""
    found = []
    for number, overrides in enumerate(changes):
        runs = [planted(tiny, 10 * number + seed, *overrides) for seed in (1, 2)]
        found.append(Family(runs[0].directory.parent, tuple(runs)))
    return found


def test_cells_are_those_of_the_summary(tiny):
    ours = families(tiny, (), ("model.name=resnet50", "model.width=1.0"))
    findings = find(ours)
    table = table_networks(ours, findings)
    assert table.header == ("claim", "paper", "resnet9 width 0.05", "resnet50")
    summary = [entry for entry in summarize(ours, findings)["claims"] if entry["mean"] is not None]
    assert [row[0] for row in table.rows] == [*dict.fromkeys(entry["claim"] for entry in summary)]
    for entry in summary:
        column = 2 + [family.title for family in ours].index(entry["about"])
        (row,) = [row for row in table.rows if row[0] == entry["claim"]]
        assert row[1] == entry["paper"]
        number, verdict = row[column].split(" ", 1)
        assert verdict.endswith(entry["verdict"])
        scale = 100 if "%" in row[column] else 1
        assert abs(float(number) - scale * entry["mean"]) < 0.051


def test_one_network_has_no_such_table(tiny):
    ours = families(tiny, (), ("data.noise_rate=0.3",))
    assert not table_networks(ours, find(ours)).measured
    assert not table_networks([], []).measured


def test_what_was_not_measured_is_a_dash(tiny):
    ours = families(tiny, (), ("model.width=0.1",))
    for run in ours[1].runs:
        (run.directory / "layer_rewinding.csv").unlink()
    rows = {row[0]: row for row in table_networks(ours, find(ours)).rows}
    assert rows["rewinding.not_last"][3] == "-"
    assert rows["rewinding.not_last"][2] != "-"
    assert "retraining.layers" in rows


def test_a_precision_has_a_column_of_its_own(tiny):
    changes = [(f"precision={name}", f"model.width={w}") for w in (0.05, 0.1) for name in PAIR]
    ours = families(tiny, *changes)
    ours = [replace(family, apart=f", {change[0]}") for family, change in zip(ours, changes)]
    header = table_networks(ours, find(ours)).header[2:]
    assert header == tuple(f"width {w} precision={name}" for w in (0.05, 0.1) for name in PAIR)


def test_a_number_keeps_its_name():
    titles = (
        "mnist 4,000 resnet9 width 0.25 noise 0.1",
        "mnist 4,000 resnet9 width 0.1 noise 0.25",
    )
    assert _apart(titles) == ["width 0.25 noise 0.1", "width 0.1 noise 0.25"]


def test_options_tell_networks_apart(tiny_file, tiny):
    path = tiny_file.with_name("own.py")
    path.write_text("")
    model = (f"model.name={path}:make", "model.width=1.0")
    sizes = families(tiny, *((*model, f"model.options={{size: {size}}}") for size in (1, 2)))
    ours = [replace(family, apart=f", size={size}") for family, size in zip(sizes, (1, 2))]
    assert table_networks(ours, find(ours)).header[2:] == ("size=1", "size=2")


def test_a_training_with_dropout_shares_the_column_of_the_one_without(tiny):
    """Also where only the titles of those without tell two learning rates apart."""
    tied = ("dropout.kind=example_tied", "train.account_gradients=false")
    rates = ("train.peak_lr=0.04",), ("train.peak_lr=0.1",)
    changes = [*rates, (*rates[0], *tied), ("model.width=0.1",)]
    ours = families(tiny, *changes)
    words = (", peak 0.04", ", peak 0.1", "", "")
    ours = [replace(family, apart=apart) for family, apart in zip(ours, words)]
    header = table_networks(ours, find(ours)).header[2:]
    assert len(header) == 3
    assert [name.rpartition("peak ")[2] for name in header[:2]] == ["0.04", "0.1"]
