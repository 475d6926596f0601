"""The search agrees with a slow, obvious one, finds what was planted, and always ends."""

import copy
import gc
import math
import weakref
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import example_tied_dropout
import gradient_accounting
import neuron_flipping
from data import normalize
from engine.errors import UserError
from engine.flipping import cached_passes
from engine.flipping.cached_passes import Correctness, ReferenceGradient
from engine.flipping.fold import folded
from engine.flipping.gates import Gates
from engine.flipping.search import Candidate, best_gates, search
from engine.launch.cli import run_script
from engine.runs import files
from engine.runs.run import Run
from engine.stats import compute_area
from engine.training.build import load_final_model, load_split
from engine.training.evaluation import evaluate
from neuron_flipping import (
    DETECTION,
    FLIPPING,
    MEANS,
    choose_searched,
    compute_flipping,
    noisy_copies,
)
from tests.slow_neurons import NOT_OURS, SlowNeurons, make, slow_search

TRAINED = (
    "data.train_size=80", "model.width=0.12", "train.epochs=20", "train.batch_size=16",
    "train.peak_epoch=5",
)  # fmt: skip
VIT = (
    "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=2", "model.heads=2",
    "model.dim_head=8", "model.mlp_dim=16",
)  # fmt: skip
# Steps, learning rate and weight decay, such that examples flip with one to eight neurons.
FIT = {
    "resnet9": (150, 0.001, 0),
    "single_conv": (400, 0.01, 0.01),
    "vit_small": (60, 0.01, 0),
    "pre_activation": (400, 0.01, 0.001),
    "mixed": (200, 0.01, 0),
    "resnet18": (100, 0.002, 0),
}
EVERYTHING = 1e12  # bytes of memory: enough to keep everything
SMALL = (
    "flipping.examples=4", "flipping.reference_batch=20", "flipping.noise_copies=2",
    "flipping.max_neurons=8",
)  # fmt: skip


