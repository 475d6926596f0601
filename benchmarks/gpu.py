"""The first minutes on a GPU: does it compute the same numbers, and how fast is each piece of work?

    python benchmarks/gpu.py --minutes 10 --output gpu.json
    python benchmarks/gpu.py --stages compiled --output gpu.json            # adds to the report
    python benchmarks/gpu.py --device cpu --minutes 3 --output cpu.json     # tiny sizes
    python benchmarks/gpu.py --table gpu.json                               # Markdown

Stages run one after another, the most informative first, each in a process of its own with a
timeout. The output file is rewritten after each stage; what a stage had measured before it failed,
or ran out of time, is kept. `--stages` adds to the stages that the file has. README.md beside this
file says how to read it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from common import REPOSITORY, quickstart, timed
from floors import MATRICES, Counter, bandwidth, matrix_rate
from torch import nn

from data import Examples, Split, normalize
from engine.config.schema import Config
from engine.flipping.cached_passes import Correctness, ReferenceGradient
from engine.flipping.gates import Gates
from engine.launch.estimates import random_images
from engine.machine import default_precision
from engine.runs import files, provenance
from engine.runs.identity import resolved, without_dropout
from engine.training.build import make_model
from engine.training.compiling import compiled
from engine.training.devices import compute_precision, free_memory
from engine.training.evaluation import evaluate
from engine.training.loop import make_optimizer, train_epoch
from engine.training.record import plain_backward
from gradient_accounting import GradientAccountant
from models.dropout import ExampleTiedDropout
from models.folding import folded

Rows = Iterator[tuple[str, object]]
LEAST = 5.0  # seconds that are worth starting a stage for
START = 180.0  # seconds that a stage may take in any case: importing torch alone takes some


@dataclass(frozen=True)
class Size:
    """Sizes of the work: the paper's on a GPU, tiny on a CPU."""

    overrides: tuple[str, ...]
    precisions: tuple[str, ...]
    steps: int
    references: int
    images: int
    matrices: tuple[int, ...]
    models: Mapping[str, tuple[str, ...]]
    configs: tuple[str, ...]


GPU = Size(
    ("data.name=cifar10", "data.train_size=null", "data.test_size=null",
     "model.width=1.0", "train.batch_size=512"),
    ("bf16", "tf32", "fp32"), 20, 512, 50_000,
    MATRICES["cuda"],
    {"resnet50": ("model.name=resnet50", "model.width=1.0"),
     "vit_small": ("model.name=vit_small", "model.width=1.0", "train.batch_size=128")},
    tuple(sorted(f"configs/paper/{p.name}" for p in (REPOSITORY / "configs/paper").glob("*.yaml"))),
)  # fmt: skip
CPU = Size(
    ("data.train_size=64", "data.test_size=16", "model.width=0.05", "train.batch_size=16"),
    ("fp32",), 2, 8, 32,
    (128,),
    {"vit_small": ("model.name=vit_small", "model.width=1.0", "model.dim=16", "model.depth=1")},
    ("configs/quickstart.yaml",),
)  # fmt: skip


def size_for(device: torch.device) -> Size:
    return GPU if device.type == "cuda" else CPU


def configured(device: torch.device, *overrides: str) -> Config:
    """Return the benchmark's configuration, with steps so small that they lead nowhere."""
    keys = {override.partition("=")[0]: override for override in size_for(device).overrides}
    keys |= {override.partition("=")[0]: override for override in overrides}
    config = without_dropout(quickstart(list(keys.values())))
    return replace(config, train=replace(config.train, peak_lr=1e-12))


def random_split(config: Config, count: int) -> Split:
    """Return random images of the data set's shape, every tenth of them noisy."""
    split = random_images(config, count)
    return replace(split, memorized=torch.arange(count) % 10 == 0)


