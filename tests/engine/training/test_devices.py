"""Precisions: what each may cost, as a distance from fp32, in runs and in single operations."""

import pytest
import torch
import torch.nn.functional as F

import gradient_accounting
from engine.errors import UserError
from engine.runs.run import Run
from engine.runs.tables import HISTORY
from engine.training.devices import compute_precision, resolve_device

RUN = ("data.train_size=300", "data.test_size=300", "model.width=0.1", "train.epochs=8",
       "train.peak_epoch=2")  # fmt: skip


def history(tiny, *overrides: str) -> list[dict[str, float]]:
    run = Run.of(tiny(*RUN, *overrides))
    gradient_accounting.EXPERIMENT.main(run)
    return HISTORY.read(run.directory)


def check_distance(tiny, precision: str, device: str) -> None:
    """Two epochs: losses within 5%. Eight: the loss within 25%, accuracies within 10 points.

    By then rounding has led to other weights, as another seed would have.
    """
    full, other = (history(tiny, f"device={device}", f"precision={p}") for p in ("fp32", precision))
    assert full[-1]["acc_clean"] > 0.8, "a run that learns"
    assert other != full
    for epoch in range(3):
        for name in ("loss_clean", "loss_noisy", "loss_test"):
            assert other[epoch][name] == pytest.approx(full[epoch][name], rel=0.05), (epoch, name)
    assert other[-1]["loss_total"] == pytest.approx(full[-1]["loss_total"], rel=0.25)
    for name in ("acc_clean", "acc_total", "acc_test"):
        assert other[-1][name] == pytest.approx(full[-1][name], abs=0.1), name


@pytest.mark.slow(reason="half a minute where the processor has no bf16 instructions")
def test_bf16_stays_near_fp32(tiny):
    check_distance(tiny, "bf16", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_of_a_gpu_stay_near_fp32(tiny, precision):
    check_distance(tiny, precision, "cuda")


def rounding(precision: str, device: str) -> float:
    """The largest relative error of a convolution and a matrix product of positive numbers."""
    device, generator = torch.device(device), torch.Generator().manual_seed(0)
    image, kernel, matrix = (
        torch.rand(shape, generator=generator).to(device)
        for shape in ((8, 64, 16, 16), (64, 64, 3, 3), (196, 9))
    )
    exact = F.conv2d(image.double(), kernel.double()).flatten(2) @ matrix.double()
    with compute_precision(precision, device):
        found = F.conv2d(image, kernel).flatten(2) @ matrix
    return ((found.double() - exact).abs() / exact).max().item()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have tf32")
def test_a_cpu_measures_nothing_in_tf32(tiny):
    with pytest.raises(UserError, match="measure_precision: 'tf32' is not allowed: a CPU has none"):
        resolve_device(tiny("measure_precision=tf32"))


def test_rounding_on_the_cpu():
    assert rounding("fp32", "cpu") < 2**-20
    assert 2**-12 < rounding("bf16", "cpu") < 2**-6


@pytest.mark.gpu
def test_rounding_on_a_gpu():
    """fp32 has 24 bits there too; tf32 keeps 11 of them, bf16 8."""
    assert rounding("fp32", "cuda") < 2**-19
    assert 2**-18 < rounding("tf32", "cuda") < 2**-9
    assert 2**-12 < rounding("bf16", "cuda") < 2**-6


def test_bf16_follows_the_weights():
    """Inside of one long stretch of bf16, a weight that changes is seen."""
    layer = torch.nn.Linear(4, 4, bias=False)
    with compute_precision("bf16", torch.device("cpu")):
        before = layer(torch.ones(1, 4))
        with torch.no_grad():
            layer.weight += 1
        after = layer(torch.ones(1, 4))
    torch.testing.assert_close(after, before + 4, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("inner", ["fp32", "tf32"])
def test_a_precision_inside_of_another_one_is_in_force(inner):
    device, x = torch.device("cpu"), torch.ones(2, 2)
    with compute_precision("bf16", device):
        with compute_precision(inner, device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