@lru_cache
def fitted(name: str) -> tuple:
    """A small model that learned 40 images: every second one of a pattern, the others by heart."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (40, 1, 20, 20), generator=generator, dtype=torch.uint8)
    label = torch.randint(3 if name in NOT_OURS else 10, (40,), generator=generator)
    patterns = torch.randint(256, (10, 1, 5, 5), generator=generator, dtype=torch.uint8)
    images[::2] = images[::2] // 4 + patterns.tile(1, 1, 4, 4)[label[::2]] // 4 * 3
    model = make(name)
    steps, rate, decay = FIT[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    for _ in range(steps):
        loss = F.cross_entropy(model(normalize(images)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    label[:20] = model(normalize(images[:20])).argmax(1)
    return model.double().requires_grad_(False), images, label


class Problem:
    """A small model, and examples that it predicts as they are labeled."""

    def __init__(self, name: str, count: int = 6, copies: int = 3):
        model, self.images, self.label = fitted(name)
        self.model = copy.deepcopy(model)
        clean = normalize(self.images).double()
        self.copies = torch.stack(
            [noisy_copies(image, i, 7, copies, 0.05) for i, image in enumerate(clean)]
        )
        self.reference = self.copies[28:], self.label[28:]
        self.rows = range(count)

    def candidates(self):
        return (Candidate(row, self.label[row], self.copies[row]) for row in self.rows)

    def search(self, ablate, chunk, most, memory=EVERYTHING, **options):
        model = folded(self.model)  # as real searches do
        with Gates(model, ablate) as gates:
            reference = ReferenceGradient(model, gates, *self.reference, memory)
            found = search(model, gates, reference, self.candidates(), chunk, most, **options)
            return {c.row: (c.closed, flipped) for c, flipped in found}


# ---------------------------------------------------------------- against the slow way


@pytest.mark.parametrize("ablate", ["activation", "weight"])
@pytest.mark.parametrize(
    "name", ["resnet9", "single_conv", "vit_small", "resnet18", "pre_activation", "mixed"]
)
def test_same_gates_as_the_slow_search(name, ablate):
    problem = Problem(name)
    expected = {}
    for row in problem.rows:
        image, label = problem.copies[row], problem.label[row]
        closed, flipped, _ = slow_search(
            problem.model, name, ablate, image, label, *problem.reference, most=9
        )
        expected[row] = closed, flipped
    assert len({tuple(closed) for closed, _ in expected.values()}) > 1
    assert max(len(closed) for closed, _ in expected.values()) > 1
    assert problem.search(ablate, chunk=4, most=9) == expected


@pytest.mark.parametrize("name", ["resnet9", "vit_small"])
def test_neither_chunks_nor_memory_show_in_the_results(name, monkeypatch):
    problem = Problem(name)
    monkeypatch.setattr(cached_passes, "ROWS", {"cpu": 15})  # several batches
    expected = problem.search("activation", chunk=1, most=8)
    for chunk, memory in ((3, EVERYTHING), (100, EVERYTHING), (4, 0), (4, 200_000)):
        assert problem.search("activation", chunk, 8, memory) == expected, (chunk, memory)


def test_a_pass_takes_fewer_images_of_a_larger_model(monkeypatch):
    """A batch is cut by what autograd would keep of it, and cutting shows nowhere."""
    problem = Problem("resnet9")
    expected = problem.search("activation", chunk=4, most=8)
    with Gates(problem.model) as gates:
        one = problem.copies[0, :1]
        each = cached_passes.bytes_each(problem.model, gates, one)
        for room, rows in ((3 * each, 3), (1, 1), (1 << 40, cached_passes.ROWS["cpu"])):
            monkeypatch.setitem(cached_passes.PASS_BYTES, "cpu", room)
            assert cached_passes.rows_at_once(problem.model, gates, one) == rows
    monkeypatch.setitem(cached_passes.PASS_BYTES, "cpu", 1)
    assert problem.search("activation", chunk=4, most=8) == expected


def test_what_was_kept_is_let_go_of_at_once():
    """Without Python's garbage collector, which knows nothing of a GPU's memory."""
    problem = Problem("resnet9")
    model, (images, label) = problem.model.float(), problem.reference
    with Gates(model) as gates:
        reference = ReferenceGradient(model, gates, images.float(), label, EVERYTHING)
        correct = Correctness(model, gates, problem.images, problem.label, EVERYTHING)
        kept = [weakref.ref(reference), weakref.ref(correct)]
        reference.of(frozenset({3}))
        correct.of(frozenset({3}))
        gc.disable()
        try:
            del reference, correct
            assert [ref() for ref in kept] == [None, None]
        finally:
            gc.enable()


def test_in_float32_too():
    """The precision of real runs, where nothing is exact but the results must be the same."""
    problem = Problem("resnet9")
    problem.model = problem.model.float()
    problem.copies = problem.copies.float()
    problem.reference = problem.copies[28:], problem.label[28:]
    expected = {}
    for row in problem.rows:
        closed, flipped, _ = slow_search(
            problem.model, "resnet9", "activation", problem.copies[row], problem.label[row],
            *problem.reference, most=8,
        )  # fmt: skip
        expected[row] = closed, flipped
    for chunk in (1, 4):
        assert problem.search("activation", chunk, 8) == expected


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "vit_small"])
def test_the_reference_gradient_of_any_set_of_closed_gates(name):
    """With states and graphs that were kept, which no later pass may have changed."""
    model = make(name).double().requires_grad_(False)
    images = torch.rand(2, 2, 1, 20, 20, dtype=torch.float64) - 0.5
    label = torch.tensor([3, 1])
    fresh = copy.deepcopy(model)
    with Gates(model) as gates:
        reference = ReferenceGradient(model, gates, images, label, EVERYTHING)
        assert len(reference.graphs) == len(reference.batches)
        lowest, middle = gates.sites[0].first, gates.sites[len(gates.sites) // 2].first + 1
        for closed in ([gates.count - 1], [middle, gates.count - 2], [lowest, middle], []):
            slow = SlowNeurons(fresh, name, "activation")
            for gate in closed:
                slow.close(gate)
            expected = slow.gradient(F.cross_entropy(slow.averaged(images), label))
            found = reference.of(frozenset(closed)).clone()
            found[closed], expected[closed] = 0, 0
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("memory", [0, 100_000, EVERYTHING])
@pytest.mark.parametrize("name", ["resnet9", "vit_small"])
def test_accuracy_on_the_remaining_examples(name, memory):
    problem = Problem(name)
    model = problem.model.float()
    fresh = copy.deepcopy(model)
    with Gates(model) as gates:
        correctness = Correctness(model, gates, problem.images, problem.label, memory)
        # Many at once, so that predictions change.
        lower_half = [*range(0, gates.sites[3].first, 2), gates.count - 2]
        seen = set()
        for closed in ([], [*range(1, 4)], [*range(gates.count - 60, gates.count)], lower_half):
            slow = SlowNeurons(fresh, name, "activation")
            for gate in closed:
                slow.close(gate)
            correct = correctness.of(frozenset(closed))
            seen.add(int(correct.sum()))
            for row in (0, 35):
                kept = torch.arange(40) != row
                expected = slow.accuracy(problem.images, problem.label, row)
                assert correct[kept].double().mean().item() == pytest.approx(expected)
        assert len(seen) > 2


def test_a_known_gradient_is_not_computed_again(monkeypatch):
    problem, computed = Problem("resnet9", count=20), []
    compute = ReferenceGradient._compute

    def counting(self, closed):
        computed.append(closed)
        return compute(self, closed)

    monkeypatch.setattr(ReferenceGradient, "_compute", counting)
    found = problem.search("activation", chunk=3, most=4)
    wanted = {
        frozenset(closed[:k])
        for closed, flipped in found.values()
        for k in range(len(closed) + 1 if not flipped and len(closed) < 4 else len(closed))
    }
    assert len(computed) == len(set(computed))
    assert set(computed) == wanted
    assert len(wanted) < sum(len(closed) for closed, _ in found.values())


def test_a_stale_reference_is_used_between_refreshes():
    problem = Problem("resnet9")
    exact = problem.search("activation", chunk=4, most=6)
    assert problem.search("activation", chunk=4, most=6, refresh=1) == exact
    stale = problem.search("activation", chunk=4, most=6, refresh=100)
    assert all(stale[row][0][:1] == exact[row][0][:1] for row in exact)
    assert stale != exact


# ---------------------------------------------------------------- what was planted


@pytest.mark.parametrize("ablate", ["activation", "weight"])
@pytest.mark.parametrize("kind", ["channel", "weight"])
def test_a_planted_neuron_is_found_first_and_alone(kind, ablate):
    """Channel 5, or the weight of class 2 for channel 5, alone carries the label of one example.

    The example has a bright spot, which only channel 5 responds to; all other channels are constant
    and vote for class 1.
    """
    model = make("single_conv").requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.conv.bias[:] = 0.2
    model.conv.weight[5, 0] = -0.05
    model.conv.weight[5, 0, 1:4, 1:4] = 0.2
    model.linear.weight[1] = 0.3
    if kind == "channel":  # silent on all other examples
        model.conv.bias[5] = -1.0
        model.linear.weight[:, 5] = 0
        model.linear.weight[2, 5] = 15.0
    else:  # which holds up the other examples' label with another weight
        model.conv.bias[5] = 1.0
        model.linear.weight[1, 5] = 5.0
        model.linear.weight[2, 5] = 8.0
        model.linear.bias[2] = -4.0
    plain = torch.full((16, 1, 20, 20), 0.5)
    odd = plain[:1].clone()
    odd[:, :, 6:11, 6:11] = 12.0
    assert int(model(odd).argmax()) == 2
    label = model(plain).argmax(1)
    assert (label == 1).all()
    with Gates(model, ablate) as gates:
        reference = ReferenceGradient(model, gates, plain[:, None], label, EVERYTHING)
        candidate = Candidate(0, torch.tensor(2), odd)
        ((found, flipped),) = search(model, gates, reference, [candidate], 8, 20)
        names = [gates.site_of(gate).describe(gate) for gate in found.closed]
    assert flipped
    assert names == [{"channel": "conv:5", "weight": "linear:2:5"}[kind]]


def test_equal_scores_go_to_the_lowest_gate():
    score = torch.tensor([1.0, 2.0, 2.0001, 2.0])
    scores = torch.stack([score, score, -score, torch.zeros(4)])
    assert best_gates(scores, [[], [1], [], [0, 1]]) == [1, 2, 0, 2]
    assert best_gates(scores, [[]] * 4) == [1, 1, 0, 0]


# ---------------------------------------------------------------- who is searched, and the noise


def test_noise_has_the_asked_for_size_and_is_the_examples_own():
    image = torch.rand(3, 8, 8) - 0.5
    first, again, other = (noisy_copies(image, i, 0, 4, 0.1) - image for i in (3, 3, 4))
    torch.testing.assert_close(first.flatten(1).norm(dim=1), 0.1 * image.norm().expand(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(noisy_copies(image, 3, 0, 2, 0.0), image.expand(2, -1, -1, -1))


def test_chosen_are_only_those_predicted_as_trained(tiny):
    split = load_split(tiny())
    correct = torch.arange(split.n) % 3 != 0
    rows = choose_searched(split, correct, 12)
    assert len(set(rows)) == 24
    assert correct[rows].all()
    assert split.memorized[rows].tolist() == [True] * 12 + [False] * 12
    fewer = choose_searched(split, correct, 5)
    assert fewer == rows[:5] + rows[12:17]
    assert sum(split.memorized[choose_searched(split, correct, 10_000)]) == sum(
        split.memorized & correct
    )


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the tiny configuration, trained once; tests measure on copies of their own."""
    return {}


