"""Common parts of all reports: waiting for a device, machine and versions, tables in Markdown."""

import platform
from collections.abc import Mapping, Sequence
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


def table_line(cells: Sequence[str]) -> str:
    """Format a line of a table."""
    return "| " + " | ".join(cells) + " |"


def table_head(heads: Sequence[str]) -> list[str]:
    """Format the first two lines of a table."""
    return [table_line(heads), "|" + " --- |" * len(heads)]


def cell(value: float | None, form: str) -> str:
    """Format a number; a dash for None."""
    return "-" if value is None else format(value, form)


def place(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Name the GPU, or the processor with its threads, and torch's version."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{where}, torch {versions['torch']}"
