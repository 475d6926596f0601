"""Both readings of Table 3's standard dropout: settings, identity, and the network built."""

import copy

import pytest
import torch

import example_tied_dropout
from data import normalize
from engine.config.load import load_configs
from engine.errors import UserError
from engine.runs.identity import deciding_settings, title
from engine.runs.run import Run
from engine.training.build import load_final_model, load_split, make_model
from engine.training.evaluation import evaluate
from models.dropout import StandardDropout

STANDARD = "dropout.kind=standard"


def probabilities(config) -> set[float]:
    modules = make_model(config, load_split(config)).modules()
    return {m.p for m in modules if isinstance(m, StandardDropout)}


def test_keep_and_drop_are_the_two_readings_of_p(tiny):
    asked = {reading: tiny(STANDARD, f"dropout.standard={reading}") for reading in ("keep", "drop")}
    assert probabilities(asked["keep"]) == {0.4}
    assert list(probabilities(asked["drop"])) == [pytest.approx(0.6)]


def test_runs_of_before_the_keys_existed_are_found_again(tiny):
    """They kept 40% of single activations, and their settings say nothing about it."""
    keep = tiny(STANDARD, "dropout.standard=keep", "dropout.units=activations")
    settings = deciding_settings(keep)
    assert not {"dropout.standard", "dropout.units"} & settings.keys()


def test_each_reading_is_another_run_and_has_a_title_of_its_own(tiny):
    changes = ("standard=keep", "standard=drop", "units=channels")
    configs = [tiny(STANDARD, f"dropout.{change}") for change in changes]
    assert len({Run.of(config).directory for config in configs}) == 3
    assert len({title(config) for config in configs}) == 3
    for kind in ("example_tied", "sparse", "none"):
        runs = [Run.of(tiny(f"dropout.kind={kind}", f"dropout.{c}")) for c in changes]
        assert len({run.directory for run in runs}) == 1


def test_recalibrated_statistics_are_a_measurement_of_their_own(tiny):
    """'before' has the statistics of training, 'after' those of a pass without dropout."""
    given = (STANDARD, "dropout.batchnorm=recalibrated", "train.epochs=6", "train.peak_lr=0.05")
    run = Run.of(example_tied_dropout.without_accounting(tiny(*given)))
    example_tied_dropout.EXPERIMENT.main(run)
    before, after = example_tied_dropout.DROPOUT.read(run.directory)
    split = load_split(run.config)
    model = load_final_model(run, split, torch.device("cpu"))
    trained = copy.deepcopy(model.state_dict())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        model(normalize(split.images))
    model.eval()
    assert not torch.equal(
        model.state_dict()["conv1.bn.running_var"], trained["conv1.bn.running_var"]
    )
    correct = evaluate(model, split.images, split.label).correct
    assert after["acc_clean"] == pytest.approx(correct[~split.memorized].double().mean().item())
    assert after != before | {"state": "after"}


def test_dropping_all_is_refused(tiny_file):
    overrides = (STANDARD, "dropout.standard=drop", "dropout.p_gen=1")
    with pytest.raises(UserError, match=r"dropout\.p_gen: 1 is not allowed"):
        load_configs(tiny_file, overrides)
