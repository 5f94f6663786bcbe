"""Many settings, each measured on its own: a heat map of the distance by k, and the best settings of each k."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.checkpoint import write_text
from common.errors import InputError
from common.measuring import machine, versions
from common.plots import save_heat_map
from common.team import Team
from evaluation.fid.config import QualityConfig, sweep_settings
from evaluation.fid.labels import against, distance_field, measure_labels
from evaluation.fid.measure import Subject, measure_quality
from evaluation.fid.report import PACKAGES, write_report
from evaluation.tables import table_head, table_line
from generator.config import SamplingConfig
from generator.settings import SETTINGS_FILE, ModelSettings

logger = logging.getLogger(__name__)


def title_of(settings: dict[str, Any]) -> str:
    """The name of a combination, as in cfg_scale=1.5,temperature=0.9."""
    return ",".join(f"{name}={value}" for name, value in settings.items())


def sweep_quality(
    open_it: Callable[[], Subject], base: SamplingConfig, config: QualityConfig, team: Team, command: str
) -> None:
    """Measure every combination of config.sweep, each in a folder below sweep/ and resumable there.

    Writes sweep.json, sweep.md and sweep.png; with config.write_settings also the model's sampling.json.

    Args:
        open_it: loads model, networks and reference; called once the settings have been checked.
        base: the settings that are not swept.
        config: all else.
        team: the processes.
        command: what the reader can repeat.

    Raises:
        InputError: settings that are not allowed, or a model whose folder is not here to be written to.
    """
    combinations = sweep_settings(config.sweep or [], base)
    if config.write_settings and not Path(config.model).is_dir():
        raise InputError(f"write_settings writes into the model's folder, and {config.model} is none; give a folder")
    generator = Path(config.model) / "generator"
    if config.write_settings and not os.access(generator, os.W_OK):
        raise InputError(f"write_settings writes into {generator}, which is not allowed; give a folder of your own")
    subject = open_it()
    found: list[dict[str, Any]] = []
    for number, settings in enumerate(combinations, 1):
        title = title_of(settings)
        alone = replace(config, output_dir=str(Path(config.output_dir) / "sweep" / title))
        sampling = replace(base, **settings)  # type: ignore[arg-type]
        results = measure_quality(subject, sampling, alone, team, f"{title} ({number} of {len(combinations)})")
        if results is not None:
            write_report(results, subject, alone, command, team.count)
            found.append({"settings": settings, "sampling": asdict(sampling), "rows": results.rows})
    if subject.reference is not None:
        _write(found, subject, config, command)
    team.wait()


def _write(found: list[dict[str, Any]], subject: Subject, config: QualityConfig, command: str) -> None:
    if subject.reference is None:
        raise ValueError("only the main process has the reference")
    folder, about = Path(config.output_dir), subject.reference.about
    network = subject.eyes.extractor
    field = distance_field(network.name, config.num_samples, about)
    label = measure_labels(network.name, config.num_samples, about)[field]
    rests_on = f"N = {config.num_samples:,}, against {against(about)}"
    titles = [title_of(entry["settings"]) for entry in found]
    table = [[float(row[field]) for row in entry["rows"]] for entry in found]
    best = {k: min(range(len(found)), key=lambda i: table[i][place]) for place, k in enumerate(subject.budgets)}
    content = {
        "label": label,
        "num_tokens": subject.budgets,
        "combinations": found,
        "best": {str(k): found[i]["settings"] for k, i in best.items()},
        "num_samples": config.num_samples,
        "reference": asdict(about),
        "network": {"name": network.name, "fingerprint": network.fingerprint},
        "seed": config.seed,
        "model": {"name": config.model, "fingerprint": subject.pipeline.fingerprint},
        "machine": machine(subject.pipeline.engine.decoder.device),
        "versions": versions(PACKAGES),
        "command": command,
    }
    lines = [
        f"# Settings: {config.model}",
        "",
        f"`{command}`",
        "",
        f"{label}; the best of each k in bold.",
        "",
    ]
    lines += table_head(["settings", *(f"k = {k}" for k in subject.budgets)])
    for i, values in enumerate(table):
        cells = [f"**{v:.3f}**" if best[k] == i else f"{v:.3f}" for k, v in zip(subject.budgets, values, strict=True)]
        lines.append(table_line([titles[i].replace(",", ", "), *cells]))
    lines += ["", f"{rests_on}; seed {config.seed}; network {network.name}, fingerprint {network.fingerprint}."]
    lines.append("All settings have the same seeds. Differences as small as those between seeds say nothing.")
    write_text(folder / "sweep.md", "\n".join([*lines, ""]))
    save_heat_map(
        table,
        folder / "sweep.png",
        title=f"{label}, the best of each k framed\n{config.model}, {rests_on}",
        row_labels=[title.replace(",", ", ") for title in titles],
        column_labels=[f"k={k}" for k in subject.budgets],
        framed={(i, place) for place, i in enumerate(best.values())},
    )
    write_text(folder / "sweep.json", json.dumps(content, indent=1))
    logger.info("sweep.json, sweep.md and sweep.png written to %s", folder)
    for k, i in best.items():
        logger.info("k = %d  best: %s", k, titles[i])
    if config.write_settings:
        settings = ModelSettings(
            by_num_tokens={k: SamplingConfig(**found[i]["sampling"]) for k, i in best.items()},
            fingerprint=subject.pipeline.fingerprint,
            measured={
                "label": label,
                "distances": {str(k): table[i][place] for place, (k, i) in enumerate(best.items())},
                **{name: content[name] for name in ("num_samples", "seed", "reference", "network", "command")},
            },
        )
        generator = Path(config.model) / "generator"
        settings.save(generator)
        logger.info("%s written: sample.py uses these settings from now on", generator / SETTINGS_FILE)
