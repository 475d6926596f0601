"""Devices, precision and random numbers of a run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from data.random_streams import random_stream
from engine.config.schema import Config
from engine.errors import UserError
from engine.machine import default_precision, device_type, gpu_problem
from engine.runs.identity import measuring_precision, resolved
from engine.runs.provenance import describe_device

SHARED_BY = "MEMORY_SHARED_BY"  # environment variable: how many processes compute on this device


def resolve_device(config: Config) -> torch.device:
    """Return the device that auto, cpu or cuda names; it must exist, and be able to measure."""
    name = config.device
    if name == "cuda" and not torch.cuda.is_available():
        problem = gpu_problem()
        raise UserError(
            "device: 'cuda' is not allowed: this machine has no usable GPU; use cpu"
            + (f" ({problem})" if problem else "")
        )
    device = torch.device(device_type(name))
    _require_has(device, "measure_precision", config.measure_precision)
    return device


def require_precision(config: Config, device: torch.device) -> None:
    """Refuse to train in a precision that the device does not have."""
    _require_has(device, "precision", config.precision)


def _require_has(device: torch.device, key: str, precision: str) -> None:
    if device.type == "cpu" and precision == "tf32":
        raise UserError(f"{key}: 'tf32' is not allowed: a CPU has none; use fp32 or bf16")


def describe_computing(configs: Sequence[Config]) -> str:
    """Return device and precision of all runs in one line, and a warning of an unused GPU."""
    devices = {device_type(config.device) for config in configs}
    names = [f"{name}, {describe_device(torch.device(name))}" for name in sorted(devices)]
    trained = sorted({resolved(config).precision for config in configs})
    measured = {
        measuring_precision(config, torch.device(device_type(config.device))) for config in configs
    }
    line = f"Device: {', '.join(names)}; precision: {', '.join(trained)}"
    if measured != set(trained):
        line += f"; measured in {', '.join(sorted(measured))}"
    problem = gpu_problem() if any(c.device != "cpu" for c in configs) else None
    return f"{line}\nWarning: {problem}" if problem else line


def free_memory(device: torch.device) -> int:
    """Return the bytes that could be allocated now; results may use them, never depend on them.

    Processes that compute side by side each have their share of it.
    """
    return _free_memory(device) // int(os.environ.get(SHARED_BY, 1))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 31


@contextmanager
def compute_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in fp32, tf32 or bf16 inside, auto for the device's default; then restore settings.

    fp32 means fp32: the GPU's default of rounding convolutions to TF32 is switched off. bf16 does
    without autocast's cache, which would keep the weights of the first step for as long as this
    lasts.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    if precision == "auto":
        precision = default_precision(device.type)
    half = precision == "bf16"  # also switches an outer autocast off
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        with autocast:
            yield
    finally:
        for backend, value in zip(backends, before):
            backend.fp32_precision = value


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return a seed for torch's generators; no two purposes share a stream."""
    return int(random_stream(purpose, *numbers).integers(2**63))


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Give layers that draw from torch's global stream (ViT's dropout) a stream of their own.

    The global state is restored afterwards. With a seed for every epoch, an interrupted run is
    resumed exactly after a whole epoch, without stored generator states.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # torch.manual_seed would reseed every GPU's generator, and only this one's is put back.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's global streams, which `set_random_states` restores."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
