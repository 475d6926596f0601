"""Search of many examples at once against the slow, obvious way, in one process.

    python benchmarks/flipping.py [key.path=value ...] [--examples 60] [--slow 2]

Trains a run in a temporary folder (or takes the run whose directory `--run` names), searches
`--examples` memorized and as many clean examples with the settings of the configuration, and the
first `--slow` of each in the slow way: a fresh copy of the model for each, one forward and backward
pass of the whole model for every neuron, and an accuracy on all remaining examples at the end. The
slow examples take turns with the fast ones. README.md beside this file says how to read it.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import REPOSITORY, make_parser
from torch import Tensor, nn

import gradient_accounting
from data import Split, normalize
from engine.flipping import cached_passes
from engine.flipping.gates import neuron_sites
from engine.flipping.search import best_gates
from engine.launch.cli import find_runs
from engine.runs.provenance import describe_device
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import evaluate
from neuron_flipping import (
    choose_searched,
    compute_flipping,
    draw_rows,
    noisy_copies,
)

BATCH = 500  # images in one pass of the slow way


class SlowSearch:
    """One example at a time, on a copy of the model with a parameter for each gate."""

    def __init__(self, run: Run, split: Split, model: nn.Module) -> None:
        self.run, self.split, self.original = run, split, copy.deepcopy(model)
        settings = run.config.flipping
        rows = draw_rows("flipping reference", run.config.seed, split.n, settings.reference_batch)
        self.reference = torch.cat([self.copies_of(row) for row in rows.tolist()])
        self.reference_label = split.label[rows.to(split.label.device)]

    def copies_of(self, row: int) -> Tensor:
        settings, split = self.run.config.flipping, self.split
        return noisy_copies(
            normalize(split.images[row]), int(split.index[row]), self.run.config.seed,
            settings.noise_copies, settings.noise_ratio,
        )  # fmt: skip

    def gated_copy(self) -> None:
        self.model = copy.deepcopy(self.original).requires_grad_(True).eval()
        self.gates, self.weight = [], None
        for site in neuron_sites(self.model, self.run.config.flipping.ablate):
            gate = nn.Parameter(torch.ones(site.shape, device=self.reference.device))
            self.gates.append(gate)
            if site.of_weights:
                self.weight = (site.module, site.module.weight.detach())
                site.module.register_forward_hook(
                    lambda layer, inputs, output, gate=gate: F.linear(
                        inputs[0], layer.weight * gate, layer.bias
                    )
                )
            else:
                site.module.register_forward_hook(
                    lambda layer, inputs, output, gate=gate: output * gate[:, None, None]
                )

    def backward(self, images: Tensor, label: Tensor, weight: float) -> Tensor:
        """Accumulate the gradient of weight * the mean loss; the averaged outputs."""
        copies, outputs = self.run.config.flipping.noise_copies, []
        size = BATCH // copies * copies
        for part, own in zip(images.split(size), label.split(size // copies)):
            output = cached_passes.mean_output(self.model(part), copies)
            loss = F.cross_entropy(output, own, reduction="sum") / len(label)
            (weight * loss).backward()
            outputs.append(output.detach())
        return torch.cat(outputs)

    def search(self, row: int) -> int:
        """The number of neurons, with the accuracy on the remaining set before and after."""
        split, settings = self.split, self.run.config.flipping
        self.gated_copy()
        others = torch.arange(split.n, device=split.label.device) != row
        evaluate(self.model, split.images[others], split.label[others])
        images, label, closed = self.copies_of(row), split.label[row : row + 1], []
        while True:
            self.model.zero_grad()
            for gate in self.gates:
                gate.grad = None
            output = self.backward(images, label, 1.0)
            if int(output.argmax()) != int(label) or len(closed) == settings.max_neurons:
                break
            self.backward(self.reference, self.reference_label, -1.0)
            score = -torch.cat([gate.grad.flatten() for gate in self.gates])
            closed += best_gates(score[None], [closed])
            place = closed[-1]
            with torch.no_grad():
                for gate in self.gates:
                    if place < gate.numel():
                        gate.view(-1)[place] = 0
                        break
                    place -= gate.numel()
        evaluate(self.model, split.images[others], split.label[others])
        return len(closed)


class Clock:
    """Seconds spent inside of some functions; of the processor's own time where that is a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.now = time.perf_counter if self.on_gpu else time.process_time
        self.seconds, self.calls = Counter(), Counter()

    def around(self, name: str, work: Callable) -> Callable:
        def timed(*arguments: object) -> object:
            began = self.now()
            result = work(*arguments)
            if self.on_gpu:
                torch.cuda.synchronize()
            self.seconds[name] += self.now() - began
            self.calls[name] += 1
            return result

        return timed


