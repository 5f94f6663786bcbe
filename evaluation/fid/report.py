"""What a measurement leaves: results.json (everything), results.md (a table), plots and a sheet of samples."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import write_text
from common.images import captioned_table, save_png, to_pil
from common.measuring import machine, versions
from common.plots import Panel, save_line_plot
from evaluation.fid.config import QualityConfig
from evaluation.fid.labels import against, measure_labels
from evaluation.fid.measure import QualityResults, Subject
from evaluation.fid.reference import About, Reference
from evaluation.fid.samples import labels_of
from evaluation.tables import cell, place, table_head, table_line

logger = logging.getLogger(__name__)
FORMS = {
    "fid": ".2f", "frechet_distance": ".3f", "inception_score": ".2f", "kid": ".5f",
    "precision": ".3f", "recall": ".3f", "class_accuracy": ".1%",
}  # fmt: skip
BETTER = {"fid": "lower", "frechet_distance": "lower", "kid": "lower"}
PACKAGES = ("torch-fidelity",)
BACKEND = (
    "Features, Inception score, KID, precision and recall by torch-fidelity; Fréchet distance in float64, by singular "
    "values"
)


def content(
    results: QualityResults,
    subject: Subject,
    reference: Reference,
    config: QualityConfig,
    command: str,
    processes: int,
) -> dict[str, Any]:
    """What results.json holds.

    rows: one for each k, see `measure._row`. labels: what each figure may be called. anchors: see `Anchors.summary`.
    pass_seconds: over all samples and processes, drawing to the largest k, and decoding and looking at all of them.
    """
    pipeline, eyes, parts = subject.pipeline, subject.eyes, results.parts
    seconds = parts.seconds()
    return {
        "rows": results.rows,
        "labels": measure_labels(eyes.extractor.name, parts.num_samples, reference.about),
        "num_samples": parts.num_samples,
        "samples_by_class": "all classes in one random order, again and again; --save-npz writes them down (arr_1)",
        "processes": processes,
        "pictures_dtype": str(pipeline.pictures.dtype).removeprefix("torch."),
        "reference": asdict(reference.about),
        "anchors": subject.anchors,
        "network": {"name": eyes.extractor.name, "fingerprint": eyes.extractor.fingerprint},
        "classifier": eyes.classifier.fingerprint if eyes.classifier else None,
        "backend": BACKEND,
        "sampling": asdict(results.sampling),
        "seed": config.seed,
        "model": {
            "name": config.model,
            "fingerprint": pipeline.fingerprint,
            "image_size": pipeline.tokenizer.config.image_size,
            "num_channels": pipeline.config.num_channels,
            "num_bits": pipeline.config.num_bits,
            "num_classes": pipeline.config.num_classes,
        },
        "settings": asdict(config),
        "command": command,
        "machine": machine(pipeline.engine.decoder.device),
        "versions": versions(PACKAGES),
        "pass_seconds": {
            "draw": float(seconds["draw"][-1]),
            "decode": float(seconds["decode"].sum()),
            "look": float(seconds["look"].sum()),
        },
        "session_seconds": results.seconds,
    }


def _shown(found: dict[str, Any]) -> dict[str, str]:
    """The measures that have figures, with their labels."""
    return {
        name: label
        for name, label in found["labels"].items()
        if all(row.get(name) is not None for row in found["rows"])
    }


def table(found: dict[str, Any]) -> str:
    """results.md: a line for each k, and under it what the figures rest on."""
    shown, model, sampling = _shown(found), found["model"], found["sampling"]
    lines = [f"# Samples: {model['name']}", "", f"`{found['command']}`", ""]
    lines += table_head(["k", *shown.values(), "seconds a sample"])
    for row in found["rows"]:
        figures = [format(row[name], FORMS[name]) for name in shown]
        lines.append(table_line([str(row["num_tokens"]), *figures, f"{_seconds(row):.3g}"]))
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items())
    about, seconds = found["reference"], found["pass_seconds"]
    reference = against(About(**about))
    lines += [
        "",
        f"N = {found['num_samples']:,} samples, as many of each of {model['num_classes']} classes (to within one), "
        f"seed {found['seed']}; {settings}. Each was drawn once, to k = {found['rows'][-1]['num_tokens']}, and every k "
        f"decoded from its first tokens: {seconds['draw']:.0f} s of drawing, {seconds['decode']:.0f} s of decoding, "
        f"{seconds['look']:.0f} s in the networks that look.",
        "",
        f"Reference: {reference}; fingerprint {about['fingerprint']}; {about['unreadable'] or 'none'} "
        f"unreadable. Prepared: {about['preparation']}. KID, precision and recall compare with {about['kept']:,} of "
        f"them; KID is a mean over 100 subsets of {found['rows'][0]['kid_subset']:,}.",
        "",
        f"Network: {found['network']['name']}, fingerprint {found['network']['fingerprint']}. {found['backend']}. "
        f"torch-fidelity {found['versions']['torch-fidelity']}; {place(found['machine'], found['versions'])}."
        + (f" Classifier: fingerprint {found['classifier']}." if found["classifier"] else ""),
        "",
        f"Model: {model['image_size']}x{model['image_size']}, C = {model['num_channels']}, {model['num_bits']} bits, "
        f"fingerprint {model['fingerprint']}; generator in {found['settings']['dtype']}, pictures in "
        f"{found['pictures_dtype']}, {found['settings']['batch_size']} samples side by side, {_processes(found)}.",
    ]
    if found["anchors"] is not None:
        lines += _anchor_lines(found)
    return "\n".join([*lines, ""])


def _processes(found: dict[str, Any]) -> str:
    many = "es" if found["processes"] > 1 else ""
    return f"{found['processes']} process{many}{', compiled' if found['settings']['compile'] else ''}"


def _seconds(row: dict[str, Any]) -> float:
    """What a sample of k tokens costs, in a batch."""
    return float(row["draw_seconds"] + row["decode_seconds"])


def _anchor_lines(found: dict[str, Any]) -> list[str]:
    anchors = found["anchors"]
    real, shuffled = anchors["real"], anchors["shuffled"]
    distance = f"Fréchet distance ({found['network']['name']})"
    about = found["reference"]
    kind = "drawn" if about["drawn_by"] else "real"
    count = f"{anchors['images']:,} images"
    note = "; as they are in the folder, not decoded" if about["decoded"] else ""
    lines = ["", f"## Anchors: the same measures on the reference's own {count}{note}", ""]
    lines += table_head(["images", distance, "class accuracy"])
    lines.append(
        table_line(
            [
                f"{kind}, one half against the other ({real['images'][0]:,} and {real['images'][1]:,})",
                cell(real["distance"], ".3f"),
                cell(real["class_accuracy"], ".1%"),
            ]
        )
    )
    lines.append(table_line([f"{kind}, classes shuffled ({count})", "-", cell(shuffled["class_accuracy"], ".1%")]))
    for row in anchors["reconstructions"]:
        name = f"rebuilt from {row['num_tokens']} tokens, against the same {count}"
        lines.append(table_line([name, cell(row["distance"], ".3f"), cell(row["class_accuracy"], ".1%")]))
    return lines


def _plots(found: dict[str, Any], folder: Path) -> None:
    """quality.png against k, and time.png against seconds a sample."""
    name, anchors = found["model"]["name"], found["anchors"]
    about = f"{name}, N = {found['num_samples']:,}, against {against(About(**found['reference']))}"
    panels, timed = [], []
    for measure, label in _shown(found).items():
        title = f"{label}\n({BETTER.get(measure, 'higher')} is better)"
        values = [row[measure] for row in found["rows"]]
        ks = [row["num_tokens"] for row in found["rows"]]
        limit: list[tuple[float, float]] = []
        if measure == "class_accuracy" and anchors is not None and anchors["real"]["class_accuracy"] is not None:
            limit = [(k, anchors["real"]["class_accuracy"]) for k in (ks[0], ks[-1])]
        points = list(zip(ks, values, strict=True))
        panels.append(Panel(title=title, lines={name: points}, limit=limit, y_scale="linear"))
        times = [float(f"{1000 * _seconds(row):.2g}") for row in found["rows"]]
        timed.append(Panel(title=title, lines={name: list(zip(times, values, strict=True))}, y_scale="linear"))
    options: dict[str, Any] = {"columns": 3, "share_y": False, "log2_x": True}
    save_line_plot(
        panels, folder / "quality.png", title=f"Samples of k tokens\n{about}", x_label="k, tokens drawn",
        limit_label="the reference's own images", **options,
    )  # fmt: skip
    where = place(found["machine"], found["versions"])
    save_line_plot(
        timed, folder / "time.png", title=f"Quality for time\n{about}\n{where}",
        x_label=f"ms a sample, drawing and decoding, {found['settings']['batch_size']} side by side", **options,
    )  # fmt: skip


def _sheet(subject: Subject, results: QualityResults, rows: int, folder: Path) -> None:
    """samples.png: the first samples, a column for each k."""
    model, pictures = subject.pipeline.config, subject.pipeline.pictures
    rows = min(rows, results.parts.num_samples)
    parts = -(-rows // results.parts.batch_size)
    tokens = torch.cat([results.parts.tokens(index) for index in range(parts)])[:rows]
    columns = [[to_pil(image) for image in pictures(tokens[:, :k])] for k in results.parts.budgets]
    names = [model.class_names[label].split(",")[0][:22] for label in labels_of(range(rows), model.num_classes)]
    table_of = [[column[row] for column in columns] for row in range(rows)]
    save_png(captioned_table(table_of, names, [f"k={k}" for k in results.parts.budgets]), folder / "samples.png")


def write_report(
    results: QualityResults, subject: Subject, config: QualityConfig, command: str, processes: int
) -> dict[str, Any]:
    """Write everything into config.output_dir, each file whole, and give back what results.json holds.

    Args:
        results: of `measure_quality`.
        subject: as it was measured.
        config: all settings but those of sampling.
        command: what the reader can repeat.
        processes: how many shared the work.
    """
    if subject.reference is None:
        raise ValueError("only the main process has the reference")
    folder = Path(config.output_dir)
    found = content(results, subject, subject.reference, config, command, processes)
    if config.sheet_samples:
        _sheet(subject, results, config.sheet_samples, folder)
    _plots(found, folder)
    write_text(folder / "results.md", table(found))
    write_text(folder / "results.json", json.dumps(found, indent=1))
    logger.info("results.json, results.md and pictures written to %s", folder)
    for row in found["rows"]:
        figures = "  ".join(f"{label}: {format(row[name], FORMS[name])}" for name, label in _shown(found).items())
        logger.info("k = %d  %s", row["num_tokens"], figures)
    return found
