"""All experiments by their names in a configuration, loaded from the modules that declare them."""

from functools import cache
from importlib import import_module

from engine.config.schema import EXPERIMENTS
from engine.runs.experiment import Experiment


@cache
def load_experiments() -> dict[str, Experiment]:
    """Import every module that the configuration's schema lists, and return its declaration."""
    return {key: import_module(module).EXPERIMENT for key, module in EXPERIMENTS.items()}
