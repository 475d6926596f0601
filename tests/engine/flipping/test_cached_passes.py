"""Passes that start from kept states agree with whole passes, whatever is kept."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from data import Examples
from engine.flipping import cached_passes
from engine.flipping.cached_passes import Correctness, ReferenceGradient
from engine.flipping.gates import Gates
from models.folding import folded
from tests.flipping_problems import EVERYTHING, Problem
from tests.slow_neurons import SlowNeurons, make


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
    model, given = problem.model.float(), problem.reference
    with Gates(model) as gates:
        copies = Examples(given.images.float(), given.label)
        reference = ReferenceGradient(model, gates, copies, EVERYTHING)
        correct = Correctness(model, gates, problem.examples, EVERYTHING)
        kept = [weakref.ref(reference), weakref.ref(correct)]
        reference.of([3])
        correct.accuracy({3})
        gc.disable()
        try:
            del reference, correct
            assert [ref() for ref in kept] == [None, None]
        finally:
            gc.enable()


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "vit_small"])
def test_the_reference_gradient_of_any_set_of_closed_gates(name):
    """With states and graphs that were kept, which no later pass may have changed."""
    model = make(name).double().requires_grad_(False)
    images = torch.rand(2, 2, 1, 20, 20, dtype=torch.float64) - 0.5
    label = torch.tensor([3, 1])
    fresh = copy.deepcopy(model)
    with Gates(model) as gates:
        reference = ReferenceGradient(model, gates, Examples(images, label), EVERYTHING)
        assert len(reference.graphs) == len(reference.batches)
        lowest, middle = gates.sites[0].first, gates.sites[len(gates.sites) // 2].first + 1
        for closed in ([gates.count - 1], [middle, gates.count - 2], [lowest, middle], []):
            slow = SlowNeurons(fresh, name, "activation")
            for gate in closed:
                slow.close(gate)
            expected = slow.gradient(F.cross_entropy(slow.averaged(images), label))
            found = reference.of(closed).clone()
            found[closed], expected[closed] = 0, 0
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("memory", [0, 100_000, EVERYTHING])
@pytest.mark.parametrize("name", ["resnet9", "vit_small"])
def test_accuracy_on_the_remaining_examples(name, memory):
    problem = Problem(name)
    model = problem.model.float()
    fresh = copy.deepcopy(model)
    with Gates(model) as gates:
        correctness = Correctness(model, gates, problem.examples, memory)
        # Many at once, so that predictions change.
        lower_half = [*range(0, gates.sites[3].first, 2), gates.count - 2]
        seen = set()
        for closed in ([], [*range(1, 4)], [*range(gates.count - 60, gates.count)], lower_half):
            slow = SlowNeurons(fresh, name, "activation")
            for gate in closed:
                slow.close(gate)
            seen.add(correctness.accuracy(closed))
            for row in (0, 35):
                expected = slow.accuracy(problem.images, problem.label, row)
                assert correctness.accuracy(closed, row) == pytest.approx(expected)
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


def saved_by_graph(outputs: list[torch.Tensor]) -> dict[int, int]:
    """Walk a graph from its outputs and return the bytes of every storage that a node saved."""
    found, waiting, seen = {}, [output.grad_fn for output in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            number = getattr(value, "dtype", None) == torch.float64  # a Python number of the code
            if isinstance(value, torch.Tensor) and not number:
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "vit_small"])
def test_the_bytes_of_a_pass_are_those_that_its_graph_saved(name):
    model = folded(make(name))
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    images = torch.rand(3, 1, 20, 20)
    with Gates(model) as gates:
        gates.close([()])
        output = model(images)
        taps = gates.take_taps()
        found = saved_by_graph([output])
        for tensor in [output, *(t for tap in taps for t in (tap.value, tap.output))]:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        expected = sum(count for place, count in found.items() if place not in own)
        del output, taps
        assert cached_passes.bytes_each(model, gates, images) == expected
