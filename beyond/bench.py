"""A trained network with gates, and the examples that localizers are asked about."""

from dataclasses import dataclass

import torch
from torch import Tensor

from beyond.channel_planting import Channels, find_channels
from beyond.localizers import UnitGates
from data import Examples, Split, normalize
from data.random_streams import draw_rows, random_stream
from engine.config.schema import Config
from engine.errors import UserError
from engine.runs.run import Run
from engine.training.evaluation import evaluate
from models.dropout_places import find_places
from models.layer_groups import StagedModel
from models.wiring import observe

SUBSETS = ("noisy", "clean")
PLANTED_SITES = 2  # single channels are planted behind the last ones that allow it


@dataclass(frozen=True)
class Bench:
    """One trained network, its gates, and the examples of each subset."""

    model: StagedModel
    gates: UnitGates
    channels: dict[str, Channels]  # of the sites where single channels are planted
    split: Split
    rows: dict[str, Tensor]  # of each subset
    reference: Examples
    others: Examples  # a sample of the training set, for the cost of deletion
    test: Examples

    def batch(self, subset: str, truth: str = "own") -> Examples:
        """Return a subset's examples; for `other_mask`, each under the next one's mask.

        A subset of one example takes the mask of another example of the training set.
        """
        batch, index = Examples.of(self.split, self.rows[subset]), self.split.index
        if truth != "other_mask":
            return batch
        others = torch.roll(batch.index, 1) if len(batch) > 1 else index[index != batch.index][:1]
        return batch.under_masks_of(others)


def choose_rows(split: Split, correct: Tensor, count: int) -> dict[str, Tensor]:
    """Return rows of `count` noisy and of as many clean examples that are predicted as trained."""
    found = {}
    for subset, memorized in (("noisy", True), ("clean", False)):
        rows = ((split.memorized == memorized) & correct).nonzero().flatten()
        order = random_stream("planted examples", int(memorized)).permutation(len(rows))
        found[subset] = rows[torch.from_numpy(order[:count]).to(rows.device)]
    return found


def find_gates(model: StagedModel, config: Config, images: Tensor) -> UnitGates:
    """Return the gates behind the configured places of dropout, with dropout or without."""
    try:
        return UnitGates(model, find_places(model, config.dropout.sites, images))
    except ValueError as error:
        raise UserError(f"dropout: {error}") from None


def make_bench(run: Run, split: Split, model: StagedModel) -> Bench:
    own = run.config.planted
    correct = evaluate(model, split.images, split.label, index=split.index).correct
    tested = draw_rows(len(split.test_label), own.others, "planted test").to(split.label.device)
    test = Examples(normalize(split.test_images[tested]), split.test_label[tested], tested)
    wiring = model.wiring or observe(model, test.images[:2])
    gates = find_gates(model, run.config, test.images[:2])
    known = {site.name: find_channels(model, wiring, site.name) for site in gates.sites}
    planted = [name for name, channels in known.items() if channels][-PLANTED_SITES:]
    return Bench(
        model=model,
        gates=gates,
        channels={name: known[name] for name in planted},
        split=split,
        rows=choose_rows(split, correct, own.examples),
        reference=Examples.of(split, draw_rows(split.n, own.reference, "planted reference")),
        others=Examples.of(split, draw_rows(split.n, own.others, "planted others")),
        test=test,
    )
