"""Gradient accounting agrees with a slow, obvious reference, and its rows with one another."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import gradient_accounting
from data import Batch
from engine.runs.run import Run
from engine.runs.tables import LAYERS
from engine.training.build import load_split, make_model
from gradient_accounting import ACCOUNTS, GradientAccountant, compute_row
from models import build_model
from models.layer_groups import layer_groups

MODELS = {
    "resnet9": {"width": 0.1},
    "resnet50": {},
    "vit_small": {"patch": 4, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "dropout": 0.0},
}


def make_batches(count: int, size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(count):
        memorized = torch.rand(size, generator=generator) < 0.3
        memorized[0], memorized[1] = True, False
        found.append(
            Batch(
                image=torch.rand(size, 1, 20, 20, generator=generator, dtype=torch.float64) - 0.5,
                label=torch.randint(10, (size,), generator=generator),
                memorized=memorized,
                index=torch.arange(size) + step * size,
            )
        )
    return found


def slow_reference(model, batches, learning_rate):
    """A copy of the model and a forward pass of its own for each subset, one example at a time."""
    groups = layer_groups(model)
    sums = {"clean": {}, "noisy": {}}
    for batch in batches:
        for subset, chosen in (("clean", ~batch.memorized), ("noisy", batch.memorized)):
            twin = copy.deepcopy(model)
            logits = twin(batch.image)
            for i in chosen.nonzero().flatten():
                loss = F.cross_entropy(logits[i : i + 1], batch.label[i : i + 1])
                (loss / len(batch.label)).backward(retain_graph=True)
            for name, parameter in twin.named_parameters():
                sums[subset][name] = sums[subset].get(name, 0) + parameter.grad
        model.zero_grad()
        F.cross_entropy(model(batch.image), batch.label).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= learning_rate * parameter.grad
    rows = []
    for group in groups:
        clean, noisy = (
            torch.cat([sums[s][name].flatten() for name in group.parameters(model)])
            for s in ("clean", "noisy")
        )
        root = math.sqrt(len(clean))
        rows.append(
            (
                clean.norm() / root,
                noisy.norm() / root,
                (clean + noisy).norm() / root,
                F.cosine_similarity(clean, noisy, dim=0),
                len(clean),
            )
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow(reason="twenty seconds for a big model"))
        if name == "resnet50"
        else name
        for name in MODELS
    ],
)
def test_agrees_with_the_slow_reference(name):
    make = {"channels": 1, "classes": 10, "image_size": 20, "seed": 0, **MODELS[name]}
    model = build_model(name, **make).double().train()
    steps, size = (2, 5) if name == "resnet50" else (3, 8)  # it takes its time
    expected = slow_reference(copy.deepcopy(model), make_batches(steps, size), learning_rate=0.1)

    accountant = GradientAccountant(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in make_batches(steps, size):
        losses = F.cross_entropy(model(batch.image), batch.label, reduction="none")
        optimizer.zero_grad()
        accountant.backward(losses, batch)
        optimizer.step()
    rows = accountant.epoch_rows(epoch=1)

    names = ("norm_clean", "norm_noisy", "norm_total", "cosine", "parameters")
    found = torch.tensor([[row[n] for n in names] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert [row["group"] for row in rows] == list(range(len(layer_groups(model))))


def test_the_gradient_that_the_optimizer_gets_is_that_of_the_mean_loss():
    model = build_model("resnet9", channels=1, classes=10, image_size=20, seed=0, width=0.1)
    model = model.double().train()
    twin = copy.deepcopy(model)
    (batch,) = make_batches(1, 12)
    accountant = GradientAccountant(model)
    losses = F.cross_entropy(model(batch.image), batch.label, reduction="none")
    accountant.backward(losses, batch)
    F.cross_entropy(twin(batch.image), batch.label).backward()
    for own, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_sums_begin_anew_every_epoch():
    model = build_model("resnet9", channels=1, classes=10, image_size=20, seed=0, width=0.1)
    model.double().eval()  # no batch statistics: the same gradient every time
    (batch,) = make_batches(1, 12)
    accountant = GradientAccountant(model)
    found = []
    for epoch in (1, 2):
        losses = F.cross_entropy(model(batch.image), batch.label, reduction="none")
        accountant.backward(losses, batch)
        found.append(accountant.epoch_rows(epoch)[0]["norm_total"])
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert accountant.epoch_rows(3)[0]["norm_total"] == 0


def test_cosine_of_known_vectors():
    clean, noisy = [torch.tensor([3.0, 0.0])], [torch.tensor([-4.0, 4.0])]
    row = compute_row(clean, noisy)
    assert row["norm_clean"] == pytest.approx(3 / math.sqrt(2))
    assert row["norm_noisy"] == pytest.approx(4)
    assert row["norm_total"] == pytest.approx(math.sqrt(17 / 2))
    assert row["cosine"] == pytest.approx(-math.sqrt(0.5))
    assert math.isnan(compute_row(clean, [torch.zeros(2)])["cosine"])


@pytest.mark.parametrize("model", ["resnet9", "resnet50", "vit_small"])
def test_the_identity_of_norms_holds_in_every_row_of_a_run(tiny, model):
    options = {
        "resnet9": [],
        "resnet50": ["model.width=1.0", "data.train_size=48", "train.epochs=1"],
        "vit_small": [
            "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=2",
            "model.heads=2", "model.dim_head=8", "model.mlp_dim=16",
        ],
    }  # fmt: skip
    run = Run.of(tiny(f"model.name={model}", *options[model]))
    gradient_accounting.EXPERIMENT.main(run)
    rows = ACCOUNTS.read(run.directory)
    assert (
        len(rows) == run.config.train.epochs * {"resnet9": 9, "resnet50": 6, "vit_small": 4}[model]
    )
    for row in rows:
        clean, noisy, cosine = row["norm_clean"], row["norm_noisy"], row["cosine"]
        expected = clean**2 + noisy**2 + 2 * cosine * clean * noisy
        assert row["norm_total"] ** 2 == pytest.approx(expected, rel=1e-6, abs=1e-9 * clean**2)
        assert clean > 0
        assert noisy > 0
        assert -1 <= cosine <= 1


def test_training_without_accounting_leaves_no_table(tiny):
    run = Run.of(tiny("train.account_gradients=false"))
    assert run.directory != Run.of(tiny()).directory
    gradient_accounting.EXPERIMENT.main(run)
    assert run.finished
    assert not (run.directory / "gradient_accounting.csv").exists()


def test_accounting_does_not_change_what_is_learned(tiny):
    """Two backward passes round differently from one, and no more than that."""
    histories = []
    for accounting in ("true", "false"):
        run = Run.of(tiny(f"train.account_gradients={accounting}", "train.epochs=1"))
        gradient_accounting.EXPERIMENT.main(run)
        state = run.read_checkpoint(1)
        histories.append(torch.cat([v.flatten().double() for v in state.values()]))
    torch.testing.assert_close(*histories, rtol=1e-2, atol=1e-4)


def test_without_noise_there_is_nothing_to_account_for_the_noisy(tiny):
    run = Run.of(tiny("data.noise_rate=0", "train.epochs=1"))
    gradient_accounting.EXPERIMENT.main(run)
    for row in ACCOUNTS.read(run.directory):
        assert row["norm_noisy"] == 0
        assert row["norm_total"] == row["norm_clean"]
        assert math.isnan(row["cosine"])


def test_a_run_names_its_layers(tiny):
    run = Run.of(tiny("train.epochs=1"))
    gradient_accounting.EXPERIMENT.main(run)
    rows = LAYERS.read(run.directory)
    model = make_model(run.config, load_split(run.config))
    assert [row["layer"] for row in rows] == list(range(9))
    assert [row["name"] for row in rows] == [name for name, *_ in model.stages()]
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
