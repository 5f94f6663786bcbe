"""Write a measurement: speed.json (everything), speed.md (a table), speed.png (a plot)."""

import json
import logging
from itertools import groupby
from pathlib import Path
from typing import Any

from common.files import write_text
from common.plots import Panel, save_line_plot
from evaluation.reports import cell, place, table_head, table_line

logger = logging.getLogger(__name__)
Row = dict[str, Any]


def _setting(row: Row) -> str:
    """What rows that are compared with each other have in common."""
    guidance = "" if row["cfg_scale"] == 1 else f", guidance {row['cfg_scale']:g}"
    return f"{row['dtype']}, batch {row['batch_size']}{guidance}"


def _label(row: Row) -> str:
    return row["sampler"] + (" (estimated)" if row["estimated"] else "")


def _titles(found: dict[str, Any]) -> tuple[str, str]:
    """What was measured, and where."""
    generator, tokenizer = found["generator"], found["tokenizer"]
    what = f"generator {generator['name']} ({generator['parameters'] / 1e6:.1f}M)"
    what += f", tokenizer {tokenizer['name']}" if tokenizer else ", tokens only"
    where = place(found["machine"], found["versions"])
    return what, f"{where}, memory reads {found['bandwidth_gb_s']:.0f} GB/s"


def table(found: dict[str, Any]) -> str:
    """Format speed.md: a line for each setting and sampler."""
    what, where = _titles(found)
    rows = found["rows"]
    budgets = list(dict.fromkeys(row["num_tokens"] for row in rows))
    uncached = {(_setting(row), row["num_tokens"]): row["ms_per_token"] for row in rows if row["sampler"] == "uncached"}
    heads = ["setting", "sampler", *(f"k = {k}, ms a token" for k in budgets), f"images/s at k = {budgets[-1]}"]
    heads += [f"first preview (k = {budgets[0]}), ms", "of the limit"]
    lines = [f"# Speed: {what}", "", where, "", f"`{found['command']}`", "", *table_head(heads)]
    for (setting, label), group in groupby(rows, lambda row: (_setting(row), _label(row))):
        cells = [setting, label]
        for row in group:
            slow = uncached.get((setting, row["num_tokens"]))
            gain = f" ({slow / row['ms_per_token']:.1f}x)" if slow and row["sampler"] != "uncached" else ""
            cells.append(f"{row['ms_per_token']:.2f}{gain}")
        cells += [f"{row['images_per_second']:.2f}", cell(row["first_preview_ms"], ".0f")]
        lines.append(table_line([*cells, f"{row['fraction_of_limit']:.1%}"]))
    lines += [
        "",
        f"Medians of {found['settings']['repeats']} rounds, samplers interleaved. ms a token: mean over k tokens, in "
        "brackets how many times faster than uncached. Images/s: with decoding where there is a tokenizer. Of the "
        "limit: the time to read weights and cache once, at the best bandwidth measured here, over the time taken. "
        "Estimated: interpolated between measured prefix lengths.",
    ]
    return "\n".join([*lines, ""])


def _panel(title: str, rows: list[Row], bandwidth: float) -> Panel:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        seconds = row["ms_per_token"] * row["num_tokens"] / 1000
        lines.setdefault(_label(row), []).append((row["num_tokens"], seconds))
    limit = {row["num_tokens"]: row["bytes_per_token"] * row["num_tokens"] / (bandwidth * 1e9) for row in rows}
    return Panel(title=title, lines=lines, limit=list(limit.items()))


def write_report(found: dict[str, Any], output_dir: str | Path, command: str) -> None:
    """Write speed.json, speed.md and speed.png, each whole; `command` repeats the measurement."""
    folder, found = Path(output_dir), found | {"command": command}
    write_text(folder / "speed.json", json.dumps(found, indent=1))
    write_text(folder / "speed.md", table(found))
    panels = [_panel(title, list(rows), found["bandwidth_gb_s"]) for title, rows in groupby(found["rows"], _setting)]
    what, where = _titles(found)
    save_line_plot(
        panels,
        folder / "speed.png",
        title=f"Seconds to draw k tokens: {what}\n{where}",
        x_label="k, tokens drawn",
        limit_label="bound: weights and cache read once a token",
        columns=min(2, len(panels)),
        dashed={_label(row) for row in found["rows"] if row["estimated"]},
    )
    logger.info("speed.json, speed.md and speed.png written to %s, after %.0f s", folder, found["seconds"])
