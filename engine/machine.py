"""This machine: what `auto` means on it, and a warning where torch cannot use its GPU."""

import os
from pathlib import Path

import torch

TENSOR_CORES_FOR_TF32 = 8  # compute capability from which tf32 exists
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor, and the beginning of a device class


def device_type(name: str) -> str:
    """Return cpu or cuda for a value of the key `device`."""
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def default_precision(device: str) -> str:
    """Return tf32 on a GPU whose tensor cores compute in it, fp32 elsewhere."""
    if device != "cuda" or not torch.cuda.is_available():
        return "fp32"
    return "tf32" if torch.cuda.get_device_capability()[0] >= TENSOR_CORES_FOR_TF32 else "fp32"


def describe_gpu(device: torch.device) -> dict[str, object]:
    """Return what decides a GPU's numbers and speed."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "compute_capability": f"{major}.{minor}",
        "memory": torch.cuda.get_device_properties(device).total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of the NVIDIA driver; None where there is none."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def gpu_problem() -> str | None:
    """Return why torch cannot use this machine's NVIDIA GPU, and the cure; None if it can.

    A GPU that CUDA_VISIBLE_DEVICES hides is hidden on purpose.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not _has_nvidia_gpu() or torch.cuda.is_available():
        return None
    driver = driver_version()
    found = f"this machine has an NVIDIA GPU (driver {driver or 'not found'})"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
        cure = "install a torch built with CUDA (https://pytorch.org/get-started/locally)"
    elif driver is None:
        reason = "its driver is not loaded, or not visible in this container"
        cure = "install the NVIDIA driver, or start the container with access to the GPU"
    else:
        reason = f"torch {torch.__version__} was built for CUDA {torch.version.cuda}: {_refusal()}"
        cure = "update the driver, or install a torch built for an older CUDA"
    return f"{found} that torch cannot use: {reason}; {cure}"


def _has_nvidia_gpu() -> bool:
    if any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg")):
        return True
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def _refusal() -> str:
    """Return the first sentence of what torch says when it initializes CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return "no GPU is available"