@pytest.fixture
def run_of(tiny, trained, tmp_path):
    """A finished run with these settings, in a folder of its own."""
    import shutil

    def make_run(*overrides: str) -> Run:
        trains = tuple(o for o in overrides if not o.startswith("flipping."))
        if trains not in trained:
            run = Run.of(tiny(*TRAINED, *trains))
            gradient_accounting.EXPERIMENT.main(run)
            keep = shutil.copytree(run.directory, run.directory.parents[2] / f"kept{len(trained)}")
            shutil.rmtree(run.directory)
            trained[trains] = keep
        run = Run.of(tiny(*TRAINED, *overrides))
        if not run.directory.exists():
            shutil.copytree(trained[trains], run.directory)
        return run

    return make_run


def results(run: Run) -> list[dict]:
    return FLIPPING.read(run.directory)


def test_a_run_against_the_slow_way(run_of):
    run = run_of(*SMALL)
    neuron_flipping.EXPERIMENT.main(run)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu")).eval()
    order = neuron_flipping.draw_rows("flipping reference", 0, split.n, 20)

    def copies(row):
        return noisy_copies(normalize(split.images[row]), int(split.index[row]), 0, 2, 0.01)

    reference = torch.stack([copies(row) for row in order.tolist()])
    rows = results(run)
    assert len(rows) == 8
    for result in rows[::2]:
        row = int((split.index == int(result["example"])).nonzero())
        closed, flipped, slow = slow_search(
            model, "resnet9", "activation", copies(row), split.label[row],
            reference, split.label[order], most=8,
        )  # fmt: skip
        assert (result["neurons"], result["flipped"]) == (len(closed), flipped)
        assert result["memorized"] == split.memorized[row]
        with Gates(model) as gates:
            sites = [gates.site_of(gate) for gate in closed]
        names = " ".join(site.describe(gate) for site, gate in zip(sites, closed))
        assert result["neurons_ids"] == names
        assert result["groups"] == " ".join(str(site.group) for site in sites)
        whole = SlowNeurons(model, "resnet9", "activation")
        before = whole.accuracy(split.images, split.label, row)
        after = slow.accuracy(split.images, split.label, row)
        assert result["acc_remaining_before"] == pytest.approx(before)
        assert result["acc_remaining_after"] == pytest.approx(after)


