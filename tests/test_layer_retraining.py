"""Layer retraining freezes what it says, starts where it says, and sees whom it says."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gradient_accounting
import layer_retraining
import layer_rewinding
from data import batches, epoch_order
from engine.launch.cli import run_script
from engine.runs.run import Run
from engine.training import epoch as one_epoch
from engine.training.build import load_final_model, load_split
from engine.training.evaluation import evaluate, mean_by_subset
from layer_retraining import RETRAINING, compute_retraining, reset_group, retraining_config
from models.layer_groups import layer_groups
from tests.killing import killed_at_write

CPU = torch.device("cpu")
SHORT = ("retraining.epochs=2", "retraining.peak_epoch=1")
VIT = (
    "model.name=vit_small", "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=2",
    "model.heads=2", "model.dim_head=8", "model.mlp_dim=16", "retraining.peak_lr=0.01",
)  # fmt: skip


def trained(config) -> Run:
    run = Run.of(config)
    gradient_accounting.EXPERIMENT.main(run)
    return run


@pytest.fixture
def finished(tiny) -> Run:
    return trained(tiny(*SHORT))


def table(run: Run) -> list[dict[str, float]]:
    return RETRAINING.read(run.directory)


def at(run: Run, *overrides: str) -> Run:
    return Run.at(run.directory, overrides)


class Setting:
    """A finished run's final model with one group reset, ready to be retrained."""

    def __init__(self, run: Run, index: int) -> None:
        self.split = load_split(run.config)
        self.final = load_final_model(run, self.split, CPU)
        self.initial = run.read_checkpoint(0)
        self.group = layer_groups(self.final)[index]
        self.model = reset_group(self.final, self.initial, self.group)
        self.config = retraining_config(run.config, index)

    def retrain(self) -> list[dict[str, float]]:
        return list(compute_retraining(self.model, self.group, self.split, self.config))


# ---------------------------------------------------------------- the traps


def check_one_group(run: Run, index: int, monkeypatch) -> None:
    setting = Setting(run, index)
    split, group, model = setting.split, setting.group, setting.model
    parameters = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        came_from = setting.initial if group.owns(name) else setting.final.state_dict()
        assert torch.equal(value, came_from[name]), name

    optimizers, seen, below = [], [], []
    sgd, cross_entropy = torch.optim.SGD, F.cross_entropy

    def spy_on_sgd(given, **options):
        optimizers.append(sgd(given, **options))
        return optimizers[-1]

    def spy_on_batches(split, *rest, **options):
        for batch in batches(split, *rest, **options):
            seen.append(batch.index)
            yield batch

    def spy_on_gradients(*arguments, **options):
        below.extend(name for name, p in parameters.items() if p.grad is not None)
        return cross_entropy(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", spy_on_sgd)
        patch.setattr(one_epoch, "batches", spy_on_batches)
        patch.setattr(F, "cross_entropy", spy_on_gradients)
        setting.retrain()

    own = {name for name in parameters if group.owns(name)}
    (optimizer,) = optimizers
    held = [p for entry in optimizer.param_groups for p in entry["params"]]
    assert {id(p) for p in held} == {id(parameters[name]) for name in own}
    assert set(below) <= own, "a gradient was computed outside of the group"
    for name, parameter in parameters.items():
        if name in own:
            assert not torch.equal(parameter, setting.initial[name]), f"{name} was not trained"
        else:
            assert torch.equal(parameter, setting.final.state_dict()[name]), f"{name} moved"
    seen = torch.cat(seen).tolist()
    assert sorted(seen) == sorted(2 * split.index[~split.memorized].tolist())
    assert not set(seen) & set(split.index[split.memorized].tolist())
    for name, buffer in model.named_buffers():
        if "running" in name:
            assert not torch.equal(buffer, setting.final.state_dict()[name]), f"{name} is frozen"


@pytest.mark.parametrize("index", [0, 4, 8])
def test_one_group_moves_and_sees_clean_examples_only(finished, monkeypatch, index):
    check_one_group(finished, index, monkeypatch)


def test_the_same_for_a_transformer(tiny, monkeypatch):
    check_one_group(trained(tiny(*VIT, *SHORT)), 1, monkeypatch)


def test_no_gradient_is_computed_below_the_group(finished):
    """Autograd is never asked for what the lower layers put out."""
    setting = Setting(finished, 4)
    requires = []
    hooks = [
        setting.model.get_submodule(group.name).register_forward_hook(
            lambda _module, _inputs, output: requires.append(output.requires_grad)
        )
        for group in layer_groups(setting.model)
    ]
    setting.model.train()(torch.zeros(4, *setting.split.shape))
    for hook in hooks:
        hook.remove()
    assert requires == [False] * 4 + [True] * 5


def test_the_original_model_is_left_alone(finished):
    setting = Setting(finished, 2)
    before = copy.deepcopy(setting.final.state_dict())
    setting.retrain()
    for name, value in setting.final.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad for p in setting.final.parameters())


