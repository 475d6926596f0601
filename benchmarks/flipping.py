"""Search of many examples at once against the slow, obvious way, in one process.

    python benchmarks/flipping.py --full-width data.root=FOLDER [--examples 6] [--slow 3]
    python benchmarks/flipping.py [key.path=value ...] [--examples 60] [--slow 2]

Trains a run in a temporary folder (or takes the run whose directory `--run` names), searches
`--examples` memorized and as many clean examples exactly and by default (or as `--searches` says),
and the first `--slow` of each in the slow way: a fresh copy of the model for each, one forward and
backward pass of the whole model for every neuron, and an accuracy on all remaining examples at the
end. The searches take turns. README.md beside this file says how to read it.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from common import REPOSITORY, make_parser
from torch import Tensor, nn

import gradient_accounting
from data import Split, normalize
from data.random_streams import draw_rows
from engine.config.schema import EXACT_SEARCH, FlippingConfig
from engine.flipping import cached_passes
from engine.flipping.gates import neuron_sites
from engine.flipping.search import best_gates
from engine.launch.cli import find_runs
from engine.runs.provenance import describe_device
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import evaluate
from neuron_flipping import choose_searched, compute_flipping, noisy_copies

BATCH = 500  # images in one pass of the slow way
FULL_WIDTH = [
    "data.name=mnist", "data.train_size=4000", "model.width=1.0", "train.account_gradients=false",
    "flipping.reference_batch=512", "flipping.noise_copies=5", "flipping.remaining=5000",
]  # fmt: skip


class SlowSearch:
    """One example at a time, on a copy of the model with a parameter for each gate."""

    def __init__(self, run: Run, split: Split, model: nn.Module) -> None:
        self.run, self.split, self.original = run, split, copy.deepcopy(model)
        settings = run.config.flipping
        rows = draw_rows(split.n, settings.reference_batch, "flipping reference", run.config.seed)
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


# Spelled out: the configuration of a finished run may name other values.
DEFAULT = {key: getattr(FlippingConfig(), key) for key in ("exact", "remaining", *EXACT_SEARCH)}
SEARCHES = {"exact": {"exact": True, "remaining": None}, "default": DEFAULT}


def timed_searches(
    kinds: Sequence[str], run: Run, split: Split, model: nn.Module, rows: list[int], clock: Clock
) -> dict[str, Callable]:
    """Return a function for each kind of search that searches the next example."""
    searches = {}
    for kind in kinds:
        settings = replace(run.config.flipping, **SEARCHES[kind])
        found = compute_flipping(Run.of(replace(run.config, flipping=settings)), split, model, rows)
        searches[kind] = clock.around(kind, partial(next, found))
    return searches


def measure(run: Run, kinds: Sequence[str], count: int, slow_count: int) -> None:
    device = resolve_device(run.config)
    split = load_split(run.config).to(device)
    model = load_final_model(run, split, device).eval().requires_grad_(False)
    correct = evaluate(model, split.images, split.label, index=split.index).correct.cpu()
    rows = choose_searched(split, correct, count)
    half, clock = len(rows) // 2, Clock(device)
    slow_count = max(1, min(slow_count, half))
    every = max(1, half // slow_count)
    slow_rows = [*rows[:half:every][:slow_count], *rows[half::every][:slow_count]]
    searches = timed_searches(kinds, run, split, model, rows, clock)
    slow_search = clock.around("slow", SlowSearch(run, split, model).search)
    turns = {round(len(rows) * (k + 1) / (len(slow_rows) + 1)): r for k, r in enumerate(slow_rows)}
    neurons = {kind: {} for kind in [*searches, "slow"]}
    for done in range(len(rows)):
        for kind, search_next in searches.items():
            result = search_next()
            neurons[kind][result["example"]] = result["neurons"]
        if done in turns:
            neurons["slow"][int(split.index[turns[done]])] = slow_search(turns[done])

    print(f"{describe_device(device)}, torch {torch.__version__}, {run.config.flipping}")
    for kind, found in neurons.items():
        seconds, mean = clock.seconds[kind] / len(found), statistics.mean(found.values())
        print(
            f"{kind}: {len(found)} examples of {mean:.2f} neurons, {seconds:.2f} s an example, "
            f"{seconds / mean:.2f} s a neuron"
        )
    slow = neurons.pop("slow")
    slow_seconds, slow_neurons = clock.seconds["slow"] / len(slow), statistics.mean(slow.values())
    for kind, found in neurons.items():
        seconds, mean = clock.seconds[kind] / len(found), statistics.mean(found.values())
        same = sum(found[example] == number for example, number in slow.items())
        print(
            f"{kind}: {slow_seconds / seconds:.1f} times as fast as the slow way an example, "
            f"{slow_seconds / slow_neurons / (seconds / mean):.1f} times a neuron; as many neurons "
            f"for {same} of {len(slow)} examples"
        )
    exact = neurons.get("exact", slow)
    differing = {e: (exact[e], n) for e, n in slow.items() if exact[e] != n}
    if differing:
        sys.exit(f"other numbers of neurons, exact and slow, by example: {differing}")


def main() -> None:
    parser = make_parser(__doc__, rounds=None)
    parser.add_argument("--run", help="the directory of a finished run")
    parser.add_argument("--full-width", action="store_true", help="4,000 MNIST images, width 1.0")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--slow", type=int, default=2)
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        quickstart = str(REPOSITORY / "configs" / "quickstart.yaml")
        case = FULL_WIDTH if given.full_width else []
        trained = [quickstart, [f"output_dir={folder}", *case, *given.overrides]]
        (run,) = find_runs(*([given.run, given.overrides] if given.run else trained))
        if not given.run:
            gradient_accounting.EXPERIMENT.main(run)
        with compute_precision(run.config.precision, resolve_device(run.config)):
            measure(run, given.searches, given.examples, given.slow)


if __name__ == "__main__":
    main()
