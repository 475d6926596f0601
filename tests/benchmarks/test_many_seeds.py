"""benchmarks/many_seeds.py: failing processes are told, stacked training works in bf16."""

import importlib
import multiprocessing
import sys
import time
from pathlib import Path

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


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.98)])
def test_stacked_training_moves_weights_as_trainings_apart(
    many_seeds, tiny, monkeypatch, precision, least
):
    """The cosine of the weights' changes over an epoch of two seeds; bf16 keeps 8 bits."""
    small = ("data.train_size=64", "train.peak_lr=0.01", f"precision={precision}")
    configs = [tiny(*small, f"seed={seed}") for seed in (0, 1)]
    split, models, build = load_split(configs[0]), [], many_seeds.make_model

    def keep(config, split):
        models.append(build(config, split))
        return models[-1]

    with compute_precision(precision, torch.device("cpu")):
        stacked = many_seeds.stacked_training(configs, split)(1)
        monkeypatch.setattr(many_seeds, "make_model", keep)
        for config in configs:
            many_seeds.training(config, split)(1)
    for seed, (config, model) in enumerate(zip(configs, models)):
        before = build(config, split)
        together = [stacked[name][seed] - p for name, p in before.named_parameters()]
        apart = [p - before.get_parameter(name) for name, p in model.named_parameters()]
        changes = (torch.cat([c.detach().flatten() for c in way]) for way in (together, apart))
        assert torch.cosine_similarity(*changes, dim=0) > least
