"""What every report of a measurement needs: waiting for a device, and names and versions of what was measured on."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "channeltok")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """Name the processor, the GPU (None without), torch's CPU threads and the operating system."""
    name, information = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": name, "gpu": gpu, "threads": torch.get_num_threads(), "system": platform.system()}


def versions(others: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that every measurement depends on, and of `others`."""
    return {"python": platform.python_version(), **{name: _version(name) for name in (*PACKAGES, *others)}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a script also runs from a folder that is not installed
        return "(not installed)"
