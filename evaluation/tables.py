"""What the reports of all benchmarks share: lines and cells of their tables, and the place they were made at."""

from collections.abc import Mapping, Sequence
from typing import Any


def table_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table_head(heads: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [table_line(heads), "|" + " --- |" * len(heads)]


def cell(value: float | None, form: str) -> str:
    """A number as `format` writes it; a dash for None."""
    return "-" if value is None else format(value, form)


def speed_cell(row: Mapping[str, Any], unit: str, repeats: int) -> str:
    """A row's speed with slowest and fastest, how it compares with the baseline, and the runs where fewer than asked.

    Args:
        row: has `unit`, and the same with _min and _max; `against_baseline`, `seconds` and `error`.
        unit: what a second counts.
        repeats: the runs that were asked for.
    """
    if row["error"] is not None:
        return str(row["error"])
    text = f"{_short(row[unit])} [{_short(row[f'{unit}_min'])}, {_short(row[f'{unit}_max'])}]"
    if row["against_baseline"] is not None:
        text += f" {row['against_baseline']:.2f}x"
    if (count := len(row["seconds"])) < repeats:
        text += f" ({count} run{'s' * (count > 1)})"
    return text


def _short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def place(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Processor or GPU, and torch's version; see `common.measuring`."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{where}, torch {versions['torch']}"