# ---------------------------------------------------------------- agrees with a slow, obvious twin


def accuracies(model, split) -> dict[str, float]:
    return mean_by_subset(
        evaluate(model, split.images, split.label).correct, split.memorized, "acc"
    )


def test_agrees_with_a_loop_written_out_by_hand(finished):
    setting = Setting(finished, 3)
    twin, split, train = copy.deepcopy(setting.model), setting.split, finished.config.train
    rows = setting.retrain()

    clean = (~split.memorized).nonzero().flatten()
    weights = {n: p for n, p in twin.named_parameters() if n.startswith("conv4.")}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    expected = [accuracies(twin, split)]
    rates = iter([0.025, 0.05, 0.075, 0.1, 0.075, 0.05, 0.025, 0.0])
    for epoch in (1, 2):
        order = clean[epoch_order(len(clean), setting.config.seed, epoch)]
        for chosen in order.split(train.batch_size):
            images = split.images[chosen].float() / 127.5 - 1
            loss = F.cross_entropy(twin.train()(images), split.label[chosen])
            gradients = torch.autograd.grad(loss, list(weights.values()))
            rate = next(rates)
            with torch.no_grad():
                for (name, p), gradient in zip(weights.items(), gradients):
                    velocity[name] *= train.momentum
                    velocity[name] += gradient + train.weight_decay * p
                    p -= rate * velocity[name]
        expected.append(accuracies(twin, split))
    assert next(rates, None) is None
    for (name, own), other in zip(setting.model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6, msg=name)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row, accuracy in zip(rows, expected):
        found = {name: row[name] for name in ("acc_clean", "acc_noisy")}
        assert found | {"acc_total": row["acc_train"]} == pytest.approx(accuracy, abs=0.02)


# ---------------------------------------------------------------- a run


def test_the_table_of_a_run(finished):
    line = layer_retraining.EXPERIMENT.main(finished)
    rows = table(finished)
    assert [(row["group"], row["epoch"]) for row in rows] == [
        (group, epoch) for group in range(9) for epoch in (0, 1, 2)
    ]
    setting = Setting(finished, 5)
    assert rows[15:18] == [
        {name: pytest.approx(value, rel=1e-9) for name, value in row.items()}
        for row in setting.retrain()
    ]
    peaks = [max(row["acc_noisy"] for row in rows[3 * g + 1 : 3 * g + 3]) for g in range(9)]
    ends = [row["acc_noisy"] for row in rows[2::3]]
    assert line.endswith(", ".join(f"{p:.0%} > {e:.0%}" for p, e in zip(peaks, ends)))


def test_atypical_examples_are_not_trained_on_either(tiny, monkeypatch):
    run = trained(tiny("data.split=atypical", *SHORT))
    assert load_split(run.config).memorized.sum() > 3
    check_one_group(run, 8, monkeypatch)
    layer_rewinding.EXPERIMENT.main(run)
    rows = layer_rewinding.REWINDING.read(run.directory)
    assert all(
        0 <= row[name] <= 1 for row in rows for name in layer_rewinding.REWINDING.columns[2:]
    )


