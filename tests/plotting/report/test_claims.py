"""Claims: every measure against a slow look at the same files, and verdicts by their rules."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from engine.config.load import load_configs
from engine.runs import files
from engine.runs.run import Run
from example_tied_dropout import DROPOUT
from layer_rewinding import REWINDING
from neuron_flipping import FLIPPING
from plotting.families import Family, alike, families_over
from plotting.report import headline_numbers
from plotting.report.claims import CLAIMS
from plotting.report.findings import find, table_claims
from plotting.report.tables import CHOICES, _choices, table_stability

HISTORY = (
    "epoch", "lr", "loss_clean", "loss_noisy", "loss_total", "loss_test",
    "acc_clean", "acc_noisy", "acc_total", "acc_test",
)  # fmt: skip
ACCOUNTS = ("epoch", "group", "norm_clean", "norm_noisy", "norm_total", "cosine", "parameters")
EPOCHS, LAYERS = 6, 4
SEARCHED_EXAMPLES = 40
MOST = 20  # neurons that a search was allowed, unlike the default


def planted(tiny, seed: int, *overrides: str) -> Run:
    """A run of which nothing was measured: its files are random numbers."""
    run = Run.of(tiny(f"seed={seed}", f"train.epochs={EPOCHS}", *overrides))
    random = np.random.default_rng(seed)
    noisy = [0.1, 0.05, 0.15, 0.5, 0.9, 0.99, 1.0]
    files.write_csv(
        run.history_path,
        HISTORY,
        [dict.fromkeys(HISTORY, 0.5) | {"epoch": t, "acc_noisy": a} for t, a in enumerate(noisy)],
    )
    names = ("norm_clean", "norm_noisy", "norm_total", "cosine")
    files.write_csv(
        run.directory / "gradient_accounting.csv",
        ACCOUNTS,
        [
            {"epoch": t, "group": g, "parameters": 9} | dict(zip(names, random.uniform(0.1, 1, 4)))
            for t in range(1, EPOCHS + 1)
            for g in range(LAYERS)
        ],
    )
    columns = ("group", "epoch", "acc_clean", "acc_noisy", "acc_total")
    for name, last in (("layer_rewinding", "acc_total"), ("layer_retraining", "acc_train")):
        files.write_csv(
            run.directory / f"{name}.csv",
            (*columns[:4], last),
            [
                {"group": g, "epoch": t} | dict(zip((*columns[2:4], last), random.uniform(0, 1, 3)))
                for g in range(LAYERS)
                for t in range(EPOCHS + 1)
            ],
        )
    files.write_csv(
        run.directory / "neuron_flipping.csv",
        (
            "example", "memorized", "neurons", "flipped", "acc_remaining_before",
            "acc_remaining_after", "groups", "neurons_ids",
        ),
        [
            {
                "example": i, "memorized": i % 2, "neurons": (n := int(random.integers(1, 14))),
                "flipped": int(i != 3), "acc_remaining_before": 1.0,
                "acc_remaining_after": random.uniform(), "neurons_ids": "x",
                "groups": " ".join(map(str, random.integers(0, LAYERS, n))),
            }
            for i in range(SEARCHED_EXAMPLES)
        ],
    )  # fmt: skip
    files.write_json(run.directory / "neuron_flipping.json", {"settings": {"max_neurons": MOST}})
    memorized = np.arange(20) < 4
    files.write_arrays(run.split_path, memorized=memorized)
    return run


@pytest.fixture
def family(tiny) -> Family:
    runs = tuple(planted(tiny, seed) for seed in (1, 2))
    return Family(runs[0].directory.parent, runs)


def rows_of(run: Run, name: str) -> list[dict[str, str]]:
    header, *lines = (run.directory / name).read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","))) for line in lines]


def slow_medians(run: Run, value) -> list[float]:
    """Epochs 2, 3 and 4 of the planted curve lie between 10% and 95%."""
    rows = [row for row in rows_of(run, "gradient_accounting.csv") if 2 <= int(row["epoch"]) <= 4]
    return [
        statistics.median(value(row) for row in rows if int(row["group"]) == group)
        for group in range(LAYERS)
    ]


def slow_ratio(row: dict[str, str]) -> float:
    return float(row["norm_noisy"]) / float(row["norm_clean"])


def slow_epochs(run: Run) -> float:
    """The share of epochs in which the median layer's ratio is 2/3 or more."""
    rows = rows_of(run, "gradient_accounting.csv")
    medians = [
        statistics.median(slow_ratio(row) for row in rows if int(row["epoch"]) == epoch)
        for epoch in range(1, EPOCHS + 1)
    ]
    return sum(median >= 2 / 3 for median in medians) / EPOCHS


