"""The table of claims as CSV, and the epochs in which noisy examples are learned."""

import csv
import io
import statistics

import numpy as np
import pytest

from engine.runs import files
from engine.runs.run import Run
from engine.runs.tables import HISTORY
from gradient_accounting import ACCOUNTS
from neuron_flipping import FLIPPING
from plotting.families import Family
from plotting.report import headline_numbers
from plotting.report.findings import find, table_claims
from tests.own_data import good_arrays

LAYERS = 3


def family_of(*runs: Run) -> Family:
    return Family(runs[0].directory.parent, runs)


def plant(run: Run, noisy: list[float], classes: int = 10) -> Run:
    """Write the files of a run that was never trained; the ratio of epoch t is t."""
    history = [dict.fromkeys(HISTORY.columns, 0.5) | {"epoch": t, "acc_noisy": a}
               for t, a in enumerate(noisy)]  # fmt: skip
    HISTORY.write(run.directory, history)
    row = dict.fromkeys(ACCOUNTS.columns, 1.0)
    accounts = [
        row | {"epoch": t, "group": group, "norm_noisy": float(t)}
        for t in range(1, len(noisy))
        for group in range(LAYERS)
    ]
    ACCOUNTS.write(run.directory, accounts)
    files.write_json(run.provenance_path, {"device": "one GPU"})
    label = np.arange(4 * classes) % classes
    memorized = np.arange(len(label)) < 4
    files.write_arrays(run.split_path, label=label, true_label=label, memorized=memorized)
    return run


CURVE = [0.3, 0.08, 0.12, 0.3, 0.34, 0.5, 0.96, 1.0]  # by epoch


def test_learning_starts_above_chance_for_the_number_of_classes(tiny, tmp_path):
    """Ten classes: epochs 2 to 5; three classes: 4 and 5; two classes: none."""
    ten = plant(Run.of(tiny("train.epochs=7")), CURVE)
    assert headline_numbers.count_classes(family_of(ten)) == 10
    assert headline_numbers.norm_ratio(family_of(ten)) == pytest.approx([3.5])
    for classes, expected in ((3, 4.5), (2, np.nan)):
        np.savez(path := tmp_path / f"{classes}.npz", **good_arrays())
        own = ("data.name=npz", f"data.path={path}", "data.train_size=null", "data.test_size=null")
        family = family_of(plant(Run.of(tiny("train.epochs=7", *own)), CURVE, classes))
        assert headline_numbers.count_classes(family) == classes
        assert headline_numbers.norm_ratio(family) == pytest.approx([expected], nan_ok=True)


def test_few_examples_of_ten_classes_are_still_of_ten_classes(tiny):
    """A published data set has its classes even where a small subset lacks some of them."""
    run = plant(Run.of(tiny("train.epochs=7")), CURVE, classes=4)
    assert headline_numbers.count_classes(family_of(run)) == 10


def read_plain(family: Family) -> dict[str, dict[str, str]]:
    text = table_claims(find([family])).csv()
    return {row["name"]: row for row in csv.DictReader(io.StringIO(text))}


def test_the_csv_of_claims_has_plain_numbers(tiny):
    family = family_of(*(plant(Run.of(tiny("train.epochs=7", f"seed={s}")), CURVE) for s in (0, 1)))
    FLIPPING.write(family.runs[0].directory, searched(0.9, 0.8))
    files.write_json(family.runs[0].directory / "neuron_flipping.json", {"settings": SETTINGS})
    rows = read_plain(family)
    ratio = rows["gradients.norm_ratio"]
    assert (ratio["mean"], ratio["std"], ratio["n"]) == ("3.5", "0", "2")
    assert (ratio["paper_value"], ratio["hardware"]) == ("", "one GPU")
    assert (ratio["verdict"], ratio["agrees_if"]) == ("differs", "from 0.67 to 1.5")
    neurons = rows["flipping.neurons_noisy"]
    assert (neurons["mean"], neurons["std"], neurons["n"]) == ("2", "", "1")
    assert neurons["paper_value"] == "5.1"
    unmeasured = rows["rewinding.last_layer"]
    assert (unmeasured["mean"], unmeasured["n"]) == ("", "0")
    for row in rows.values():
        for column in ("paper_value", "mean", "std", "n"):
            assert row[column] == "" or np.isfinite(float(row[column]))


# ---------------------------------------------------------------- accuracy on the test set

SETTINGS = {"max_neurons": 20}


def searched(noisy: float, clean: float, test: tuple[float, float] | None = None) -> list[dict]:
    """Rows of 20 examples of either kind; accuracies after removal spread around their means."""
    rows = []
    for i in range(40):
        memorized, shift = i % 2, 0.01 * (i // 2 % 3 - 1)
        row = dict.fromkeys(FLIPPING.columns, 1.0)
        row |= {"example": i, "memorized": memorized, "neurons": 2, "flipped": 1}
        row |= {"groups": "0 1", "neurons_ids": "x"}
        row["acc_remaining_after"] = (noisy if memorized else clean) + shift
        after = (test or (np.nan, np.nan))[1 - memorized]
        rows.append(row | {"acc_test_before": 0.9, "acc_test_after": after + shift})
    return rows


def judged(run: Run, rows: list[dict], columns: tuple[str, ...] = FLIPPING.columns):
    files.write_csv(FLIPPING.path(run.directory), columns, rows)
    files.write_json(FLIPPING.path(run.directory).with_suffix(".json"), {"settings": SETTINGS})
    return {finding.claim.name: finding for finding in find([family_of(run)])}


def test_the_cost_on_the_test_set_is_a_claim_of_its_own(tiny):
    run = plant(Run.of(tiny("train.epochs=7")), CURVE)
    rows = searched(0.9, 0.8, test=(0.7, 0.75))
    found = judged(run, rows)
    expected = statistics.mean(r["acc_test_after"] for r in rows if r["memorized"]) - (
        statistics.mean(r["acc_test_after"] for r in rows if not r["memorized"])
    )
    assert found["flipping.test"].values == pytest.approx([expected])
    assert found["flipping.test"].verdict == "differs", "clean examples cost less here"
    assert found["flipping.remaining"].verdict == "agrees"


def test_tables_of_earlier_versions_are_read_and_lack_this_claim_only(tiny):
    run = plant(Run.of(tiny("train.epochs=7")), CURVE)
    earlier = tuple(column for column in FLIPPING.columns if column not in FLIPPING.added)
    found = judged(run, searched(0.9, 0.8), earlier)
    assert found["flipping.test"].verdict == "not measured"
    assert found["flipping.remaining"].verdict == "agrees"
    assert np.isnan(FLIPPING.read(run.directory)[0]["acc_test_after"])


def test_a_table_that_a_later_version_extended_uses_the_rows_that_have_it(tiny):
    run = plant(Run.of(tiny("train.epochs=7")), CURVE)
    rows = searched(0.9, 0.8) + searched(0.9, 0.8, test=(0.8, 0.7))
    assert judged(run, rows)["flipping.test"].verdict == "agrees"