def test_a_killed_measurement_goes_on_and_ends_with_the_same_bytes(run_of, monkeypatch):
    run = run_of(*SMALL)
    neuron_flipping.EXPERIMENT.main(run)
    path = FLIPPING.path(run.directory)
    expected = path.read_bytes()
    path.unlink()
    parts = sorted((run.directory / "parts").glob("neuron_flipping-*/*.pt"))
    assert len(parts) == 8
    for part in parts[::2]:
        part.unlink()
    searched = []
    compute = neuron_flipping.compute_flipping

    def counting(run, split, model, rows):
        searched.extend(rows)
        return compute(run, split, model, rows)

    monkeypatch.setattr(neuron_flipping, "compute_flipping", counting)
    neuron_flipping.EXPERIMENT.main(run)
    assert path.read_bytes() == expected
    assert len(searched) == 4


def test_other_settings_measure_again_and_never_train(run_of, monkeypatch):
    run = run_of(*SMALL)
    first = neuron_flipping.EXPERIMENT.main(run)
    monkeypatch.setattr(gradient_accounting, "train_run", None)
    other = run_of(*SMALL[:3], "flipping.max_neurons=1")
    assert other.directory == run.directory
    neuron_flipping.EXPERIMENT.main(other)
    assert max(row["neurons"] for row in results(other)) == 1
    source = files.read_json(run.directory / "neuron_flipping.json")
    assert source["settings"]["max_neurons"] == 1
    assert neuron_flipping.EXPERIMENT.main(run) == first
    more = run_of("flipping.examples=5", *SMALL[1:])
    neuron_flipping.EXPERIMENT.main(more)
    assert len(results(more)) == 10


