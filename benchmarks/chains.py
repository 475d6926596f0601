"""Cost of a derived chain of stages, relative to stages that are written by hand.

    python benchmarks/chains.py [--rounds 9]

Takes ResNet-9, ResNet-50 and ViT-small as they are in models/, and as plain modules that are cut
by their graph. Alternates a training step (forward and backward pass), and a cell of rewinding (the
suffix behind a middle layer). README.md beside this file says how to read it.
"""

import statistics
from collections.abc import Callable

import torch
from common import make_parser, ratio, timed

from models import build_model
from models.any_network import as_chain
from models.layer_groups import StagedModel, layer_groups, run_stages
from tests import plain_networks

CPU = torch.device("cpu")
SHAPE = {"channels": 3, "classes": 10}
NETWORKS = {  # builder of the plain module, options, size of the images, images in a batch
    "resnet9": (plain_networks.make_resnet9, {"width": 0.25}, 32, 128),
    "resnet50": (plain_networks.make_resnet50, {}, 32, 16),
    "vit_small": (plain_networks.make_vit, {"patch": 4, "dim": 128, "depth": 3}, 32, 64),
}


def build_both(name: str) -> dict[str, StagedModel]:
    """Return the network with stages by hand and the derived chain, with the same weights."""
    make, options, size, _ = NETWORKS[name]
    hand = build_model(name, **SHAPE, image_size=size, seed=0, **options)
    sized = {} if name == "resnet50" else {"image_size": size}
    chain = as_chain(make(**SHAPE, **sized, **options), torch.randn(3, 3, size, size), 10)
    chain.load_state_dict(hand.state_dict())
    return {
        way: model.to(memory_format=torch.channels_last)
        for way, model in (("by hand", hand), ("derived", chain))
    }


def make_step(model: StagedModel, images: torch.Tensor, label: torch.Tensor) -> Callable:
    model.train()

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(images), label)
        torch.autograd.grad(loss, [*model.parameters()])

    return step


def make_cell(model: StagedModel, images: torch.Tensor) -> Callable:
    """Return a rewinding cell: the stages behind a middle layer, from its kept state."""
    groups = layer_groups(model.eval())
    middle = len(groups) // 2
    with torch.no_grad():
        state = run_stages(groups, images, stop=middle)

    def cell() -> None:
        with torch.no_grad():
            run_stages(layer_groups(model), state, middle)

    return cell


def main() -> None:
    rounds = make_parser(__doc__, rounds=9).parse_args().rounds
    for name, (_, _, size, count) in NETWORKS.items():
        models = build_both(name)
        images, label = torch.randn(count, 3, size, size), torch.arange(count) % 10
        for work, make in (("step", make_step), ("rewinding cell", make_cell)):
            taken = (images, label) if make is make_step else (images,)
            ways = {way: make(model, *taken) for way, model in models.items()}
            times = alternate(ways, rounds)
            seconds = {way: statistics.median(own) for way, own in times.items()}
            words = ", ".join(f"{way} {1000 * s:.1f} ms" for way, s in seconds.items())
            relative = ratio(times, "derived", "by hand")
            print(f"{name}: {work}: derived / by hand {relative:.3f} ({words})", flush=True)


def alternate(ways: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Return this process's own seconds of each way in each round, after one that is not kept."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, work in ways.items():
            seconds, _ = timed(work, CPU)
            if number:
                times[way].append(seconds)
    return times


if __name__ == "__main__":
    main()