def test_gradients(family):
    for i, run in enumerate(family.runs):
        ratios = slow_medians(run, slow_ratio)
        cosines = slow_medians(run, lambda row: float(row["cosine"]))
        expected = {
            headline_numbers.norm_ratio: statistics.median(ratios),
            headline_numbers.norm_ratio_each: statistics.median(ratios) * 16 / 4,
            headline_numbers.norm_ratio_highest: max(ratios),
            headline_numbers.norm_ratio_last: ratios[-1] / statistics.median(ratios),
            headline_numbers.cosine: statistics.median(cosines),
            headline_numbers.cosine_layers: sum(c < -0.75 for c in cosines) / LAYERS,
            headline_numbers.norm_ratio_epochs: slow_epochs(run),
        }
        for measure, value in expected.items():
            assert measure(family)[i] == pytest.approx(value), measure.__name__


def test_cosines_throughout_are_of_all_epochs(family):
    """Layer 0 opposes in 4 of 6 epochs, layers 1 and 2 in 3 (the median is between), 3 in none."""
    for run in family.runs:
        rows = files.read_csv(run.directory / "gradient_accounting.csv", ACCOUNTS)
        for row in rows:
            opposed = row["epoch"] <= {0: 4, 1: 3, 2: 3, 3: 0}[row["group"]]
            row["cosine"] = -0.9 if opposed else 0.9
        files.write_csv(run.directory / "gradient_accounting.csv", ACCOUNTS, rows)
    assert headline_numbers.cosine_throughout(family) == pytest.approx([1 / LAYERS] * 2)


def test_gradients_that_were_never_learned_say_nothing(family):
    for run in family.runs:
        rows = [{"epoch": t} for t in range(EPOCHS + 1)]
        files.write_csv(run.history_path, HISTORY, [dict.fromkeys(HISTORY, 0.0) | r for r in rows])
    assert np.isnan(headline_numbers.norm_ratio(family)).all()
    assert np.isnan(headline_numbers.cosine_layers(family)).all()
    (finding,) = [f for f in find([family]) if f.claim.name == "gradients.norm_ratio"]
    assert (finding.n, finding.verdict, finding.ours) == (0, "not measured", "-")


def test_layers(family):
    for i, run in enumerate(family.runs):
        noisy = {
            (int(row["group"]), int(row["epoch"])): float(row["acc_noisy"])
            for row in rows_of(run, "layer_rewinding.csv")
        }
        # Epoch 2 (15%) is the last one below 20%; the planted training ends at 100%.
        assert headline_numbers.kept_by_last_layer(family)[i] == pytest.approx(noisy[LAYERS - 1, 2])
        assert headline_numbers.layers_that_keep(family)[i] == pytest.approx(
            sum(noisy[group, 2] >= 0.8 for group in range(LAYERS)) / LAYERS
        )
        others = statistics.mean(noisy[group, 0] for group in range(LAYERS - 1))
        assert headline_numbers.last_against_others(family)[i] == pytest.approx(
            noisy[LAYERS - 1, 0] - others
        )
        peaks = [
            max(float(r["acc_noisy"]) for r in rows_of(run, "layer_retraining.csv")
                if int(r["group"]) == group and int(r["epoch"]) > 0)
            for group in range(LAYERS)
        ]  # fmt: skip
        assert headline_numbers.last_layer_comes_back(family)[i] == pytest.approx(peaks[-1])
        assert (
            headline_numbers.layers_that_come_back(family)[i]
            == sum(p >= 0.7 for p in peaks) / LAYERS
        )


def test_neurons(family):
    for i, run in enumerate(family.runs):
        rows = rows_of(run, "neuron_flipping.csv")
        noisy, clean = ([r for r in rows if r["memorized"] == kind] for kind in "10")

        def mean(rows, column):
            return statistics.mean(float(row[column]) for row in rows)

        counts = [
            statistics.mean(float(r["neurons"]) if r["flipped"] == "1" else MOST + 1 for r in kind)
            for kind in (noisy, clean)
        ]
        assert any(r["flipped"] == "0" for r in noisy), "one that gave up"
        assert headline_numbers.neurons_noisy(family)[i] == pytest.approx(counts[0])
        assert headline_numbers.neurons_ratio(family)[i] == pytest.approx(counts[1] / counts[0])
        few = [r for r in noisy if r["flipped"] == "1" and int(r["neurons"]) < 10]
        assert headline_numbers.flipped_below_ten(family)[i] == pytest.approx(len(few) / len(noisy))
        assert headline_numbers.remaining_difference(family)[i] == pytest.approx(
            mean(noisy, "acc_remaining_after") - mean(clean, "acc_remaining_after")
        )
        shares = [
            [
                " ".join(r["groups"] for r in rows).split().count(str(layer))
                / len(" ".join(r["groups"] for r in rows).split())
                for layer in range(LAYERS)
            ]
            for rows in (noisy, clean)
        ]
        assert headline_numbers.layers_shared(family)[i] == pytest.approx(
            sum(map(min, zip(*shares)))
        )


