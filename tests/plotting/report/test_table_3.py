"""Table 3 has a row for each reading of standard dropout, beside the paper's numbers."""

from engine.runs.run import Run
from example_tied_dropout import DROPOUT
from plotting.families import Family
from plotting.report.findings import find
from plotting.report.tables import table_3


def family(tiny, acc_noisy: float, *overrides: str) -> Family:
    run = Run.of(tiny(*overrides))
    row = {"dropout": run.config.dropout.kind, "p_gen": 0.4, "p_mem": 0.2}
    row |= {"acc_clean": 1.0, "acc_noisy": acc_noisy, "acc_test": 0.5}
    DROPOUT.write(run.directory, [row | {"state": state} for state in ("before", "after")])
    return Family(run.directory.parent, (run,))


def test_both_readings_have_a_row_of_their_own(tiny):
    standard = "dropout.kind=standard"
    families = [
        family(tiny, 0.02, standard, "dropout.standard=keep"),
        family(tiny, 0.95, standard, "dropout.standard=drop"),
        family(tiny, 0.5, standard, "dropout.units=channels"),
        family(tiny, 0.9, "dropout.kind=sparse"),
    ]
    rows = {row[1]: row[2:] for row in table_3(families).rows}
    paper = ("100.0%", "99.5%")
    assert rows == {
        "standard, keeps 40%": ("1", "100.0%", "2.0%", *paper),
        "standard, drops 40%": ("1", "100.0%", "95.0%", *paper),
        "standard, keeps 40%, whole channels": ("1", "100.0%", "50.0%", *paper),
        "sparse 0.4": ("1", "100.0%", "90.0%", "100.0%", "99.8%"),
    }
    assert len({one.title for one in families}) == len(families)
    found = [f for f in find(families) if f.claim.name == "dropout.standard_noisy"]
    assert [f.verdict for f in found] == ["differs", "agrees", "differs"]
    assert len({f.about for f in found}) == 3
