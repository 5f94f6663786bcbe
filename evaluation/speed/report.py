"""What a measurement leaves: speed.json (everything), speed.md (a table), speed.png (a plot)."""

import json
import logging
from pathlib import Path
from typing import Any

from common.checkpoint import write_text
from common.measuring import machine, versions
from common.plots import Panel, save_line_plot
from evaluation.speed.measure import Row, SpeedResults
from evaluation.tables import place, table_head, table_line

logger = logging.getLogger(__name__)
SETTING = ("dtype", "batch_size", "cfg_scale")


def content(results: SpeedResults, command: str) -> dict[str, Any]:
    """What speed.json holds. Bandwidth: GB/s (10**9 bytes), the best read of all; rows: see `measure.rows_of`."""
    bandwidth = results.bandwidth
    return {
        "rows": results.rows,
        "bandwidth_gb_s": bandwidth.best,
        "bandwidth_median_gb_s": bandwidth.median,
        "bandwidth_by_way_gb_s": bandwidth.found,
        "machine": machine(results.device),
        "versions": versions(),
        **results.about,
        "settings": results.config,
        "command": command,
        "seconds": results.seconds,
    }


def _by_setting(rows: list[Row]) -> list[list[Row]]:
    """Rows that are compared with each other, together."""
    settings = dict.fromkeys(tuple(row[key] for key in SETTING) for row in rows)
    return [[row for row in rows if tuple(row[key] for key in SETTING) == setting] for setting in settings]


def _setting_title(row: Row) -> str:
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
    """speed.md: for each setting a line for each sampler."""
    what, where = _titles(found)
    pictures = "whole pictures" if found["tokenizer"] else "tokens only, nothing is decoded"
    lines = [f"# Speed: {what}", "", where, "", f"`{found['command']}`", ""]
    for rows in _by_setting(found["rows"]):
        budgets = list(dict.fromkeys(row["num_tokens"] for row in rows))
        heads = ["sampler", *(f"k = {k}, ms a token" for k in budgets), f"images/s at k = {budgets[-1]}"]
        heads += [f"first preview (k = {budgets[0]}), ms", "memory, MB", "of the limit"]
        lines += [f"## {_setting_title(rows[0])}", "", *table_head(heads)]
        uncached = {row["num_tokens"]: row["ms_per_token"] for row in rows if row["sampler"] == "uncached"}
        for name in dict.fromkeys(row["sampler"] for row in rows):
            mine = [row for row in rows if row["sampler"] == name]
            last = mine[-1]
            cells = [_label(last)]
            for row in mine:
                faster = uncached.get(row["num_tokens"]) if name != "uncached" else None
                gain = f" ({faster / row['ms_per_token']:.1f}x)" if faster else ""
                cells.append(f"{row['ms_per_token']:.2f}{gain}")
            cells.append(f"{last['images_per_second']:.2f}")
            cells += [
                "-" if last[key] is None else f"{last[key]:.0f}" for key in ("first_preview_ms", "peak_memory_mb")
            ]
            lines.append(table_line([*cells, f"{last['fraction_of_limit']:.1%}"]))
        lines.append("")
    lines.append(
        f"Medians; rounds, samplers interleaved: {found['settings']['repeats']}. ms a token: mean over k tokens, "
        f"in brackets how many times faster than uncached. Images/s: {pictures}. Of the limit: the time to read the "
        "weights and the cache once, at the best bandwidth measured here, over the time taken. Estimated: interpolated "
        "between measured prefix lengths."
    )
    return "\n".join([*lines, ""])


def _panels(found: dict[str, Any]) -> list[Panel]:
    """A row of panels for each batch size and guidance, a column for each number format."""
    settings = _by_setting(found["rows"])
    settings.sort(key=lambda rows: (rows[0]["batch_size"], rows[0]["cfg_scale"]))
    panels = []
    for rows in settings:
        lines: dict[str, list[tuple[float, float]]] = {}
        limit: dict[int, float] = {}
        for row in rows:
            k = row["num_tokens"]
            lines.setdefault(_label(row), []).append((k, row["ms_per_token"] * k / 1000))
            limit[k] = row["bytes_per_token"] * k / (found["bandwidth_gb_s"] * 1e9)
        panels.append(Panel(title=_setting_title(rows[0]), lines=lines, limit=list(limit.items())))
    return panels


def write_report(results: SpeedResults, output_dir: str | Path, command: str) -> None:
    """Write speed.json, speed.md and speed.png, each whole; `command` is what the reader can repeat."""
    folder, found = Path(output_dir), content(results, command)
    write_text(folder / "speed.json", json.dumps(found, indent=1))
    write_text(folder / "speed.md", table(found))
    what, where = _titles(found)
    save_line_plot(
        _panels(found),
        folder / "speed.png",
        title=f"Time to draw k tokens: {what}\n{where}",
        x_label="k, tokens drawn",
        y_label="time from the call, seconds",
        limit_label="bound: weights and cache read once a token",
        columns=len({row["dtype"] for row in results.rows}),
        dashed={_label(row) for row in results.rows if row["estimated"]},
    )
    logger.info("speed.json, speed.md and speed.png written to %s, after %.0f s", folder, results.seconds)
