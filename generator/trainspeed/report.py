"""What a measurement leaves: train.json (everything), train.md (a table), train.png (bars)."""

import json
import logging
from pathlib import Path
from typing import Any

from common.checkpoint import write_text
from common.measuring import machine, versions
from common.plots import Bar, save_bar_plot
from common.reports import cell, place, speed_cell, table_head, table_line
from generator.trainspeed.measure import TrainSpeedResults

logger = logging.getLogger(__name__)
LANE = ("generator", "batch_size", "dtype", "variant")
HEADS = ["generator", "batch", "dtype", "variant", "tokens/s", "MFU", "a step takes, MB"]


def content(results: TrainSpeedResults, command: str) -> dict[str, Any]:
    """What train.json holds. Peaks: operations a second, by number format; rows: see `measure.rows_of`."""
    probe = results.probe
    return {
        "rows": results.rows,
        "models": results.models,
        "peak": {dtype: peak._asdict() for dtype, peak in results.peaks.items()},
        "matmul_peak_flops": probe.best,
        "matmul_flops_by_time": probe.found,
        "matmul_rows": probe.sizes,
        "machine": machine(probe.device),
        "versions": versions(),
        "settings": results.config,
        "command": command,
        "seconds": results.seconds,
    }


def table(found: dict[str, Any]) -> str:
    """train.md: a line for each generator, batch size, number format and variant."""
    settings = found["settings"]
    lines = ["# Training speed", "", place(found["machine"], found["versions"]), "", f"`{found['command']}`", ""]
    for name, model in found["models"].items():
        if model is None:
            lines.append(f"- {name}: no memory for its weights and optimizer")
            continue
        lines.append(
            f"- {name}: {model['parameters'] / 1e6:.1f}M parameters, {model['num_tokens']} tokens a sequence, "
            f"{model['flops_per_token'] / 1e9:.3g} GFLOP a token; weights and optimizer {model['held_mb']:,.0f} MB"
        )
    for dtype, peak in found["peak"].items():
        product = f"{found['matmul_peak_flops'][dtype] / 1e12:.3g} TFLOP/s ({found['matmul_rows'][dtype]} rows)"
        lines.append(f"- {dtype}: peak {peak['flops'] / 1e12:.3g} TFLOP/s ({peak['source']}); best product {product}")
    lines += ["", *table_head(HEADS)]
    for row in sorted(found["rows"], key=lambda row: list(found["models"]).index(row["generator"])):
        cells = [str(row[key]) for key in LANE]
        cells += [speed_cell(row, "tokens_per_second", settings["repeats"])]
        lines.append(table_line([*cells, cell(row["mfu"], ".0%"), cell(row["step_memory_mb"], ",.0f")]))
    lines += [
        "",
        f"Medians [slowest, fastest] of {settings['repeats']} rounds, variants interleaved; x: times eager. MFU: the "
        "operations that the tokens need, forward and backward, a second, over the peak; what is computed again does "
        "not count. A step takes: memory at its peak beyond weights and optimizer, gradients included. "
        f"Unchunked holds the logits of the whole batch, the others those of {settings['loss_chunk']} tokens.",
        "",
    ]
    return "\n".join(lines)


def _panels(found: dict[str, Any]) -> dict[str, list[Bar]]:
    """A row of panels for each batch size, a column for each generator; variants without a time are left out."""
    panels: dict[str, list[Bar]] = {}
    for batch_size in found["settings"]["batch_size"]:
        for name, model in found["models"].items():
            bars = panels.setdefault(f"generator {name}, batch {batch_size}", [])
            for row in found["rows"]:
                if model is None or (row["generator"], row["batch_size"]) != (name, batch_size) or not row["seconds"]:
                    continue
                bar = Bar(
                    label=f"{row['variant']}, MFU {row['mfu']:.0%}",
                    group=row["dtype"],
                    value=row["tokens_per_second"],
                    low=row["tokens_per_second_min"],
                    high=row["tokens_per_second_max"],
                    limit=found["peak"][row["dtype"]]["flops"] / model["flops_per_token"],
                )
                bars.append(bar)
    return panels


def write_report(results: TrainSpeedResults, output_dir: str | Path, command: str) -> None:
    """Write train.json, train.md and train.png, each whole; `command` is what the reader can repeat."""
    folder, found = Path(output_dir), content(results, command)
    write_text(folder / "train.json", json.dumps(found, indent=1))
    write_text(folder / "train.md", table(found))
    save_bar_plot(
        _panels(found),
        folder / "train.png",
        title=f"Training: tokens a second\n{place(found['machine'], found['versions'])}",
        x_label="tokens a second",
        limit_label="bound: the operations of a token at the peak",
        columns=len(found["models"]),
    )
    logger.info("train.json, train.md and train.png written to %s, after %.0f s", folder, results.seconds)
