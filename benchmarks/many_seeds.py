"""Several small trainings on one device: one after another, in processes of their own, or stacked.

    python benchmarks/many_seeds.py [key.path=value ...] [--seeds 4] [--epochs 2]

The same trainings, without evaluation and writing, in three ways: one after another; each in a
process of its own and all at once, as reproduce.py --jobs does it; and as one training whose
parameters are stacked (torch.func): an operation works on all seeds at once. Starting up and the
first epoch are left out. README.md beside this file says how to read it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import Process
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty

import torch
import torch.nn.functional as F
from common import make_parser, quickstart
from torch import multiprocessing, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from data import Split, batch_rows, epoch_order, normalize
from engine.config.schema import Config
from engine.runs.identity import without_dropout
from engine.runs.provenance import describe_device
from engine.training.build import load_split, make_model
from engine.training.devices import compute_precision, resolve_device
from engine.training.epoch import learning_rate
from engine.training.loop import train_epoch


def training(config: Config, split: Split) -> Callable[[int], object]:
    """One seed: a function that trains an epoch."""
    train = config.train
    model = make_model(config, split).to(split.label.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=train.momentum, weight_decay=train.weight_decay
    )
    return lambda epoch: train_epoch(model, optimizer, split, config, epoch)


def stacked_training(
    configs: Sequence[Config], split: Split
) -> Callable[[int], Mapping[str, torch.Tensor]]:
    """Return a function that trains an epoch of all seeds, and returns the stacked parameters."""
    train, device = configs[0].train, split.label.device
    models = [make_model(config, split).to(device).train() for config in configs]
    parameters, buffers = stack_module_state(models)
    for module in models[0].modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # under vmap it takes one type only, and bf16 has two
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    parameters = {name: value.detach() for name, value in parameters.items()}
    momenta = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def loss(own, own_buffers, images, label):
        logits = functional_call(models[0], (own, own_buffers), (images,))
        return F.cross_entropy(logits.float(), label)

    gradient = vmap(grad(loss), randomness="different")

    def epoch_of_all(epoch: int) -> Mapping[str, torch.Tensor]:
        rows = batch_rows(split.n, train.batch_size)
        orders = torch.stack([epoch_order(split.n, c.seed, epoch) for c in configs]).to(device)
        for step, (start, stop) in enumerate(rows):
            row = orders[:, start:stop]
            images = normalize(split.images[row].flatten(0, 1)).unflatten(0, row.shape)
            found = gradient(parameters, buffers, images, split.label[row])
            rate = learning_rate((epoch - 1) * len(rows) + step, len(rows), train)
            for name, value in parameters.items():
                own = found[name] + train.weight_decay * value
                value -= rate * momenta[name].mul_(train.momentum).add_(own)
        return parameters

    return epoch_of_all


POLL = 1.0  # seconds between two looks whether the processes still live


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(config: Config, device: torch.device, work: Callable[[int], object]) -> float:
    """Seconds of all epochs but the first."""
    with compute_precision(config.precision, device):
        work(1)
        finish(device)
        began = time.perf_counter()
        for epoch in range(2, config.train.epochs + 1):
            work(epoch)
        finish(device)
    return time.perf_counter() - began


def in_a_process(config: Config, threads: int, ready: Queue, go: Event, ends: Queue) -> None:
    torch.set_num_threads(threads)
    device = resolve_device(config)
    work = training(config, load_split(config).to(device))
    with compute_precision(config.precision, device):
        work(1)
        finish(device)
        ready.put(time.time())
        go.wait()
        for epoch in range(2, config.train.epochs + 1):
            work(epoch)
        finish(device)
    ends.put(time.time())


def in_processes(configs: Sequence[Config], threads: int) -> float:
    """Seconds from when all are ready until the last one's end."""
    context = multiprocessing.get_context("spawn")
    ready, go, ends = context.Queue(), context.Event(), context.Queue()
    processes = [
        context.Process(target=in_a_process, args=(config, threads, ready, go, ends))
        for config in configs
    ]
    try:
        for process in processes:
            process.start()
        collect(ready, processes)
        began = time.time()
        go.set()
        return max(collect(ends, processes)) - began
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.join()


def collect(answers: Queue, processes: Sequence[Process]) -> list[float]:
    """Return an answer of each process; raise RuntimeError as soon as one has failed."""
    found = []
    while len(found) < len(processes):
        try:
            found.append(answers.get(timeout=POLL))
        except Empty:
            if failed := [process.exitcode for process in processes if process.exitcode]:
                raise RuntimeError(f"processes ended with status {failed}") from None
    return found


def measure(configs: Sequence[Config]) -> None:
    device = resolve_device(configs[0])
    split = load_split(configs[0]).to(device)
    print(f"{describe_device(device)}, torch {torch.__version__}, {len(configs)} seeds")
    print(
        f"{configs[0].model.name} {configs[0].model.arguments}, {split.n} images of {split.shape}"
    )
    serial = sum(timed(config, device, training(config, split)) for config in configs)
    print(f"one after another        {serial:8.2f} s")
    threads = max(1, torch.get_num_threads() // len(configs))
    ways = {
        "in processes": lambda: in_processes(configs, threads),
        "stacked": lambda: timed(configs[0], device, stacked_training(configs, split)),
    }
    for name, way in ways.items():
        try:
            seconds = way()
            print(f"{name:<24} {seconds:8.2f} s   {serial / seconds:5.2f} times as fast")
        except RuntimeError as error:  # what the other way takes is still worth knowing
            print(f"{name:<24} failed: {str(error).partition(chr(10))[0]}")


def main() -> None:
    parser = make_parser(__doc__, rounds=None)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2, help="one more than are timed")
    given = parser.parse_intermixed_args()
    config = without_dropout(quickstart(given.overrides))
    train = replace(config.train, epochs=given.epochs, peak_epoch=min(1, config.train.peak_epoch))
    measure([replace(config, seed=seed, train=train) for seed in range(given.seeds)])


if __name__ == "__main__":
    main()