def measure(run: Run, count: int, slow_count: int) -> None:
    device = resolve_device(run.config)
    split = load_split(run.config).to(device)
    model = load_final_model(run, split, device).eval().requires_grad_(False)
    correct = evaluate(model, split.images, split.label).correct.cpu()
    rows = choose_searched(split, correct, count)
    half, clock = len(rows) // 2, Clock(device)
    every = max(1, half // slow_count)
    slow_rows = [*rows[:half:every][:slow_count], *rows[half::every][:slow_count]]
    slow_search = clock.around("slow", SlowSearch(run, split, model).search)
    for name in ("ReferenceGradient", "Correctness"):
        owner = getattr(cached_passes, name)
        owner._compute = clock.around(name, owner._compute)

    turns = {round(len(rows) * (k + 1) / (len(slow_rows) + 1)): r for k, r in enumerate(slow_rows)}
    neurons, slow_neurons = {}, {}
    fast = compute_flipping(run, split, model, rows)
    search_next = clock.around("fast", lambda: next(fast))
    for done in range(len(rows)):
        result = search_next()
        neurons[result["example"]] = result["neurons"]
        if done in turns:
            slow_neurons[int(split.index[turns[done]])] = slow_search(turns[done])
    fast_each, slow_each = clock.seconds["fast"] / len(rows), clock.seconds["slow"] / len(slow_rows)
    print(f"{describe_device(device)}, torch {torch.__version__}, {run.config.flipping}")
    print(f"fast: {len(rows)} examples of {statistics.mean(neurons.values()):.2f} neurons")
    print(
        f"slow: {len(slow_rows)} of them, of {statistics.mean(slow_neurons.values()):.2f} neurons"
    )
    print(f"fast {fast_each:.2f} s an example, slow {slow_each:.2f} s: {slow_each / fast_each:.1f}")
    fast_each /= statistics.mean(neurons.values())
    slow_each /= statistics.mean(slow_neurons.values())
    print(f"fast {fast_each:.2f} s a neuron, slow {slow_each:.2f} s: {slow_each / fast_each:.1f}")
    for name in ("ReferenceGradient", "Correctness"):
        share = clock.seconds[name] / clock.seconds["fast"]
        print(f"  {name}: computed {clock.calls[name]} times, {share:.0%} of the fast time")
    differing = {
        example: (neurons[example], number)
        for example, number in slow_neurons.items()
        if neurons[example] != number
    }
    print(
        f"the same numbers of neurons: {len(slow_neurons) - len(differing)} of {len(slow_neurons)}"
    )
    if differing:
        sys.exit(f"other numbers of neurons, fast and slow, by example: {differing}")


def main() -> None:
    parser = make_parser(__doc__, rounds=None)
    parser.add_argument("--run", help="the directory of a finished run")
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--slow", type=int, default=2)
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        quickstart = str(REPOSITORY / "configs" / "quickstart.yaml")
        trained = [quickstart, [f"output_dir={folder}", *given.overrides]]
        (run,) = find_runs(*([given.run, given.overrides] if given.run else trained))
        if not given.run:
            gradient_accounting.EXPERIMENT.main(run)
        with compute_precision(run.config.precision, resolve_device(run.config)):
            measure(run, given.examples, given.slow)


if __name__ == "__main__":
    main()