def peak_memory(device: torch.device) -> float | None:
    """Return the most GiB that were allocated since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 3)


# ---------------------------------------------------------------- stages


def environment(device: torch.device) -> Rows:
    """Report the CPU threads and the free memory."""
    yield "threads", torch.get_num_threads()
    yield "free_memory", free_memory(device)


def parity(device: torch.device) -> Rows:
    """Compare the device with the CPU, and the CPU with other convolutions of its own.

    The numbers are the norm of the difference relative to the norm. Rounding moves the place of a
    maximum, and with it a whole example's gradient, so that gradients differ more than losses do.
    """
    config = configured(device, "data.train_size=null")
    split, cpu = random_split(config, 64), torch.device("cpu")
    expected = _numbers_of(config, split, cpu)
    with compute_precision("fp32", device):
        found = _numbers_of(config, split, device)
    with torch.backends.mkldnn.flags(enabled=False):
        other = _numbers_of(config, split, cpu)
    for name, value in expected.items():
        yield (
            name,
            {
                "from the CPU": relative_difference(found[name], value),
                "between two ways on the CPU": relative_difference(other[name], value),
            },
        )


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, relative to that of the expected values."""
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def _numbers_of(config: Config, split: Split, device: torch.device) -> dict[str, torch.Tensor]:
    """Return accounted gradients, gates' scores, losses and a mask, on the CPU."""
    part, model = split.to(device), make_model(config, split).to(device)
    accountant = GradientAccountant(model)
    train_epoch(model, make_optimizer(model.parameters(), config.train), part, config, 1,
                accountant.backward)  # fmt: skip
    found = {
        "clean gradient": torch.cat([gradient.flatten() for gradient in accountant.clean]),
        "noisy gradient": torch.cat([gradient.flatten() for gradient in accountant.noisy]),
        "losses": evaluate(model, part.images, part.label).loss,
    }
    quiet = folded(model)
    with Gates(quiet) as gates:
        images = normalize(part.images[:16])[:, None]
        reference = ReferenceGradient(quiet, gates, Examples(images, part.label[:16]), memory=0)
        found["gates' scores"] = reference.of(frozenset())
    found["dropout mask"] = ExampleTiedDropout(32, 64, 0.4).to(device).masks.float()
    return {name: value.detach().cpu() for name, value in found.items()}


def rates(device: torch.device) -> Rows:
    """Measure square matrix products (FLOP/s) and large copies (bytes/s)."""
    yield "copies", bandwidth(device, rounds=3)
    for precision in size_for(device).precisions:
        yield f"matrix products {precision}", rate_in(precision, device)


def rate_in(precision: str, device: torch.device) -> float:
    """Return the measured FLOP/s of matrix products in a precision."""
    config = replace(configured(device), precision=precision)
    with compute_precision(precision, device):
        return matrix_rate(config, device, rounds=3, sizes=size_for(device).matrices)


def steps(device: torch.device, ways: Sequence[str] = ("eager", "tuned")) -> Rows:
    """Time steps of ResNet-9 in each way and precision, plain and accounting."""
    rates = {name: rate_in(name, device) for name in size_for(device).precisions}
    for way in ways:
        for precision, rate in rates.items():
            for accounting in (True, False):
                kind = "accounting" if accounting else "plain"
                work = partial(time_step, device, precision, way, accounting)
                yield f"{kind} {precision} {way}", tolerantly(work, rate)


def compiled_steps(device: torch.device) -> Rows:
    """Time eager steps of ResNet-9 and those that torch.compile made, which takes minutes."""
    ways = ("eager", "compiled", "graphs")
    return steps(device, ways) if device.type == "cuda" else iter(())


def models(device: torch.device) -> Rows:
    """Time steps of the other networks."""
    size = size_for(device)
    for name, overrides in size.models.items():
        for precision in size.precisions:
            for accounting in (False, True):
                kind = "accounting" if accounting else "plain"
                work = partial(time_step, device, precision, "eager", accounting)
                yield f"{name} {kind} {precision}", tolerantly(work, None, *overrides)


def tolerantly(work: Callable[..., object], *arguments: object) -> object:
    """Return what the work returns, or its error in one line: others are still to be measured."""
    try:
        return work(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}


@contextmanager
def in_way(model: nn.Module, way: str) -> Iterator[nn.Module]:
    """Yield the network in one of the ways of computing it."""
    wanted = {"compiled": True, "graphs": "graphs"}.get(way, False)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = way == "tuned"
    try:
        with compiled(model, wanted) as network:
            yield network
    finally:
        torch.backends.cudnn.benchmark = before


def time_step(
    device: torch.device,
    precision: str,
    way: str,
    accounting: bool,
    rate: float | None,
    *overrides: str,
) -> dict[str, float | None]:
    """Return seconds and images/s of a training step, and its share of the matrix rate."""
    config, count = configured(device, *overrides), size_for(device).steps
    split = random_split(config, count * config.train.batch_size).to(device)
    model = make_model(config, split).to(device)
    backward = GradientAccountant(model).backward if accounting else plain_backward
    optimizer = make_optimizer(model.parameters(), config.train)
    peak_memory(device)
    with compute_precision(precision, device):
        with Counter() as counter:
            train_epoch(model, optimizer, split, config, 1, backward)
        with in_way(model, way) as network:
            work = partial(train_epoch, network, optimizer, split, config, 1, backward)
            work()
            seconds = min(timed(work, device)[0] for _ in range(3)) / count
    return {
        "seconds": seconds,
        "images/s": config.train.batch_size / seconds,
        "share of matrix rate": counter.flops / count / seconds / rate if rate else None,
        "GiB": peak_memory(device),
    }