def test_scattered_layers_are_counted_by_their_entropy(family):
    header = rows_of(family.runs[0], "neuron_flipping.csv")[0].keys()
    for groups, expected in (("3 3", 1.0), ("0 1 2 3", 4.0)):
        row = dict.fromkeys(header, 1) | {"groups": groups, "neurons_ids": "x"}
        for run in family.runs:
            files.write_csv(run.directory / "neuron_flipping.csv", tuple(header), [row])
        assert headline_numbers.layers_effective(family) == pytest.approx([expected] * 2)


def test_verdicts_go_by_each_seed(family):
    findings = {finding.claim.name: finding for finding in find([family])}
    for finding in findings.values():
        agreeing = [finding.claim.rule.holds(value) for value in finding.values]
        expected = (
            "not measured" if not agreeing else "not applicable" if finding.reason
            else "agrees" if all(agreeing)
            else "differs" if not any(agreeing) else f"{sum(agreeing)} of 2 seeds agree"
        )  # fmt: skip
        assert finding.verdict == expected
    assert len({finding.verdict for finding in findings.values()}) >= 3
    assert findings["flipping.auc_neurons"].verdict == "not measured"


def test_a_network_that_memorized_nothing_agrees_with_no_claim_about_memorized_examples(family):
    for run in family.runs:
        rows = [
            dict.fromkeys(HISTORY, 0.5) | {"epoch": t, "acc_noisy": 0.17} for t in range(EPOCHS + 1)
        ]
        files.write_csv(run.history_path, HISTORY, rows)
    findings = find([family])
    assert {f.verdict for f in findings} == {"not applicable", "not measured"}
    reasons = {f.reason for f in findings if f.values}
    assert reasons == {"seed 1: 17% of the memorized set is fitted, less than 80%"}


def test_few_searched_examples_give_no_verdict(family):
    few = FLIPPING.read(family.runs[0].directory)
    FLIPPING.write(family.runs[1].directory, few[: 2 * 19])
    verdicts = {f.claim.name: f for f in find([family]) if f.values}
    assert verdicts["flipping.neurons_noisy"].verdict == "not applicable"
    assert "seed 2: 19 searched" in verdicts["flipping.neurons_noisy"].reason
    assert not verdicts["rewinding.not_last"].reason


def test_layers_that_are_alike_at_initialization_say_nothing_about_the_last(family):
    for run, spread in zip(family.runs, (0.2, 0.09)):
        rows = REWINDING.read(run.directory)
        for row in rows:
            row["acc_noisy"] = 0.1 + spread * (row["group"] == LAYERS - 1)
        REWINDING.write(run.directory, rows)
    found = {f.claim.name: f for f in find([family])}
    for name in ("rewinding.not_last", "rewinding.same_layers"):
        assert found[name].verdict == "not applicable"
        assert found[name].reason.startswith("seed 2: with a layer at initialization")
    assert found["rewinding.last_layer"].verdict != "not applicable"


@pytest.mark.parametrize(
    ("before_noisy", "clean", "reason"),
    [
        (0.7, 0.9, "70% of the memorized set is fitted"),
        (0.9, 0.7, "clean accuracy after dropping is 70%"),
        (0.9, 0.8, ""),
    ],
)
def test_a_smaller_gap_counts_while_clean_examples_are_kept(tiny, before_noisy, clean, reason):
    run = Run.of(tiny("dropout.kind=example_tied"))
    rows = [
        dict.fromkeys(DROPOUT.columns, 0.5)
        | {"dropout": "example_tied", "state": state, "acc_clean": accuracy}
        | {"acc_noisy": noisy, "acc_test": test}
        for state, accuracy, noisy, test in (
            ("before", 1.0, before_noisy, 0.6), ("after", clean, 0.1, 0.64),
        )
    ]  # fmt: skip
    DROPOUT.write(run.directory, rows)
    found = {f.claim.name: f for f in find([Family(run.directory.parent, (run,))])}
    gap, test = found["dropout.gap"], found["dropout.test"]
    assert gap.values == pytest.approx([(clean - 0.64) - (1.0 - 0.6)])
    assert test.values == pytest.approx([0.04])
    assert bool(gap.reason) == bool(reason)
    assert gap.reason.partition(": ")[2].startswith(reason)
    assert gap.verdict == ("not applicable" if reason else "agrees")
    assert test.verdict == ("not applicable" if before_noisy < 0.8 else "agrees")


