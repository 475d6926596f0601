"""A GPU computes what a CPU computes, and no training step waits for it.

Waiting and stray tensors show without a GPU too: torch's 'meta' device knows shapes only, so that
reading a value from it, or mixing it with values of the CPU, is an error.
"""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import example_tied_dropout
import gradient_accounting
import layer_retraining
import layer_rewinding
import neuron_flipping
from data import Examples, Split, normalize
from engine.config.load import load_configs
from engine.flipping import cached_passes
from engine.flipping.gates import Gates
from engine.runs.run import Run
from engine.runs.tables import HISTORY
from engine.training import epoch as epochs
from engine.training import loop
from engine.training.build import load_split, make_model
from engine.training.devices import compute_precision
from engine.training.evaluation import evaluate_split
from engine.training.record import PlainBackward
from gradient_accounting import GradientAccountant
from models.folding import folded
from models.layer_groups import layer_groups
from tests.conftest import TINY
from tests.engine.training.test_interruptions import send_signal_at

VIT = (
    "model.name=vit_small", "model.width=1.0", "model.patch=4", "model.dim=16", "model.depth=2",
    "model.heads=2", "model.dim_head=8", "model.mlp_dim=16",
)  # fmt: skip
TIED = ("dropout.kind=example_tied", "dropout.p_mem=0.5")


# ---------------------------------------------------------------- no step waits


class WaitingCopies(TorchDispatchMode):
    """Counts copies from the CPU to another device that the CPU waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is torch.ops.aten._to_copy.default:
            leaves = arguments[0].device.type == "cpu" and named.get("device", "cpu") != "cpu"
            self.count += leaves and not named.get("non_blocking", False)
        return function(*arguments, **named)


@pytest.mark.parametrize("accounting", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.augment=true",),
        ("model.width=0.1", *TIED),
        ("dropout.kind=standard",),
        ("model.width=0.1", "dropout.kind=sparse"),
        (*VIT, *TIED),
    ],
    ids=lambda overrides: overrides[-1] if overrides else "plain",
)
def test_a_training_step_never_waits_for_its_device(tiny, monkeypatch, overrides, accounting):
    """But for the epoch's order, and a look at the losses once in many steps."""
    config, device = tiny(*overrides), torch.device("meta")
    split = load_split(config)
    model = make_model(config, split).to(device)
    split = split.to(device)
    accountant = (GradientAccountant if accounting else PlainBackward)(model)
    optimizer = loop.make_optimizer(model.parameters(), config.train)
    looks = []
    monkeypatch.setattr(epochs.EpochWalk, "require_finite", lambda walk: looks.append(walk))
    with WaitingCopies() as copies:
        loop.train_epoch(model, optimizer, split, config, 1, accountant.backward)
    assert len(looks) == 2, "at the first of five steps, and after the last"
    assert copies.count == 1, "the epoch's order"
    train, test = evaluate_split(model, split)
    assert {train.correct.device, test.loss.device} == {device}


def test_reading_and_mixing_are_errors_there():
    """The meta device fails where a value is read, which the test above relies on."""
    value = torch.ones(3, device="meta")
    for wait in (value.tolist, value[0].item, value.cpu, value.nonzero, lambda: bool(value[0])):
        with pytest.raises((NotImplementedError, RuntimeError)):
            wait()
    with pytest.raises(RuntimeError, match="device"):
        value + torch.ones(3)
    with WaitingCopies() as copies:
        torch.ones(3).to("meta", non_blocking=True)
        assert copies.count == 0
        torch.ones(3).to(value)
        assert copies.count == 1


def test_flipping_waits_for_scores_alone(tiny, monkeypatch):
    """Neither the reference batch's gradient nor the accuracy on the others is looked at."""
    config, device = tiny(), torch.device("meta")
    monkeypatch.setitem(cached_passes.ROWS, "meta", 32)
    monkeypatch.setitem(cached_passes.PASS_BYTES, "meta", 1 << 30)
    split = load_split(config)
    model = folded(make_model(config, split)).to(device)
    images, label = split.images[:40].to(device), split.label[:40].to(device)
    with Gates(model) as gates:
        copies = Examples(normalize(images[:, None].expand(-1, 2, -1, -1, -1)), label)
        reference = cached_passes.ReferenceGradient(model, gates, copies, memory=1e9)
        given = Examples(images, label)
        correct = cached_passes.Correctness(model, gates, given, memory=1e9)
        with WaitingCopies() as copies:
            for closed in (frozenset(), frozenset({0, 40}), frozenset({gates.count - 1})):
                assert reference.of(closed).shape == (gates.count,)
                assert correct._known(closed)[-1].shape == (40,)
        assert copies.count == 0


