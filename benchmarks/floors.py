"""Time of each piece of work, beside the least that the machine's limits allow.

    python benchmarks/floors.py [key.path=value ...] [--models resnet9 resnet50 vit_small]

Counts the FLOPs of matrix products and convolutions, forward and backward, of a step of training
(plain, accounting, with example-tied dropout), and of evaluation, rewinding and flipping's
reference gradient on a batch, all on random images of the data set's shape. Measures the machine's
rate of matrix products in the run's precision and its bandwidth of copies; the floor is what the
FLOPs, or the bytes that no way of computing can spare, take at these. Prints a table in Markdown;
with `train.compile=true` the two kinds of training are also measured compiled. README.md beside
this file says how to read it.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from common import make_parser, quickstart, timed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data import Examples, Split, normalize
from engine.config.schema import Config, DropoutConfig, ModelConfig
from engine.flipping.cached_passes import ReferenceGradient
from engine.flipping.gates import Gates
from engine.launch.estimates import random_images
from engine.runs.identity import resolved, without_dropout
from engine.runs.provenance import describe_device
from engine.training.build import make_model
from engine.training.compiling import compiled
from engine.training.devices import compute_precision, resolve_device
from engine.training.evaluation import evaluate
from engine.training.loop import make_optimizer, train_epoch
from engine.training.record import plain_backward
from gradient_accounting import GradientAccountant
from layer_rewinding import compute_predictions
from models import MODELS
from models.folding import folded
from models.layer_groups import StagedModel, layer_groups

MATRICES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}  # sides
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes
EPOCHS = 2  # that rewinding takes each group back to


class Counter(TorchDispatchMode):
    """Adds up FLOPs by torch's formulas. torch's own counter looks at modules too, and fails where
    a gradient is taken to what enters one, as flipping does."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(frozen=True)
class Work:
    """Something to measure; `steps` times the same, for which `nbytes` must move each time."""

    name: str
    run: Callable[[], object]
    nbytes: int
    steps: int = 1
    plainly: Callable[[], object] | None = None  # the same, not compiled

    def flops(self) -> float:
        """Count one step. Attention is counted as its two products; fused kernels hide them."""
        with Counter() as counter, sdpa_kernel(SDPBackend.MATH):
            (self.plainly or self.run)()
        return counter.flops / self.steps

    def seconds(self, rounds: int, device: torch.device) -> float:
        self.run()
        return statistics.median(timed(self.run, device)[0] for _ in range(rounds)) / self.steps


# ---------------------------------------------------------------- the machine


def matrix_rate(
    config: Config, device: torch.device, rounds: int, sizes: Sequence[int] | None = None
) -> float:
    """Return the FLOP/s of the fastest of several square matrix products."""
    sizes = sizes or MATRICES[device.type]
    dtype, best = torch.bfloat16 if config.precision == "bf16" else torch.float32, 0.0
    largest = sizes[-1]
    for size in sizes:
        left, right = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
        times = (largest // size) ** 2  # short ones again and again

        def multiply(left=left, right=right, times=times) -> None:
            for _ in range(times):
                torch.mm(left, right)

        multiply()
        seconds = min(timed(multiply, device)[0] for _ in range(rounds))
        best = max(best, 2 * size**3 * times / seconds)
    return best


def bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second that a copy reads and writes, together."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = min(timed(lambda: target.copy_(source), device)[0] for _ in range(rounds))
    return 2 * source.nbytes / seconds


# ---------------------------------------------------------------- the work


def training(config: Config, model: nn.Module, split: Split, backward: Callable) -> Callable:
    optimizer = make_optimizer(model.parameters(), config.train)
    return partial(train_epoch, model, optimizer, split, config, 1, backward)


def reference_gradient(model: StagedModel, split: Split) -> Callable[[], object]:
    """A forward and a backward pass to all neurons; nothing is kept from earlier passes."""
    model = folded(model)
    gates = Gates(model)
    with gates:
        reference = Examples(normalize(split.images)[:, None], split.label)
        gradient = ReferenceGradient(model, gates, reference, memory=0)

    def compute() -> None:
        with gates:
            gradient._compute(frozenset())

    return compute


def pieces(config: Config, device: torch.device, steps: int) -> Iterator[Work]:
    """Every piece of work; images and weights must move once, momentum and sums there and back."""
    size = config.train.batch_size
    split = random_images(config, steps * size).to(device)
    batch = split.subset(torch.arange(split.n, device=device) < size)
    model = make_model(config, split).to(device)
    images = batch.images.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters())

    plain = training(config, model, split, plain_backward)
    yield Work("training step", plain, images + 4 * weights, steps)
    accounting = training(config, model, split, GradientAccountant(model).backward)
    yield Work("accounting step", accounting, images + 8 * weights, steps)
    if resolved(config).train.compile:
        with compiled(model, wanted=True) as network:
            fast = training(config, network, split, plain_backward)
            yield Work("training step, compiled", fast, images + 4 * weights, steps, plain)
            fast = training(config, network, split, GradientAccountant(model).backward)
            yield Work("accounting step, compiled", fast, images + 8 * weights, steps, accounting)
    tied = replace(config, dropout=DropoutConfig(kind="example_tied"))
    tied = training(tied, make_model(tied, split).to(device), split, plain_backward)
    yield Work("step with example-tied dropout", tied, images + 4 * weights, steps)

    model.eval()
    whole = partial(evaluate, model, batch.images, batch.label)
    yield Work("evaluation", whole, images + weights)
    earlier = {epoch: layer_groups(copy.deepcopy(model)) for epoch in range(EPOCHS)}
    rewinding = partial(compute_predictions, layer_groups(model), earlier, batch.images)
    yield Work(f"rewinding to {EPOCHS} epochs", rewinding, images + (1 + EPOCHS) * weights)
    gradient = reference_gradient(model, batch)
    yield Work("flipping's reference gradient", gradient, 4 * images + weights)


def configured(config: Config, name: str) -> Config:
    """The configuration with this model, and steps so small that they lead nowhere."""
    own = config.model if name == config.model.name else ModelConfig(name=name)
    config = without_dropout(config)
    return replace(config, model=own, train=replace(config.train, peak_lr=1e-12))


def measure(config: Config, names: list[str], rounds: int, steps: int) -> None:
    device = resolve_device(config)
    with compute_precision(config.precision, device):
        rate, copying = matrix_rate(config, device, rounds), bandwidth(device, rounds)
        print(f"{describe_device(device)}, torch {torch.__version__}, {config.precision}")
        print(f"matrix products {rate / 1e9:,.1f} GFLOP/s, copies {copying / 1e9:.2f} GB/s\n")
        print("| model | work | GFLOP | MB | floor | measured | % of the measured matrix rate |")
        print("|---|---|---|---|---|---|---|")
        for name in names:
            for work in pieces(configured(config, name), device, steps):
                flops, seconds = work.flops(), work.seconds(rounds, device)
                floor = max(flops / rate, work.nbytes / copying)
                print(
                    f"| {name} | {work.name} | {flops / 1e9:.2f} | {work.nbytes / 1e6:.1f} "
                    f"| {floor:.3g} s | {seconds:.3g} s "
                    f"| {flops / rate / seconds:.0%} |",
                    flush=True,
                )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=2, help="in one measured epoch of training")
    given = parser.parse_intermixed_args()
    measure(quickstart(given.overrides), given.models, given.rounds, given.steps)


if __name__ == "__main__":
    main()
