"""Resolution of `auto` on a machine: device, precision; messages about its GPU.

No GPU is needed: torch is made to report one, and is asked for nothing else.
"""

import dataclasses

import pytest
import torch

import gradient_accounting
import layer_rewinding
from engine import machine
from engine.config.load import load_configs
from engine.launch.cli import run_script
from engine.runs import files, provenance
from engine.runs.identity import identity_of, measuring_precision, resolved, run_directory
from engine.runs.run import Run
from engine.training.devices import describe_computing, resolve_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of a compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Fake")

    return pretend


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("capability", "device", "expected"),
    [((9, 0), "auto", "tf32"), ((8, 6), "cuda", "tf32"), ((7, 5), "auto", "fp32"),
     ((9, 0), "cpu", "fp32")],
)  # fmt: skip
def test_auto_is_tf32_where_tensor_cores_have_it(tiny, gpu, capability, device, expected):
    gpu(*capability)
    config = tiny(f"device={device}")
    assert config.precision == "auto"
    assert resolved(config).precision == Run.of(config).config.precision == expected
    explicit = tiny(f"device={device}", f"precision={expected}")
    assert identity_of(config) == identity_of(explicit)
    assert run_directory(config) == run_directory(explicit)


def test_fp32_keeps_the_identity_that_it_always_had(tiny, gpu):
    directory = run_directory(tiny())
    assert directory == run_directory(tiny("precision=fp32"))
    assert "fp32" not in directory.parent.name
    gpu(9, 0)
    assert run_directory(tiny("device=auto", "precision=fp32")) == directory
    assert run_directory(tiny("device=auto")) != directory
    assert "tf32" in run_directory(tiny("device=auto")).parent.name


def test_a_run_that_another_machine_began_is_found_again(tiny, gpu):
    """A finished fp32 run stays the run of its configuration on a GPU, and is not trained again."""
    run = Run.of(tiny("train.epochs=1"))
    gradient_accounting.EXPERIMENT.main(run)
    gpu(9, 0)
    again = Run.of(tiny("train.epochs=1", "device=auto"))
    assert again.directory == run.directory
    assert again.config.precision == "fp32"
    assert again.finished


def test_config_and_provenance_say_the_resolved_precision(tiny):
    run = Run.of(tiny("train.epochs=1"))
    gradient_accounting.EXPERIMENT.main(run)
    (saved,) = load_configs(run.config_path)
    assert (saved.precision, saved.train.compile) == ("fp32", False)
    assert files.read_json(run.provenance_path)["precision"] == "fp32"


# ---------------------------------------------------------------- measuring


def test_measuring_never_takes_bf16_unless_asked_to(tiny, gpu):
    gpu(9, 0)
    for trained, asked, cpu, cuda in (
        ("fp32", "auto", "fp32", "fp32"),
        ("tf32", "auto", "fp32", "tf32"),
        ("bf16", "auto", "fp32", "tf32"),
        ("bf16", "bf16", "bf16", "bf16"),
        ("fp32", "tf32", "tf32", "tf32"),
    ):
        config = tiny(f"precision={trained}", f"measure_precision={asked}")
        assert measuring_precision(config, CPU) == cpu
        assert measuring_precision(config, CUDA) == cuda


def test_a_table_says_in_which_precision_it_was_measured(tiny):
    """A run trained in bf16 is measured in fp32; measuring in bf16 is another table."""
    run = Run.of(tiny("precision=bf16", "train.epochs=1", "rewinding.epochs=[0,1]"))
    gradient_accounting.EXPERIMENT.main(run)
    layer_rewinding.EXPERIMENT.main(run)
    source = run.directory / "layer_rewinding.json"
    assert files.read_json(source)["precision"] == "fp32"
    assert run.identity == Run.of(run.config).identity
    other = Run.at(run.directory, ("measure_precision=bf16",))
    assert layer_rewinding.EXPERIMENT.is_done(Run.at(run.directory))
    assert not layer_rewinding.EXPERIMENT.is_done(other)
    layer_rewinding.EXPERIMENT.main(other)
    assert files.read_json(source)["precision"] == "bf16"


# ---------------------------------------------------------------- what is said


def test_the_first_line_names_device_and_precision(tiny_file, capsys):
    arguments = [str(tiny_file), "--dry-run"]
    assert run_script(gradient_accounting.EXPERIMENT, "", arguments) == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("Device: cpu, ")
    assert first.endswith("threads); precision: fp32")
    assert not others


def test_a_gpu_is_named_with_the_precision_that_it_gets(tiny, gpu):
    gpu(9, 0)
    assert describe_computing([tiny("device=auto")]) == "Device: cuda, NVIDIA Fake; precision: tf32"
    trained = describe_computing([tiny("device=auto", "precision=bf16")])
    assert trained == "Device: cuda, NVIDIA Fake; precision: bf16; measured in tf32"


@pytest.mark.parametrize(
    ("cuda", "driver", "said"),
    [
        (None, "470.57.02", "was built without CUDA; install a torch built with CUDA"),
        ("13.2", None, "its driver is not loaded, or not visible in this container; install"),
        (
            "13.2", "470.57.02",
            "was built for CUDA 13.2: The NVIDIA driver is too old (found version 11040); update "
            "the driver, or install a torch built for an older CUDA",
        ),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_a_warning_with_its_cure(
    tiny, monkeypatch, cuda, driver, said
):
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver is too old (found version 11040). Please update.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine, "_has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, warning = describe_computing([tiny("device=auto")]).splitlines()
    assert first.startswith("Device: cpu, ")
    assert warning.startswith("Warning: this machine has an NVIDIA GPU")
    assert said in warning
    assert "\n" not in describe_computing([tiny("device=cpu")]), "the CPU was asked for"
    with pytest.raises(Exception, match=r"no usable GPU; use cpu .this machine has an NVIDIA GPU"):
        resolve_device(dataclasses.replace(tiny(), device="cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu_problem() is None, "it is hidden on purpose"


def test_a_driver_is_read_from_what_it_says(tmp_path):
    path = tmp_path / "version"
    assert machine.driver_version(path) is None
    path.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version: 12\n"
    )
    assert machine.driver_version(path) == "535.129.03"


def test_provenance_describes_the_gpu(gpu, monkeypatch):
    gpu(9, 0)
    properties = dataclasses.make_dataclass("Properties", ["total_memory"])(80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = provenance.describe(CUDA, "tf32")
    assert found["precision"] == "tf32"
    assert found["gpu"]["compute_capability"] == "9.0"
    assert (found["gpu"]["cudnn"], found["gpu"]["cuda"]) == (91900, torch.version.cuda)
    assert found["gpu"]["memory"] == 80 << 30
    assert "gpu" not in provenance.describe(CPU, "fp32")
