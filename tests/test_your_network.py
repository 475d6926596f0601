"""The examples of docs/your_network.md, as written there, with fewer images and epochs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import plot_results
from engine.config.load import load_configs
from engine.launch.cli import run_script
from models import build_model
from models.any_network import NetworkError
from models.layer_groups import layer_groups

PAGE = Path(__file__).parents[1] / "docs" / "your_network.md"
QUICK = (
    "data.train_size=40", "data.test_size=20", "train.epochs=2", "train.peak_epoch=1",
    "train.batch_size=20", "device=cpu",
)  # fmt: skip
OF_SCRIPT = {
    "gradient_accounting": (),
    "layer_rewinding": ("rewinding.epochs=all",),
    "layer_retraining": ("retraining.epochs=1", "retraining.peak_epoch=1"),
    "neuron_flipping": (
        "flipping.examples=2", "flipping.max_neurons=3", "flipping.remaining=20",
        "flipping.reference_batch=10",
    ),
    "example_tied_dropout": ("dropout.forget_draws=1",),
}  # fmt: skip
LAYERS = {1: 6, 2: 9, 3: 3}


def example(number: int) -> str:
    text = PAGE.read_text(encoding="utf-8")
    return re.search(rf"## Example {number}: (.*?)\n## ", text, re.DOTALL).group(1)


def saved_files(text: str) -> dict[str, str]:
    """The blocks that the text tells to save, by name."""
    found = re.findall(r"this as `([\w.]+)`:\n\n```(?:yaml|python)\n(.*?)```", text, re.DOTALL)
    return dict(found)


def commands(text: str) -> list[str]:
    (block,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line.removeprefix("$ ") for line in block.splitlines()]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_example_from_its_files_to_a_report(number, tmp_path, monkeypatch, no_figures, capsys):
    monkeypatch.chdir(tmp_path)
    text = example(number)
    for name, content in saved_files(text).items():
        Path(name).write_text(content)
    for command in commands(text):
        python, script, *arguments = shlex.split(command)
        assert python == "python"
        if script == "plot_results.py":
            assert plot_results.main(arguments) == 0
            continue
        module = importlib.import_module(script.removesuffix(".py"))
        quick = [*arguments, *QUICK, *OF_SCRIPT[module.__name__]]
        status = run_script(module.EXPERIMENT, module.__doc__, quick)
        assert status == 0, capsys.readouterr().err
    assert Path("runs/report.html").exists()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_layers_are_those_that_the_page_tells(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in saved_files(example(number)).items():
        Path(name).write_text(content)
    (config,) = load_configs(next(Path.cwd().glob("*.yaml")))
    model = build_model(
        config.model.name, channels=1, classes=10, image_size=20, seed=0, proof=False,
        **config.model.arguments,
    )  # fmt: skip
    assert len(layer_groups(model)) == LAYERS[number]


def test_the_forward_pass_that_cannot_be_traced_is_refused(tmp_path, monkeypatch):
    """The page's own forward, in the network that the page then writes as a chain."""
    text = example(3)
    forward = re.search(r"```python\n(def forward.*?)```", text, re.DOTALL).group(1)
    source = saved_files(text)["checked.py"]
    begin, end = source.index("    def stages"), source.index("    def first")
    indented = "".join(f"    {line}\n" for line in forward.splitlines())
    plain = source[:begin] + indented
    assert end > begin
    plain = plain.replace("class Checked(StagedModel)", "class Checked(nn.Module)")
    (tmp_path / "untraced.py").write_text(plain)
    with pytest.raises(NetworkError, match=r"untraced.py, line \d+: if not images.isfinite"):
        build_model(
            f"{tmp_path}/untraced.py:Checked", channels=1, classes=10, image_size=20, seed=0
        )


def test_default_layers_of_resnet18_are_those_of_the_example():
    network = build_model(
        "torchvision:resnet18", channels=1, classes=10, image_size=20, seed=0, proof=False
    )
    (names,) = re.findall(r"layers: \[(conv1, layer1, layer2.*?)\]", example(1))
    assert [group.name for group in layer_groups(network)] == names.split(", ")
