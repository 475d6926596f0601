"""Figure 6 shows the masks that a run was trained with, of runs of earlier versions too."""

import pytest
import torch

import example_tied_dropout
from engine.runs.run import Run
from engine.runs.tables import DROPOUT_SITES
from engine.training.build import load_split
from plotting.dropout import remake_layers
from plotting.families import find_families


@pytest.mark.parametrize("sites", ["blocks", "[conv8, conv1]"])
def test_a_run_without_a_table_of_sites_shows_the_same_masks(tiny, tmp_path, sites):
    own = ("model.width=0.1", "dropout.kind=example_tied", "dropout.forget_draws=1")
    own += (f"dropout.sites={sites}",)
    run = Run.of(example_tied_dropout.without_accounting(tiny(*own, "train.epochs=2")))
    example_tied_dropout.EXPERIMENT.main(run)
    (family,) = find_families([tmp_path / "runs"])
    split = load_split(family.config)
    expected = remake_layers(family, split)
    DROPOUT_SITES.path(run.directory).unlink()
    found = remake_layers(family, split)
    assert [*found] == [*expected]
    for site, layer in found.items():
        assert torch.equal(layer.masks, expected[site].masks)
        assert layer.generalization == expected[site].generalization
    example_tied_dropout.EXPERIMENT.main(run)
    assert DROPOUT_SITES.path(run.directory).exists()