def test_groups_have_batches_of_their_own(finished):
    configs = [retraining_config(finished.config, index) for index in (0, 1)]
    orders = [tuple(epoch_order(120, config.seed, 1).tolist()) for config in configs]
    run_order = tuple(epoch_order(120, finished.config.seed, 1).tolist())
    assert len({*orders, run_order}) == 3


def test_killed_at_every_write_and_started_again(finished, monkeypatch):
    layer_retraining.EXPERIMENT.main(finished)
    path = finished.directory / "layer_retraining.csv"
    expected = path.read_bytes()
    retrained, compute = [], layer_retraining.compute_retraining
    monkeypatch.setattr(
        layer_retraining,
        "compute_retraining",
        lambda model, group, *rest: retrained.append(group) or compute(model, group, *rest),
    )

    for moment in (0, 8, 9, 10):  # nine groups, table, source
        for made in [*finished.directory.glob("layer_r*.*"), *finished.directory.glob("parts/*/*")]:
            made.unlink()
        with killed_at_write(moment):
            layer_retraining.EXPERIMENT.main(finished)
        retrained.clear()
        layer_retraining.EXPERIMENT.main(finished)
        assert len(retrained) == max(0, 8 - moment)
        assert path.read_bytes() == expected


def test_other_settings_measure_again_and_the_old_parts_stay(finished, monkeypatch):
    layer_retraining.EXPERIMENT.main(finished)
    first = table(finished)
    layer_retraining.EXPERIMENT.main(at(finished, "retraining.peak_lr=0.05"))
    assert table(finished) != first
    monkeypatch.setattr(layer_retraining, "compute_retraining", None)
    layer_retraining.EXPERIMENT.main(finished)
    assert table(finished) == first


def test_patience_ends_a_group_early(finished, monkeypatch):
    """At 100% clean accuracy for so many epochs in a row; without patience never."""
    perfect = iter([0.5, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(layer_retraining, "train_epoch", lambda *_, **__: None)
    monkeypatch.setattr(
        layer_retraining,
        "mean_by_subset",
        lambda *_: {"acc_clean": next(perfect), "acc_noisy": 0.0, "acc_total": 0.0},
    )
    setting = Setting(at(finished, "retraining.epochs=6", "retraining.patience=2"), 0)
    assert [row["acc_clean"] for row in setting.retrain()] == [0.5, 1.0, 0.9, 1.0, 1.0]
    perfect = iter([1.0] * 7)
    assert len(Setting(at(finished, "retraining.epochs=6"), 0).retrain()) == 7
    perfect = iter([1.0] * 7)
    setting = Setting(at(finished, "retraining.epochs=6", "retraining.patience=1"), 0)
    assert len(setting.retrain()) == 2, "the reset layer's accuracy is no epoch's"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, "no such file; the epochs kept are 1, 2, 3"), (3, "is missing from a finished run")],
)
def test_an_epoch_that_is_needed_and_not_there(finished, capsys, epoch, expected):
    finished.checkpoint_path(epoch).unlink()
    arguments = [str(finished.directory)]
    assert run_script(layer_retraining.EXPERIMENT, "", arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"epoch_{epoch:03d}.pt: {expected}" in error


def test_a_loss_that_is_no_number_names_the_group(finished, capsys):
    arguments = [str(finished.directory), "retraining.peak_lr=1e30"]
    assert run_script(layer_retraining.EXPERIMENT, "", arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "retraining conv1: the loss became nan at epoch 1" in error
    assert "A lower retraining.peak_lr than 1e+30 may help" in error


def test_without_clean_examples_there_is_nothing_to_retrain_on(tiny, capsys):
    run = trained(tiny("data.noise_rate=1", "train.epochs=1"))
    arguments = [str(run.directory)]
    assert run_script(layer_retraining.EXPERIMENT, "", arguments) == 1
    assert "0 clean examples; retraining needs 2 or more" in capsys.readouterr().err
