"""Tables in Markdown, and the machine that a measurement was made on."""

from collections.abc import Mapping, Sequence
from typing import Any


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
    """Name the GPU, or the processor with its threads, and torch's version; see `common.measuring`."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{where}, torch {versions['torch']}"