def test_a_search_that_gives_up_is_neither_dropped_nor_called_flipped(run_of):
    run = run_of(*SMALL[:3], "flipping.max_neurons=1")
    line = neuron_flipping.EXPERIMENT.main(run)
    rows = results(run)
    assert len(rows) == 8
    gave_up = [row for row in rows if not row["flipped"]]
    assert gave_up
    assert all(row["neurons"] == 1 for row in gave_up)
    assert "never flipped" in line
    means = {row["example"]: row["neurons"] for row in neuron_flipping.compute_means([run])}
    assert all(means[row["example"]] == 2 for row in gave_up)


def test_noise_that_flips_an_example_is_said(run_of):
    line = neuron_flipping.EXPERIMENT.main(run_of(*SMALL, "flipping.noise_ratio=5"))
    assert "misclassified under noise alone" in line


def test_every_gate_closed_ends_the_search():
    problem = Problem("single_conv", count=1, copies=1)
    problem.model.linear.bias[:] = 0
    problem.model.linear.bias[int(problem.label[0])] = 100.0
    found = problem.search("activation", chunk=4, most=10_000)
    with Gates(problem.model) as gates:
        closed, flipped = found[0]
        assert not flipped
        assert sorted(closed) == list(range(gates.count))


def test_without_memorized_examples(run_of):
    run = run_of(*SMALL, "data.noise_rate=0")
    assert "memorized: none" in neuron_flipping.EXPERIMENT.main(run)
    rows = DETECTION.read(run.directory)
    assert all(math.isnan(row["auc"]) for row in rows)


def test_without_checkpoints_or_without_a_run(run_of, tiny, tiny_file, capsys):
    run = run_of(*SMALL)
    run.checkpoint_path(20).unlink()
    with pytest.raises(UserError, match="is missing from a finished run"):
        neuron_flipping.EXPERIMENT.main(run)
    status = run_script(neuron_flipping.EXPERIMENT, "", [str(tiny_file), "seed=9"])
    assert status == 2
    assert "no such run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model",
    [
        "vit_small",
        pytest.param("resnet50", marks=pytest.mark.slow(reason="half a minute for a big model")),
    ],
)
def test_other_models(tiny, model):
    options = {"resnet50": ("model.width=1.0", "data.train_size=48"), "vit_small": VIT}[model]
    run = Run.of(
        tiny(f"model.name={model}", "train.epochs=1", *options, *SMALL[1:3],
             "flipping.examples=1", "flipping.max_neurons=2")
    )  # fmt: skip
    gradient_accounting.EXPERIMENT.main(run)
    neuron_flipping.EXPERIMENT.main(run)
    assert all(0 <= row["neurons"] <= 2 for row in results(run))


# ---------------------------------------------------------------- many runs, and detection