def flipping(device: torch.device) -> Rows:
    """Time flipping's reference gradient and the accuracy on many images, with peak memory."""
    size, config = size_for(device), configured(device)
    split = random_split(config, size.images).to(device)
    model = folded(make_model(config, split).to(device))
    for precision in size.precisions:
        with compute_precision(precision, device), Gates(model) as gates:
            few = slice(0, size.references)
            images = normalize(split.images[few])[:, None].expand(-1, 5, -1, -1, -1)
            reference = Examples(images, split.label[few])
            others = Examples(split.images, split.label)
            memory = free_memory(device) / 3
            pieces = {
                "reference gradient": (ReferenceGradient, ReferenceGradient.of, reference),
                "accuracy": (Correctness, Correctness.accuracy, others),
            }
            for name, (make, ask, given) in pieces.items():
                peak_memory(device)
                piece = make(model, gates, given, memory)
                ask(piece, frozenset())
                new = [partial(ask, piece, frozenset({gate})) for gate in range(3)]
                times = [timed(work, device)[0] for work in new]  # a set is computed once
                yield f"{name} {precision}", {"seconds": min(times), "GiB": peak_memory(device)}


def evaluation(device: torch.device) -> Rows:
    """Time evaluation in small and large batches, and with batch norms folded."""
    config, count = configured(device), size_for(device).images
    precision = default_precision(device.type)
    split = random_split(config, count).to(device)
    model = make_model(config, split).to(device)
    for name, network in (("as trained", model), ("folded", folded(model))):
        for size in (500, 2000):
            work = partial(evaluate, network, split.images, split.label, None, size)
            with compute_precision(precision, device):
                work()
                seconds = min(timed(work, device)[0] for _ in range(3))
            yield f"{name}, batches of {size}", {"images/s": count / seconds}


