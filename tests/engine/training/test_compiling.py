"""train.compile: the same training up to rounding, under the same names, with few graphs."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import lowering  # noqa: F401  # its decompositions need it
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler

import example_tied_dropout
import gradient_accounting
from data import Split, normalize
from engine.config.schema import Config
from engine.launch.cli import run_script
from engine.runs.run import Run
from engine.training.build import load_split, make_model
from engine.training.compiling import compiled
from engine.training.devices import compute_precision
from engine.training.evaluation import evaluate
from engine.training.loop import make_optimizer, train_epoch
from engine.training.record import PlainBackward
from models.layer_groups import StagedModel

REPOSITORY = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
# Batches of 32, 32 and 6; in evaluation one of 70 and one of 30.
SMALL = ("data.train_size=70", "data.test_size=30", "train.epochs=2")
GRAPHS = 4
TIED = (
    "dropout.kind=example_tied", "dropout.p_gen=0.5", "dropout.p_mem=0.5", "model.width=0.1",
    "dropout.forget=[1]", "dropout.forget_draws=1",
)  # fmt: skip
ACCOUNTED = ("train.account_gradients=true",)
SCRIPTS = {ACCOUNTED: gradient_accounting, TIED: example_tied_dropout}
BOTH = pytest.mark.parametrize("overrides", SCRIPTS, ids=["accounting", "example-tied"])


# ---------------------------------------------------------------- graphs, without compiling them


def with_backend(monkeypatch, backend: Callable | str) -> None:
    """torch finds the graphs, and this makes a function of each."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def results(run: Run) -> dict[str, object]:
    found = {path.name: path.read_bytes() for path in run.directory.glob("*.csv")}
    for path in sorted(run.directory.glob("checkpoints/*.pt")):
        state = torch.load(path, weights_only=True)["model"]
        found[path.name] = [(name, value.numpy().tobytes()) for name, value in state.items()]
    return found