# ---------------------------------------------------------------- fake CUDA: types and devices


@pytest.fixture
def fake_cuda(monkeypatch):
    """Inside, tensors and models can be moved to a CUDA device that computes shapes and types only.

    Unlike the meta device it has autocast; a backward pass would need a driver.
    """
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("engine.training.evaluation._memory_of", lambda device: 80 << 30)

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return mode.from_tensor(tensor).to("cuda")

    def moved(model: torch.nn.Module, split: Split) -> tuple[torch.nn.Module, Split]:
        for module in model.modules():
            for name, value in [*module.named_parameters(recurse=False)]:
                module._parameters[name] = torch.nn.Parameter(move(value.detach()), False)
            for name, value in [*module.named_buffers(recurse=False)]:
                module._buffers[name] = move(value)
        fields = {field.name: getattr(split, field.name) for field in dataclasses.fields(split)}
        tensors = {name: move(t) for name, t in fields.items() if torch.is_tensor(t)}
        return model, dataclasses.replace(split, **tensors)

    return mode, moved


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(
    "overrides",
    [(), ("model.width=0.1", *TIED), VIT, ("model.name=resnet50", "model.width=1.0")],
    ids=["resnet9", "tied", "vit", "resnet50"],
)
def test_evaluation_stays_on_its_device_in_every_precision(tiny, fake_cuda, overrides, precision):
    config = tiny(*overrides)
    split = load_split(config)
    mode, moved = fake_cuda
    model, split = moved(make_model(config, split), split)
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    with mode, compute_precision(precision, torch.device("cuda")):
        train, test = evaluate_split(model, split)
    for outcome in (train, test):
        assert outcome.loss.dtype == torch.float32
        assert {outcome.loss.device.type, outcome.prediction.device.type} == {"cuda"}
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set(seen) <= {half}
    assert bool(seen) == ("model.name=vit_small" not in overrides)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rewinding_stays_on_its_device(tiny, fake_cuda, precision):
    config = tiny()
    split = load_split(config)
    mode, moved = fake_cuda
    model, split = moved(make_model(config, split).eval(), split)
    earlier = {0: layer_groups(model)}
    with mode, compute_precision(precision, torch.device("cuda")), torch.no_grad():
        own, rewound = layer_rewinding.compute_predictions(
            layer_groups(model), earlier, split.images
        )
        assert {own.device.type, rewound[0].device.type} == {"cuda"}