def test_nineteen_of_twenty_are_95_percent():
    (rule,) = (claim.rule for claim in CLAIMS if claim.name == "gradients.norm_ratio_epochs")
    assert rule.holds(19 / 20)
    assert rule.holds(0.95)
    assert not rule.holds(18.9 / 20)


def test_the_table_of_claims_says_what_each_was_measured_on(family):
    for run, device in zip(family.runs, ("one GPU", "another")):
        files.write_json(run.provenance_path, {"device": device})
    findings = find([family])
    table = table_claims(findings)
    assert len(table.rows) == len(findings) > 10
    ratio = next(
        row for row in table.rows if row[0].startswith("Gradient norm of the noisy examples")
    )
    values = headline_numbers.norm_ratio(family)
    mean, std = statistics.mean(values), statistics.stdev(values)
    (finding,) = [f for f in findings if f.claim.name == "gradients.norm_ratio"]
    judged = (finding.verdict, "from 0.67 to 1.5")
    expected = (f"{mean:.2f} ± {std:.2f}", "2", *judged, family.title, "another; one GPU")
    assert ratio[2:] == expected
    (area,) = [row for row in table.rows if row[1] == "0.89"]
    assert area[2:4] == ("-", "-"), "not measured"


def test_claims_have_names_and_rules_of_their_own():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.experiment for claim in CLAIMS} == {
        "gradients", "rewinding", "retraining", "flipping", "dropout", "atypical",
    }  # fmt: skip
    for claim in CLAIMS:
        far = [-1e9, -0.76, -0.5, 0.01, 0.3, 0.96, 1.0, 4.0, 1e9]
        assert len({claim.rule.holds(value) for value in far}) == 2, f"{claim.name} cannot fail"


def test_a_trend_is_over_runs_that_differ_in_nothing_else(tiny_file):
    def family(p_gen: float, p_mem: float, *noisy: float) -> Family:
        settings = [f"dropout.p_gen={p_gen}", f"dropout.p_mem={p_mem}"]
        seeds = f"seed={list(range(len(noisy)))}"
        configs = load_configs(tiny_file, ["dropout.kind=example_tied", *settings, seeds])
        runs = tuple(map(Run.of, configs))
        for run, accuracy in zip(runs, noisy):
            row = {"dropout": "example_tied", "p_gen": p_gen, "p_mem": p_mem, "state": "after"}
            row |= {"acc_clean": p_gen, "acc_noisy": accuracy, "acc_test": 0.5}
            rows = [row, row | {"state": "before", "acc_noisy": 0.9}]
            DROPOUT.write(run.directory, rows)
        return Family(runs[0].directory.parent, runs)

    families = [
        family(0.6, 0.2, 0.1, 0.9, 0.5),  # the third seed is not everywhere
        family(0.2, 0.2, 0.3, 0.2),
        family(0.4, 0.2, 0.2, 0.4),
        family(0.3, 0.1, 0.9),
    ]
    (group,) = families_over("dropout.p_gen", families)
    assert [one.config.dropout.p_gen for one in group] == [0.2, 0.4, 0.6]
    assert len(alike(families, r"dropout\..*", 4)) == 1
    found = {f.claim.name: f for f in find(families) if f.claim.over}
    assert found["dropout.clean_over_p_gen"].values == (pytest.approx(1), pytest.approx(1))
    assert found["dropout.clean_over_p_gen"].verdict == "agrees"
    assert found["dropout.noisy_over_p_gen"].values == (pytest.approx(-1), pytest.approx(1))
    assert found["dropout.noisy_over_p_gen"].verdict == "1 of 2 seeds agree"


def test_a_noise_rate_of_zero_takes_no_part_in_a_trend(tiny):
    def family(rate: float) -> Family:
        run = planted(tiny, 0, f"data.noise_rate={rate}")
        rows = rows_of(run, "gradient_accounting.csv")
        rows = [row | {"norm_noisy": rate * float(row["norm_clean"]) or math.nan} for row in rows]
        files.write_csv(run.directory / "gradient_accounting.csv", ACCOUNTS, rows)
        return Family(run.directory.parent, (run,))

    families = [family(rate) for rate in (0, 0.1, 0.2, 0.3)]
    (finding,) = (f for f in find(families) if f.claim.over == "data.noise_rate")
    assert finding.values == (pytest.approx(1),)
    words = "glyphs 150, resnet9 width 0.05"
    assert finding.about == f"{words}, data.noise_rate from 0.1 to 0.3"