def resume(device: torch.device) -> Rows:
    """Interrupt a training with SIGTERM, resume it, and compare with an uninterrupted one."""
    overrides = [
        "data.train_size=200", "data.test_size=20", "train.epochs=3", "train.peak_epoch=1",
        "train.batch_size=20", "model.width=0.05", f"device={device.type}",
    ]  # fmt: skip
    script = [sys.executable, str(REPOSITORY / "gradient_accounting.py")]
    with tempfile.TemporaryDirectory() as folder:

        def command(name: str) -> list[str]:
            place = f"output_dir={folder}/{name}"
            return [*script, str(REPOSITORY / "configs/quickstart.yaml"), *overrides, place]

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        yield "uninterrupted status", subprocess.run(command("whole"), **quiet).returncode
        process = subprocess.Popen(command("cut"), **quiet)
        while process.poll() is None and not list(Path(folder).glob("cut/*/*/resume/*001.pt")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        yield "interrupted status", process.wait()
        yield "resumed status", subprocess.run(command("cut"), **quiet).returncode
        tables = [next(Path(folder).glob(f"{name}/*/*/history.csv")) for name in ("whole", "cut")]
        yield "same history", tables[0].read_bytes() == tables[1].read_bytes()


def gpu_tests(device: torch.device) -> Rows:
    """Run the tests that need a GPU; each is passed, failed, skipped or an error."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider",
               "-p", "benchmarks.failures", "--no-summary"]  # fmt: skip
    if device.type != "cuda":
        return
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield from tested(line)
    if process.returncode > 1:  # 1: a test failed
        raise RuntimeError(f"pytest ended with status {process.returncode}")


def tested(line: str) -> Rows:
    """Yield the name and the outcome of the test that a line of pytest reports.

    A line without a worker's number in front is of failures.py and says why a test failed.
    """
    if found := re.match(r"\[gw\d+\] .*(PASSED|FAILED|ERROR|SKIPPED) (tests/.*\S)", line):
        yield found.group(2), found.group(1).lower()
    elif found := re.match(r"FAILED (tests/.*?) - (.*\S)", line):
        yield found.group(1), f"failed: {found.group(2)[:300]}"


def configs(device: torch.device) -> Rows:
    """Estimate what each of the paper's configurations takes."""
    for path in size_for(device).configs:
        command = [sys.executable, str(REPOSITORY / "reproduce.py"), str(REPOSITORY / path)]
        done = subprocess.run(
            [*command, "--dry-run", "--device", device.type], capture_output=True, text=True
        )
        lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines()
        yield path, lines[-1] if lines else f"status {done.returncode}"


# Each with its share of the minutes; a stage is stopped after twice that.
STAGES: dict[str, tuple[Callable[[torch.device], Rows], float]] = {
    "environment": (environment, 0.05),
    "parity": (parity, 0.08),
    "rates": (rates, 0.07),
    "steps": (steps, 0.15),
    "flipping": (flipping, 0.1),
    "evaluation": (evaluation, 0.05),
    "resume": (resume, 0.1),
    "models": (models, 0.05),
    "tests": (gpu_tests, 0.1),
    "compiled": (compiled_steps, 0.15),
    "configs": (configs, 0.1),
}


# ---------------------------------------------------------------- processes


def work_on(stage: str, device: torch.device, path: Path) -> None:
    """Do one stage in this process; rewrite its file after each measurement.

    Every stage says where it was measured: a report may be completed on another machine.
    """
    source = provenance.describe(device, resolved(configured(device)).precision)
    report = {"provenance": source, "results": {}}
    files.write_json(path, report)
    for name, value in STAGES[stage][0](device):
        report["results"][name] = value
        files.write_json(path, report)


def measure_stage(command: Sequence[str], path: Path, timeout: float) -> dict[str, object]:
    """Run a stage's command; return what it wrote to its file, and how it ended."""
    began, error = time.monotonic(), None
    process = subprocess.Popen(
        [*command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=timeout)
        if process.returncode:
            lines = said.strip().splitlines() or [f"status {process.returncode}"]
            error = lines[-1][:300]
    except subprocess.TimeoutExpired:
        error = f"stopped after {timeout:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.communicate()
    content = json.loads(path.read_text()) if path.exists() else {"results": {}}
    end = {"seconds": round(time.monotonic() - began, 1)} | ({"error": error} if error else {})
    return end | content


def earlier_stages(given: argparse.Namespace) -> dict[str, object]:
    """Return the stages of a report that named stages are added to; a whole run starts anew."""
    if not (given.stages and given.output.exists()):
        return {}
    earlier = json.loads(given.output.read_text())
    if earlier["device"] != given.device:
        sys.exit(f"{given.output}: is a report of {earlier['device']}; name another file")
    return earlier["stages"]


def measure(given: argparse.Namespace) -> dict[str, object]:
    """Measure the stages, as far as the time goes; the file is whole after each."""
    deadline = time.monotonic() + 60 * given.minutes
    report = {"device": given.device, "minutes": given.minutes, "stages": earlier_stages(given)}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.stages or STAGES:
            share = STAGES[name][1]
            left, path = deadline - time.monotonic(), Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, "--device", given.device]
            command += ["--stage", name, "--output", str(path)]
            if left < LEAST:
                report["stages"][name] = {"error": "no time left", "results": {}}
            else:
                timeout = min(left, max(START, 2 * share * 60 * given.minutes))
                report["stages"][name] = measure_stage(command, path, timeout)
            stage = report["stages"][name]
            files.write_json(given.output, report)
            print(f"{name}: {len(stage['results'])} results, {stage.get('error', 'done')}")
    return report


# ---------------------------------------------------------------- table


def write_table(report: Mapping) -> Iterator[str]:
    """The report as a table in Markdown."""
    yield "| stage | what | result |"
    yield "|---|---|---|"
    for stage, content in report["stages"].items():
        for name, value in content["results"].items():
            yield f"| {stage} | {name} | {_written(value)} |"
        if "error" in content:
            yield f"| {stage} | ended early | {content['error']} |"


def _written(value: object) -> str:
    if isinstance(value, Mapping):
        known = {key: each for key, each in value.items() if each is not None}
        return ", ".join(f"{key} {_written(each)}" for key, each in known.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", nargs="+", choices=STAGES)
    parser.add_argument("--stage", choices=STAGES, help="do only this one, in this process")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print a report")
    return parser.parse_args(arguments)


def main() -> None:
    given = parse()
    if given.device == "cuda" and not given.table and not torch.cuda.is_available():
        sys.exit("no usable GPU; --device cpu measures tiny sizes on the CPU")
    if given.stage:
        work_on(given.stage, torch.device(given.device), given.output)
        return
    report = json.loads(given.table.read_text()) if given.table else measure(given)
    print("\n".join(write_table(report)))


if __name__ == "__main__":
    main()
