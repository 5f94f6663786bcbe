"""What a measurement leaves: tokenizer.json (everything), tokenizer.md (a table), tokenizer.png (bars)."""

import json
import logging
from pathlib import Path
from typing import Any

from common.checkpoint import write_text
from common.measuring import machine, versions
from common.plots import Bar, save_bar_plot
from common.reports import cell, place, speed_cell, table_head, table_line
from tokenizer.throughput.config import TASKS
from tokenizer.throughput.measure import Row, ThroughputResults

logger = logging.getLogger(__name__)
LANE = ("variant", "dtype", "layout", "batch_size")
HEADS = [
    "variant", "dtype", "layout", "batch",
    "encode, images/s", "of the matmul peak", "decode, images/s", "of the matmul peak",
    "peak memory, MB", "tokens changed", "grey levels",
]  # fmt: skip


def content(results: ThroughputResults, command: str, name: str, fingerprint: str) -> dict[str, Any]:
    """What tokenizer.json holds. Peaks: operations a second, by number format; rows: see `measure.rows_of`."""
    probe = results.probe
    return {
        "rows": results.rows,
        "flops_per_image": results.flops,
        "matmul_peak_flops": probe.best,
        "matmul_flops_by_time": probe.found,
        "matmul_rows": probe.sizes,
        "machine": machine(probe.device),
        "versions": versions(),
        "tokenizer": {"name": name, "fingerprint": fingerprint, **results.tokenizer},
        "settings": results.config,
        "command": command,
        "seconds": results.seconds,
    }


def _titles(found: dict[str, Any]) -> tuple[str, str]:
    """What was measured, and where."""
    tokenizer = found["tokenizer"]
    size = tokenizer["image_size"]
    what = f"tokenizer {tokenizer['name']} ({tokenizer['parameters'] / 1e6:.1f}M, {size}x{size})"
    return what, place(found["machine"], found["versions"])


def _speed(row: Row | None, repeats: int) -> list[str]:
    """Two cells: images/s with range, ratio and number of runs where fewer than asked; share of the peak."""
    if row is None:
        return ["-", "-"]
    return [speed_cell(row, "images_per_second", repeats), cell(row["fraction_of_peak"], ".0%")]


def table(found: dict[str, Any]) -> str:
    """tokenizer.md: a line for each variant, number format and batch size."""
    what, where = _titles(found)
    peaks = ", ".join(
        f"{dtype} {peak / 1e9:.4g} GFLOP/s ({found['matmul_rows'][dtype]} rows)"
        for dtype, peak in found["matmul_peak_flops"].items()
    )
    work = ", ".join(f"{task} {found['flops_per_image'][task] / 1e9:.4g} GFLOP" for task in TASKS)
    fingerprint = found["tokenizer"]["fingerprint"]
    lines = [f"# Throughput: {what}", "", where, "", f"`{found['command']}`", ""]
    lines += [f"Weights: {fingerprint}. One image: {work}. Best matrix product: {peaks}.", ""]
    lines += table_head(HEADS)
    lanes: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(found["rows"], key=lambda row: row["batch_size"]):
        lanes.setdefault(tuple(row[key] for key in LANE), {})[row["task"]] = row
    for lane, rows in lanes.items():
        cells = [str(value) for value in lane]
        encode, decode = rows.get("encode"), rows.get("decode")
        for row in (encode, decode):
            cells += _speed(row, found["settings"]["repeats"])
        memory = [row["peak_memory_mb"] for row in rows.values() if row["peak_memory_mb"] is not None]
        cells.append(cell(max(memory, default=None), ".0f"))
        cells.append(cell(encode["tokens_changed"] if encode else None, ".2%"))
        cells.append(cell(decode["grey_levels"] if decode else None, ".2g"))
        lines.append(table_line(cells))
    lines += [
        "",
        f"Medians [slowest, fastest] of {found['settings']['repeats']} rounds, variants interleaved; x: times the "
        "images/s of eager float32 at the same batch size. Of the matmul peak: operations of the plain network, over "
        "the best matrix product in the same number format measured here (a variant that needs fewer operations may "
        "pass it). Memory: all weights and what a run takes, the larger of both tasks. Tokens changed and grey levels "
        "(the largest difference, of 255): beside eager float32.",
        "",
    ]
    return "\n".join(lines)


def _panels(found: dict[str, Any]) -> dict[str, list[Bar]]:
    """A row of panels for each batch size, a column for each task; variants without a time are left out."""
    panels: dict[str, list[Bar]] = {}
    for batch_size in sorted({row["batch_size"] for row in found["rows"]}):
        for task in TASKS:
            bars = panels.setdefault(f"{task}, batch {batch_size}", [])
            for row in found["rows"]:
                if (row["batch_size"], row["task"]) != (batch_size, task) or not row["seconds"]:
                    continue
                bar = Bar(
                    label=row["variant"],
                    group=row["dtype"],
                    value=row["images_per_second"],
                    low=row["images_per_second_min"],
                    high=row["images_per_second_max"],
                    limit=found["matmul_peak_flops"][row["dtype"]] / found["flops_per_image"][task],
                )
                bars.append(bar)
    return panels


def write_report(
    results: ThroughputResults, output_dir: str | Path, command: str, *, name: str, fingerprint: str
) -> None:
    """Write tokenizer.json, tokenizer.md and tokenizer.png, each whole.

    Args:
        results: what was measured.
        output_dir: made where it is missing.
        command: what the reader can repeat.
        name: what the results call the tokenizer.
        fingerprint: which weights (`common.checkpoint.fingerprint`), or that they are random.
    """
    folder, found = Path(output_dir), content(results, command, name, fingerprint)
    write_text(folder / "tokenizer.json", json.dumps(found, indent=1))
    write_text(folder / "tokenizer.md", table(found))
    what, where = _titles(found)
    save_bar_plot(
        _panels(found),
        folder / "tokenizer.png",
        title=f"Throughput: {what}\n{where}",
        x_label="images a second",
        limit_label="bound: the plain network at the speed of a matrix product",
        columns=len(TASKS),
    )
    logger.info("tokenizer.json, tokenizer.md and tokenizer.png written to %s, after %.0f s", folder, results.seconds)
