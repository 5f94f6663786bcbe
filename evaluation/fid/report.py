"""The report: results.json, results.md and quality.png of a measurement, and sweep.json and sweep.md of a sweep."""

import logging
from pathlib import Path
from typing import Any

from common.images import save_line_plot
from evaluation.config import FULL, FidConfig
from evaluation.features import INCEPTION
from evaluation.reports import cell, table, write_report
from generator.config import SamplingConfig
from generator.settings import ModelSettings

logger = logging.getLogger(__name__)
FEW = 10_000  # images of a reference below which labels give their number
FORMS = {
    "fid": ".2f", "frechet_distance": ".3f", "inception_score": ".2f", "kid": ".5f",
    "precision": ".3f", "recall": ".3f", "class_accuracy": ".1%",
}  # fmt: skip


def metric_labels(network: str, num_samples: int, about: dict[str, Any]) -> dict[str, str]:
    """Labels of the metrics by their names in results.json, the distance first.

    The distance is `fid`, "FID", with Inception's published weights, at least 50,000 samples and at least 10,000
    reference images; otherwise it is `frechet_distance`, and every label gives the deviations.
    """
    notes = [] if network == INCEPTION else [network]
    notes += [f"N = {num_samples:,}"] if num_samples < FULL else []
    notes += [f"M = {about['count']:,}"] if about["count"] is not None and about["count"] < FEW else []
    suffix = f" ({', '.join(notes)})" if notes else ""
    distance = {"fid": "FID"}
    if notes:
        distance = {"frechet_distance": f"Fréchet distance ({', '.join(dict.fromkeys([network, *notes]))})"}
    is_inception = network.startswith(INCEPTION)
    return {
        **distance,
        "inception_score": f"{'Inception' if is_inception else 'classifier'} score{suffix}",
        "kid": f"{'KID' if is_inception else 'kernel distance'}{suffix}",
        "precision": f"precision{suffix}",
        "recall": f"recall{suffix}",
        "class_accuracy": f"class accuracy (N = {num_samples:,})",
    }


def write_fid(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, results.md and quality.png, and log the figures."""
    rows, panels, lines = results["rows"], {}, []
    shown = {name: label for name, label in results["labels"].items() if rows[0][name] is not None}
    for name, label in shown.items():
        panels[label] = {
            title: [(row["num_tokens"], row[name]) for row in rows if row["refined"] == refined]
            for title, refined in (("decoded", False), ("refined", True))
            if refined in (row["refined"] for row in rows)
        }
    for row in rows:
        figures = [format(row[name], FORMS[name]) for name in shown]
        name = f"{row['num_tokens']}{' refined' if row['refined'] else ''}"
        lines.append([name, *figures, f"{row['draw_seconds'] + row['decode_seconds']:.3g}"])
        logger.info("k = %s  %s", name, "  ".join(map("{}: {}".format, shown.values(), figures)))
    title = f"{results['model']['name']} against {results['reference']['name']}"
    save_line_plot(panels, folder / "quality.png", title=title, x_label="k, tokens", columns=3, log2_x=True)
    sampling = ", ".join(f"{name} {value}" for name, value in results["sampling"].items())
    paragraphs = [
        f"# {title}",
        f"`{results['command']}`",
        table(["k", *shown.values(), "seconds a sample"], lines),
        f"Sampling: {sampling}. Reference and all other settings: results.json.",
    ]
    if results["anchors"] is not None:
        paragraphs += ["Anchors:", _anchor_table(results["anchors"])]
    write_report(folder, "results", results, paragraphs)


def _anchor_table(anchors: dict[str, Any]) -> str:
    found = {
        "half against half, right classes": anchors["real"],
        "shuffled classes": {"distance": None, **anchors["shuffled"]},
        **{f"reconstructed from {row['num_tokens']} tokens": row for row in anchors["reconstructions"]},
    }
    heads = [f"{anchors['images']:,} images of the reference", "distance", "class accuracy"]
    return table(
        heads, [[name, cell(row["distance"], ".3f"), cell(row["class_accuracy"], ".1%")] for name, row in found.items()]
    )


def write_sweep(combinations: list[dict[str, Any]], found: list[dict[str, Any]], config: FidConfig) -> None:
    """Write sweep.md and sweep.json, of refined images if there are any; `found`: results.json of each combination.

    With config.write_settings, write the best settings of each k to the model's folder.
    """
    first, refined = found[0], found[0]["refinement"] is not None
    distance, label = next(iter(first["labels"].items()))
    distances = [  # of each combination, by k
        {row["num_tokens"]: row[distance] for row in results["rows"] if row["refined"] == refined} for results in found
    ]
    best = {k: min(range(len(found)), key=lambda i: distances[i][k]) for k in distances[0]}
    lines = []
    for i, (settings, values) in enumerate(zip(combinations, distances, strict=True)):
        title = ", ".join(f"{name}={value}" for name, value in settings.items())
        lines.append([title, *(f"**{v:.3f}**" if best[k] == i else f"{v:.3f}" for k, v in values.items())])
    measured = {name: first[name] for name in ("num_samples", "seed", "reference", "network", "command")}
    measured["label"] = label
    entries = [
        {"settings": settings, "sampling": results["sampling"], "rows": results["rows"]}
        for settings, results in zip(combinations, found, strict=True)
    ]
    content = {**measured, "best": {str(k): combinations[i] for k, i in best.items()}, "combinations": entries}
    paragraphs = [
        f"# Settings of {config.model}",
        f"`{first['command']}`",
        f"{label}; the best of each k is bold.",
        table(["settings", *(f"k = {k}" for k in best)], lines),
    ]
    write_report(config.output_dir, "sweep", content, paragraphs)
    if config.write_settings:
        model = ModelSettings(
            by_num_tokens={k: SamplingConfig(**found[i]["sampling"]) for k, i in best.items()},
            fingerprint=first["model"]["fingerprint"],
            measured=measured | {"distances": {str(k): distances[i][k] for k, i in best.items()}},
        )
        model.save(Path(config.model) / "generator")
