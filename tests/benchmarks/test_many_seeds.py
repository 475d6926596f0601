"""benchmarks/many_seeds.py: failing processes are told, stacked training works in bf16."""

import importlib
import multiprocessing
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import pytest
import torch

from engine.training.build import load_split
from engine.training.devices import compute_precision

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def many_seeds(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("many_seeds")


def test_a_process_that_fails_ends_the_waiting(many_seeds, monkeypatch):
    monkeypatch.setattr(many_seeds, "POLL", 0.05)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=answers.put, args=(1.0,)),
        context.Process(target=sys.exit, args=(3,)),
    ]
    for process in processes:
        process.start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"processes ended with status \[3\]"):
        many_seeds.collect(answers, processes)
    assert time.monotonic() - began < 30
    for process in processes:
        process.join()


@pytest.fixture
def changes(many_seeds, tiny, monkeypatch):
    """The changes of all weights over an epoch of four seeds, stacked and apart."""
    build = many_seeds.make_model

    def measure(precision: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        small = ("data.train_size=64", "train.peak_lr=0.01", f"precision={precision}")
        configs = [tiny(*small, f"seed={seed}") for seed in range(4)]
        split, models = load_split(configs[0]), []

        def keep(config, split):
            models.append(build(config, split))
            return models[-1]

        with compute_precision(precision, torch.device("cpu")), monkeypatch.context() as patch:
            stacked = many_seeds.stacked_training(configs, split)(1)
            patch.setattr(many_seeds, "make_model", keep)
            for config in configs:
                many_seeds.training(config, split)(1)
        together, apart = [], []
        for seed, (config, model) in enumerate(zip(configs, models)):
            before = dict(build(config, split).named_parameters())
            together.append(_joined(stacked[name][seed] - p for name, p in before.items()))
            apart.append(_joined(p - before[name] for name, p in model.named_parameters()))
        return together, apart

    return measure


def _joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return 1 minus the cosine."""
    return 1 - torch.cosine_similarity(one, other, dim=0).item()


def test_stacked_training_moves_weights_as_trainings_apart(changes):
    for together, apart in zip(*changes("fp32")):
        assert _differ(together, apart) < 0.0001


def test_stacked_training_in_bf16_differs_by_rounding_alone(changes):
    """Rounding depends on the processor; trainings in fp32 and bf16 tell how large it is.

    Two trainings that round independently differ from each other by twice as much as each of them
    from one that hardly rounds; on average over seeds, as rounding moves the place of a maximum,
    which changes a single seed's gradient a lot.
    """
    exact = changes("fp32")[1]
    together, apart = changes("bf16")
    rounding = fmean(map(_differ, apart, exact))
    assert fmean(map(_differ, together, apart)) < 2 * rounding < 0.1
    assert fmean(map(_differ, together, exact)) < 2 * rounding
    for stacked, own, other in zip(together, apart, [*apart[1:], apart[0]]):
        assert 0 < _differ(stacked, own) < 0.1
        assert _differ(stacked, other) > 0.5, "another seed's is no rounding"