def test_trends_of_several_networks_are_told_apart(tiny):
    families = [
        Family(run.directory.parent, (run,))
        for width in (0.05, 0.1)
        for peak in (0.1, 0.2)
        for rate in (0.1, 0.2, 0.3)
        for run in [planted(tiny, 0, *(f"{key}={value}" for key, value in {
            "model.width": width, "train.peak_lr": peak, "data.noise_rate": rate}.items()))]
    ]  # fmt: skip
    about = {f.about for f in find(families) if f.claim.name == "gradients.over_noise_rates"}
    over = "data.noise_rate from 0.1 to 0.3"
    assert about == {
        f"glyphs 150, resnet9 width {width}, {over}, train.peak_lr={peak}"
        for width in (0.05, 0.1)
        for peak in (0.1, 0.2)
    }


def test_thirty_trainings_do_not_take_all_their_subsets(family):
    many = replace(family, runs=family.runs * 15)
    assert [row[4] for row in table_stability([many]).rows] == [f"{k} of 30" for k in range(1, 31)]
    assert _choices(4, 2) == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    chosen = _choices(30, 15)
    assert len(chosen) == CHOICES
    assert all(len({*own}) == 15 and {*own} <= {*range(30)} for own in chosen)
    assert len(set(map(tuple, chosen))) == CHOICES


def test_stability_is_over_all_choices_of_trainings(family):
    rows = table_stability([family]).rows
    tables = [
        {r["example"]: (float(r["neurons"]) if r["flipped"] == "1" else MOST + 1, r["memorized"])
         for r in rows_of(run, "neuron_flipping.csv")}
        for run in family.runs
    ]  # fmt: skip

    def slow_area(counts: dict) -> float:
        pairs = [
            1 if a < b else 0.5 if a == b else 0
            for a, kind_a in counts.values() if kind_a == "1"
            for b, kind_b in counts.values() if kind_b == "0"
        ]  # fmt: skip
        return statistics.mean(pairs)

    def slow_agreement(kind: str) -> float:
        """Pearson's correlation of mean ranks."""
        pairs = [(tables[0][i][0], tables[1][i][0]) for i in tables[0] if tables[0][i][1] == kind]
        ranks = [
            [sum(y < x for y in own) + sum(y == x for y in own) / 2 for x in own]
            for own in zip(*pairs)
        ]
        return np.corrcoef(*ranks)[0, 1]

    assert rows[0][2:4] == tuple(f"{slow_agreement(kind):.2f}" for kind in "01")
    assert rows[1][2:4] == ("", "")
    both = {i: ((tables[0][i][0] + tables[1][i][0]) / 2, tables[0][i][1]) for i in tables[0]}
    single = statistics.mean(map(slow_area, tables))
    assert [row[4:] for row in rows] == [
        ("1 of 2", f"{single:.3f}"), ("2 of 2", f"{slow_area(both):.3f}"),
    ]  # fmt: skip


def test_numbers_that_no_example_gave_are_none(family):
    """Neither of runs without noisy examples, nor of those that learned none of them."""
    for run in family.runs:
        accounts = files.read_csv(run.directory / "gradient_accounting.csv", ACCOUNTS)
        without = [row | {"norm_noisy": 0.0, "cosine": np.nan} for row in accounts]
        files.write_csv(run.directory / "gradient_accounting.csv", ACCOUNTS, without)
        columns = ("group", "epoch", "acc_clean", "acc_noisy", "acc_train")
        retrained = files.read_csv(run.directory / "layer_retraining.csv", columns)
        without = [row | {"acc_noisy": np.nan} for row in retrained]
        files.write_csv(run.directory / "layer_retraining.csv", columns, without)
        searched = FLIPPING.read(run.directory)
        FLIPPING.write(run.directory, [r for r in searched if r["memorized"] == 0])
    verdicts = {finding.claim.name: finding.verdict for finding in find([family])}
    about_noisy = [
        name for name in verdicts
        if name.partition(".")[0] in ("gradients", "retraining", "flipping")
    ]  # fmt: skip
    assert len(about_noisy) >= 12
    assert {verdicts[name] for name in about_noisy} == {"not measured"}
