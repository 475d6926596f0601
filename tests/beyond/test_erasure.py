"""Erasure changes what its method says and nothing else, and its table counts correctly."""

import copy
import dataclasses

import pytest
import torch

import example_tied_dropout
from beyond import erasure
from beyond.erasure import (
    METHODS,
    compute_accuracies,
    compute_erasure,
    earlier_epoch,
    make_measurement,
    make_task,
    methods_of,
)
from beyond.localizers import UnitGates, run_gated
from data import Examples, normalize
from engine.config.schema import DropoutConfig
from engine.errors import RunFailed, UserError
from engine.runs.run import Run
from engine.training.build import load_split
from models.dropout import dropout_mode, examples, tied_layers
from models.layer_groups import layer_groups

CPU = torch.device("cpu")
SETTINGS = (
    "model.width=0.1", "train.epochs=12", "train.peak_epoch=3", "train.account_gradients=false",
    "retraining.epochs=2", "retraining.peak_epoch=1", "erasure.examples=6", "erasure.reference=8",
    "erasure.fine_tuning_epochs=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A run with example-tied dropout that was trained long enough to learn noisy examples."""
    from engine.config.load import load_configs
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("erasure")
    path = folder / "tiny.yaml"
    path.write_text(TINY + f"output_dir: {folder / 'runs'}\n")
    (config,) = load_configs(path, ("dropout.kind=example_tied", *SETTINGS))
    run = Run.of(config)
    example_tied_dropout.train(run, CPU)
    return run, make_task(run, load_split(config), CPU)


def right(model, split, rows, label) -> float:
    """Accuracy one example at a time."""
    found = []
    for row in rows.tolist():
        with examples(model, split.index[row : row + 1]), torch.no_grad():
            logits = model(normalize(split.images[row : row + 1]))
        found.append(logits.argmax().item() == label[row].item())
    return sum(found) / len(found)


def test_the_earlier_epoch_is_never_the_last(tied, monkeypatch):
    run, _ = tied
    monkeypatch.setattr(erasure, "CRITICAL_BELOW", 2.0)  # every epoch has a low noisy accuracy
    assert earlier_epoch(run) == run.config.train.epochs - 1


def test_the_places_of_closed_units_are_a_setting_of_plain_networks(tied):
    run, _ = tied
    plain = dataclasses.replace(run.config, dropout=DropoutConfig())
    layers = dataclasses.replace(plain.dropout, sites="layers")
    other = dataclasses.replace(plain, dropout=layers)
    digests = {make_measurement(Run.of(config)).digest for config in (plain, other)}
    assert len(digests) == 2


def test_chosen_examples_are_noisy_and_learned(tied):
    _, task = tied
    assert task.split.memorized[task.rows].all()
    assert right(task.model, task.split, task.rows, task.split.label) == 1


def test_accuracies_are_those_of_one_example_at_a_time(tied):
    _, task = tied
    split, rows = task.split, task.rows
    others = torch.tensor([row for row in range(split.n) if row not in rows.tolist()])
    with dropout_mode(task.model, "drop"):
        found = compute_accuracies(task.model, split, rows)
        assert found["acc_erased"] == pytest.approx(right(task.model, split, rows, split.label))
        true = right(task.model, split, rows, split.true_label)
        assert found["acc_erased_true"] == pytest.approx(true)
        assert found["acc_others"] == pytest.approx(right(task.model, split, others, split.label))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_the_trained_network_as_it_was(tied, name):
    _, task = tied
    before = copy.deepcopy(task.model.state_dict())
    hooks = [len(module._forward_hooks) for module in task.model.modules()]
    row = compute_erasure(task, name)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    assert [len(module._forward_hooks) for module in task.model.modules()] == hooks
    assert not task.model.training
    assert all(layer.mode == "memorize" for layer in tied_layers(task.model))
    assert row["method"] == name
    assert 0 <= row["acc_others"] <= 1


def test_training_on_fewer_than_two_examples_is_refused(tied):
    """Accuracies of a network that was never trained would look like results."""
    _, task = tied
    chosen = task.split.subset(task.rows)  # noisy ones, which leave no clean ones and no others
    alone = dataclasses.replace(task, split=chosen, rows=torch.arange(chosen.n))
    for method in (erasure.retrain_critical, erasure.fine_tune, erasure.train_again):
        with pytest.raises(RunFailed, match="0 examples to train on"), method(alone):
            pass


def test_rewinding_and_retraining_change_one_layer(tied):
    _, task = tied
    final = task.model.state_dict()
    for name in ("rewind_critical_layer", "retrain_critical_layer"):
        with METHODS[name](task) as erased:
            changed = {
                key
                for key, parameter in erased.model.named_parameters()
                if not torch.equal(parameter, final[key])
            }
        (group,) = [g for g in layer_groups(task.model) if g.name == erased.layer]
        assert changed
        assert all(group.owns(key) for key in changed)


def test_a_layer_is_retrained_by_its_schedule_in_the_training_s_batch_order(tied, monkeypatch):
    _, task = tied
    seen = []
    monkeypatch.setattr(erasure, "train_epoch", lambda *given: seen.append(given[3]))
    with erasure.retrain_critical(task):
        pass
    found = {(own.seed, own.train.schedule, own.train.peak_lr) for own in seen}
    assert found == {(task.config.seed, "triangle", task.config.retraining.peak_lr)}
    assert len(seen) == task.config.retraining.epochs


def test_the_critical_layer_is_the_one_whose_rewinding_costs_most(tied):
    _, task = tied
    noisy = task.split.memorized.nonzero().flatten()
    accuracy = {}
    for group in layer_groups(task.model):
        model = copy.deepcopy(task.model)
        state = model.state_dict()
        for key, _ in model.named_parameters():
            if group.owns(key):
                state[key].copy_(task.earlier[key])
        accuracy[group.name] = right(model, task.split, noisy, task.split.label)
    found, _ = erasure.most_critical_layer(task)
    assert accuracy[found.name] == min(accuracy.values())


def test_flipping_units_flip_every_example_alone(tied):
    _, task = tied
    batch = Examples.of(task.split, task.rows)
    with UnitGates(task.model) as gates:
        found = erasure.find_flipping_units(task, gates)
        assert 0 < len(found) < gates.count
        before = run_gated(task.model, gates, batch).argmax(1)
    assert torch.equal(before, batch.label)


def test_places_that_the_network_lacks_are_a_mistake_of_the_user(tied):
    _, task = tied
    wrong = dataclasses.replace(task.config.dropout, sites=("conv9",))
    task = dataclasses.replace(task, config=dataclasses.replace(task.config, dropout=wrong))
    method = erasure.close_flipping_units(task)
    with pytest.raises(UserError, match="dropout: sites: the network has no module conv9"), method:
        pass


def test_the_rest_holds_every_example_but_the_chosen(tied):
    _, task = tied
    chosen = set(task.split.index[task.rows].tolist())
    rest = set(task.rest.index.tolist())
    assert not chosen & rest
    assert chosen | rest == set(task.split.index.tolist())


def test_methods_without_tied_neurons_are_those_of_plain_networks(tied):
    run, _ = tied
    plain = dataclasses.replace(
        run.config, dropout=dataclasses.replace(run.config.dropout, kind="none")
    )
    assert set(METHODS) - set(methods_of(Run.of(plain))) == set(erasure.TIED_ONLY)
    assert methods_of(run) == list(METHODS)


def test_the_command_writes_a_row_for_every_method(tied):
    run, _ = tied
    erasure.EXPERIMENT.main(run)
    rows = erasure.ERASURES.read(run.directory)
    assert [row["method"] for row in rows] == list(METHODS)
    assert rows[0]["acc_erased"] == 1
    assert erasure.EXPERIMENT.is_done(run)