def test_many_runs_are_averaged(tiny_file, tiny, capsys):
    arguments = [str(tiny_file), "train.epochs=2", "seed=[0,1]", *SMALL]
    assert run_script(gradient_accounting.EXPERIMENT, "", arguments) == 0
    capsys.readouterr()
    status = run_script(neuron_flipping.EXPERIMENT, "", arguments)
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert len(lines) == 3
    assert "mean of 2 runs" in lines[-1]
    runs = [Run.of(tiny("train.epochs=2", f"seed={seed}", *SMALL)) for seed in (0, 1)]
    folder = runs[0].directory.parent
    means = MEANS.read(folder)
    first, second = ({row["example"]: row for row in results(run)} for run in runs)
    assert {row["example"] for row in means} == first.keys() & second.keys()
    for row in means:
        pair = first[row["example"]], second[row["example"]]
        expected = np.mean([r["neurons"] if r["flipped"] else 9 for r in pair])
        assert row["neurons"] == expected
        assert row["acc_remaining_after"] == pytest.approx(
            np.mean([r["acc_remaining_after"] for r in pair])
        )


def test_detection_of_a_run(run_of):
    run = run_of(*SMALL, "flipping.second_split=true")
    neuron_flipping.EXPERIMENT.main(run)
    path = run.directory / "mislabel_detection.csv"
    rows = DETECTION.read(path.parent)
    found = {(row["method"], row["on"]): row for row in rows}
    methods = {"neurons", "learning time", "summed loss", "forgetting time"}
    assert found.keys() == {(m, "searched") for m in methods} | {
        (m, "all") for m in methods - {"neurons"}
    }
    split = files.read_arrays(run.split_path, "memorized")["memorized"]
    loss = files.read_arrays(run.examples_path, "loss")["loss"].astype(float).sum(0)
    pairs = [(a > b) + (a == b) / 2 for a in loss[split] for b in loss[~split]]
    row = found["summed loss", "all"]
    assert row["auc"] == pytest.approx(np.mean(pairs))
    assert row["low"] <= row["auc"] <= row["high"]
    counts = [(r["memorized"], r["neurons"] if r["flipped"] else math.inf) for r in results(run)]
    memorized, clean = ([n for m, n in counts if m == kind] for kind in (1, 0))
    area = compute_area(-np.array(memorized), -np.array(clean), 0)
    assert found["neurons", "searched"]["auc"] == pytest.approx(area.auc)


def test_a_deleted_forgetting_time_is_measured_again(run_of):
    run = run_of(*SMALL, "flipping.second_split=true")
    neuron_flipping.EXPERIMENT.main(run)
    table = run.directory / "second_split.csv"
    before = table.read_bytes()
    table.unlink()
    assert not neuron_flipping.EXPERIMENT.is_done(run)
    neuron_flipping.EXPERIMENT.main(run)
    assert table.read_bytes() == before


def test_a_dry_run_searches_nothing(run_of):
    run = run_of(*SMALL)
    assert ": to do, " in neuron_flipping.EXPERIMENT.plan(run)
    neuron_flipping.EXPERIMENT.main(run)
    assert ": finished, " in neuron_flipping.EXPERIMENT.plan(run)


def test_compute_flipping_leaves_the_model_as_it_was(run_of):
    run = run_of(*SMALL)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu")).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    next(compute_flipping(run, split, model, [0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_example_keeps_its_own_mask_in_a_run_with_dropout(tiny):
    overrides = ["dropout.kind=example_tied", "model.width=0.1", "train.epochs=8"]
    overrides += ["flipping.examples=2", "flipping.noise_copies=2", "flipping.reference_batch=20"]
    run = Run.of(example_tied_dropout.without_accounting(tiny(*overrides)))
    example_tied_dropout.train(run, torch.device("cpu"))
    neuron_flipping.EXPERIMENT.main(run)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu"))
    correct = evaluate(model, split.images, split.label, index=split.index).correct
    assert not torch.equal(correct, evaluate(model, split.images, split.label).correct)
    found = neuron_flipping.read_results(run)
    assert len(found) > 2
    for example, row in found.items():
        others = correct[split.index != example].double().mean().item()
        assert row["acc_remaining_before"] == pytest.approx(others)