# ---------------------------------------------------------------- only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides", [(), (*VIT, "model.dropout=0.1", "data.augment=true")], ids=["resnet9", "vit"]
)
def test_an_interrupted_training_resumes_its_random_states(tiny, tmp_path, monkeypatch, overrides):
    """Dropout's masks after the interruption are those of an uninterrupted training."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    runs = [
        Run.of(tiny(*overrides, "device=cuda", f"output_dir={tmp_path / name}")) for name in "ab"
    ]
    gradient_accounting.EXPERIMENT.main(runs[0])
    send_signal_at(runs[1], monkeypatch, step=7)
    assert runs[1].within_path.exists()
    gradient_accounting.EXPERIMENT.main(runs[1])
    tables = [HISTORY.read(run.directory) for run in runs]
    for ours, others in zip(*tables, strict=True):
        assert others == {name: pytest.approx(value, rel=0.02) for name, value in ours.items()}


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", ["true", "graphs"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_compiled_training_is_near_an_eager_one(tiny, tmp_path, precision, way):
    tables = []
    for wanted in ("false", way):
        place = (f"output_dir={tmp_path}", f"train.compile={wanted}", "device=cuda")
        run = Run.of(tiny("train.epochs=2", f"precision={precision}", *place))
        gradient_accounting.EXPERIMENT.main(run)
        tables.append(HISTORY.read(run.directory))
    for ours, others in zip(*tables, strict=True):
        assert others["loss_total"] == pytest.approx(ours["loss_total"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(
    "overrides", [VIT, ("model.name=resnet50", "model.width=1.0")], ids=["vit", "resnet50"]
)
def test_other_networks_train(tiny, overrides, precision):
    run = Run.of(tiny(*overrides, "device=cuda", f"precision={precision}", "train.epochs=4"))
    gradient_accounting.EXPERIMENT.main(run)
    first, *_, last = HISTORY.read(run.directory)
    assert last["loss_total"] < first["loss_total"]


# ---------------------------------------------------------------- the same numbers

TRAINED = (
    "data.train_size=80", "model.width=0.12", "train.epochs=20", "train.batch_size=16",
    "train.peak_epoch=5", "flipping.examples=8", "flipping.reference_batch=40",
    "flipping.noise_copies=2", "retraining.epochs=1", "retraining.peak_epoch=1",
    "rewinding.epochs=[0,5,10]",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A configuration whose runs, with and without dropout, were trained on the CPU."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "trained.yaml"
    path.write_text(TINY + f"output_dir: {folder / 'runs'}\n")
    (config,) = load_configs(path, TRAINED)
    gradient_accounting.EXPERIMENT.main(Run.of(config))
    (config,) = load_configs(path, (*TRAINED, *TIED))
    run = Run.of(example_tied_dropout.without_accounting(config))
    example_tied_dropout.train(run, torch.device("cpu"))
    return path


def measured(script, trained: Path, place: Path, device: str, *overrides: str) -> list[dict]:
    """The rows of a script's table on this device, in a copy of the trained runs."""
    shutil.copytree(trained.with_name("runs"), place / device)
    elsewhere = (f"output_dir={place / device}", f"device={device}")
    (config,) = load_configs(trained, (*TRAINED, *overrides, *elsewhere))
    if script is example_tied_dropout:
        config = script.without_accounting(config)
    run = Run.of(config)
    assert run.finished
    script.EXPERIMENT.main(run)
    return script.EXPERIMENT.tables[0].read(run.directory)


# On the CPU these compare a run with itself, and show that the tests run and that it is repeatable.
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EXAMPLES = 2 / 64  # two of the clean ones: rounding may move those at the border


@DEVICES
@pytest.mark.parametrize(
    ("script", "overrides", "tolerance"),
    [
        (layer_rewinding, (), EXAMPLES),
        (example_tied_dropout, TIED, EXAMPLES),
        (layer_retraining, (), 0.15),  # five steps of training on top
    ],
    ids=["rewinding", "dropout", "retraining"],
)
def test_accuracies_are_the_same(trained, tmp_path, device, script, overrides, tolerance):
    here = measured(script, trained, tmp_path / "a", "cpu", *overrides)
    there = measured(script, trained, tmp_path / "b", device, *overrides)
    assert len(here) == len(there) > 1
    for ours, others in zip(here, there):
        for name, value in ours.items():
            if name.startswith("acc_"):
                assert others[name] == pytest.approx(value, abs=tolerance), (ours, others)
            else:
                assert str(others[name]) == str(value)


@DEVICES
def test_the_same_neurons_are_closed(trained, tmp_path, device):
    """But where two scores are nearly equal."""
    here = measured(neuron_flipping, trained, tmp_path / "a", "cpu")
    there = measured(neuron_flipping, trained, tmp_path / "b", device)
    assert [row["example"] for row in here] == [row["example"] for row in there]
    same = [a["neurons_ids"] == b["neurons_ids"] for a, b in zip(here, there)]
    assert sum(same) >= 0.75 * len(same), list(zip(here, there))


@DEVICES
def test_the_same_gradients_are_accounted(tiny, tmp_path, device):
    """Over the first epoch; later ones follow other weights, by rounding."""
    tables = []
    for name in ("cpu", device):
        place = (f"output_dir={tmp_path / str(len(tables))}", f"device={name}")
        run = Run.of(tiny("train.epochs=1", *place))
        gradient_accounting.EXPERIMENT.main(run)
        tables.append(gradient_accounting.ACCOUNTS.read(run.directory))
    for ours, others in zip(*tables, strict=True):
        assert others == {name: pytest.approx(value, rel=0.01) for name, value in ours.items()}
