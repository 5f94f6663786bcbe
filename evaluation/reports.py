"""Common parts of all measurements: waiting for a device, machine and versions, tables and files of results."""

import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from common.files import write_text

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "channeltok", "torchmetrics", "torch-fidelity")


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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that measurements depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a script also runs from a folder that is not installed
            found[name] = "(not installed)"
    return found


def place(found: Mapping[str, Any]) -> str:
    """Name the GPU, or the processor with its threads, and torch's version."""
    where = found["machine"]
    name = where["gpu"] or f"{where['cpu']}, {where['threads']} thread{'s' * (where['threads'] > 1)}"
    return f"{name}, torch {found['versions']['torch']}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def cell(value: float | None, form: str) -> str:
    """Format a number; a dash for None."""
    return "-" if value is None else format(value, form)


def write_report(folder: str | Path, name: str, found: Mapping[str, Any], paragraphs: Iterable[str]) -> None:
    """Write NAME.json with everything that was found and NAME.md with paragraphs of text."""
    write_text(Path(folder) / f"{name}.json", json.dumps(found, indent=1))
    write_text(Path(folder) / f"{name}.md", "\n\n".join(paragraphs) + "\n")
    logger.info("%s.json and %s.md written to %s", name, name, folder)