@BOTH
def test_a_training_finds_a_graph_for_every_size_and_no_more(tiny, monkeypatch, overrides):
    """And going through the graphs as they are is the same training, to the last bit."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    script = SCRIPTS[overrides]
    changed = getattr(script, "without_accounting", lambda config: config)
    whole, run = (
        Run.of(changed(tiny(*SMALL, *overrides, f"train.compile={wanted}")))
        for wanted in ("false", "true")
    )
    assert whole.directory != run.directory
    script.EXPERIMENT.main(whole)
    with_backend(monkeypatch, keep)
    script.EXPERIMENT.main(run)
    assert len(graphs) == GRAPHS
    assert results(run) == results(whole)


def test_a_graph_that_plain_training_made_serves_accounting_too(monkeypatch):
    """Torch would let the backward pass of the one use up what that of the other needs twice."""
    with_backend(monkeypatch, "aot_eager")
    model, images = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.rand(5, 3)
    with compiled(model, True) as network:
        network(images).sum().backward()
        output = network(images)
        for keep_graph in (True, False):
            found = torch.autograd.grad(
                output.sum(), list(model.parameters()), retain_graph=keep_graph
            )
            for gradient, parameter in zip(found, model.parameters()):
                torch.testing.assert_close(gradient, parameter.grad)


@BOTH
def test_cuda_graphs_are_asked_for_and_train_the_same(tiny, monkeypatch, overrides):
    """Here each result is overwritten by the next pass, as a graph that is replayed does."""
    asked, memory = [], {}
    monkeypatch.setattr("engine.training.evaluation.batch_size", lambda device: 20)

    class Overwriting(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            results = self.model(images)
            if (place := memory.get("last")) is not None:
                place.fill_(torch.nan)
            memory["last"] = results.detach()
            return results

    def compile(model, mode=None, **rest):
        asked.append(mode)
        return Overwriting(model)

    script = SCRIPTS[overrides]
    changed = getattr(script, "without_accounting", lambda config: config)
    runs = [
        Run.of(changed(tiny(*SMALL, *overrides, f"train.compile={wanted}")))
        for wanted in ("false", "graphs")
    ]
    script.EXPERIMENT.main(runs[0])
    monkeypatch.setattr(torch, "compile", compile)
    script.EXPERIMENT.main(runs[1])
    assert asked == ["reduce-overhead"]
    assert results(runs[0]) == results(runs[1])


def test_a_missing_compiler_is_one_line(tiny_file, monkeypatch, capsys):
    def fail(graph, inputs):
        raise InvalidCxxCompiler

    with_backend(monkeypatch, fail)
    arguments = [str(tiny_file), "train.compile=true"]
    assert run_script(gradient_accounting.EXPERIMENT, "", arguments) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "train.compile: torch.compile failed: InvalidCxxCompiler: No working C++" in line
    assert line.endswith("on a GPU also Triton; train.compile=false trains without")


@pytest.mark.slow(reason="another process, which imports the compiler: 20 seconds")
def test_a_really_missing_compiler_is_one_line(tiny_file, tmp_path):
    command = [sys.executable, str(REPOSITORY / "gradient_accounting.py"), str(tiny_file)]
    places = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.run(
        [*command, "train.compile=true"],
        env=os.environ | places,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert "torch.compile failed: InvalidCxxCompiler" in process.stderr.splitlines()[-1]


# ---------------------------------------------------------------- compiled against eager


def trained(config: Config, split: Split) -> tuple[StagedModel, list[dict[str, float]]]:
    """A model after two epochs, and what was accounted and evaluated after each."""
    device = split.label.device
    model = make_model(config, split).to(device)
    plain = config.dropout.kind != "none"
    accounting = PlainBackward if plain else gradient_accounting.GradientAccountant
    accountant = accounting(model)
    optimizer, rows = make_optimizer(model.parameters(), config.train), []
    with compute_precision("fp32", device), compiled(model, config.train.compile) as network:
        for epoch in (1, 2):
            train_epoch(network, optimizer, split, config, epoch, accountant.backward)
            train = evaluate(network, split.images, split.label, index=split.index)
            test = evaluate(network, split.test_images, split.test_label)
            rows += accountant.epoch_rows(epoch)
            rows.append({"train": train.loss.mean().item(), "test": test.loss.mean().item()})
    return model, rows


def all_weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def check_against_eager(tiny, device: str, *overrides: str) -> None:
    torch._dynamo.reset()
    eager, other = (tiny(*SMALL, *overrides, f"train.compile={c}") for c in ("false", "true"))
    split = load_split(eager).to(torch.device(device))
    (model, rows), (twin, twin_rows) = trained(eager, split), trained(other, split)
    before = make_model(eager, split).to(split.label.device)
    for own, first in zip(model.parameters(), before.parameters()):
        assert not torch.allclose(own, first, rtol=1e-3, atol=1e-4), "weights that moved"
    assert len(rows) == len(twin_rows)
    for own, others in zip(rows, twin_rows):
        assert others == pytest.approx(own, rel=5e-3, abs=1e-4)
    assert list(twin.state_dict()) == list(model.state_dict())
    ours, others, start = map(all_weights, (model, twin, before))
    assert (others - ours).norm() < 0.05 * (ours - start).norm()
    for own, value in zip(model.buffers(), twin.buffers()):
        torch.testing.assert_close(value, own, rtol=0.01, atol=1e-3)
    if eager.dropout.kind == "example_tied":
        return  # rounding moves the place of a maximum, which changes single weights more
    for (name, own), value in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(value, own, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "vit_small"])
def test_no_gradient_compares_activations(tiny, monkeypatch, name):
    """A backward pass computes some of them again, and in bf16 a GPU then rounds otherwise.

    A maximum that its gradient looks for is not found among them, and 0 / 0 of them share it.
    """
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    config = tiny(f"model.name={name}", "model.width=1.0", "data.train_size=20")
    split = load_split(config)
    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    with_backend(monkeypatch, backend)
    with compute_precision("bf16", CPU), compiled(make_model(config, split), True) as network:
        network(normalize(split.images[:4])).float().sum().backward()
    _, backward = graphs
    assert torch.ops.aten.eq.Tensor not in backward


@pytest.mark.slow(reason="a C++ compiler makes four graphs, backward too: minutes on a busy CPU")
@pytest.mark.timeout(1200)
@BOTH
def test_compiled_agrees_with_eager(tiny, overrides):
    check_against_eager(tiny, "cpu", *overrides)


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@BOTH
def test_compiled_agrees_with_eager_on_a_gpu(tiny, overrides):
    check_against_eager(tiny, "cuda", *overrides)
