"""The report: results.json, results.md and quality.png of a measurement, and sweep.json and sweep.md of a sweep."""

import json
import logging
from pathlib import Path
from typing import Any

from common.files import write_text
from common.plots import Panel, save_line_plot
from evaluation.features import INCEPTION
from evaluation.fid.config import FULL, FidConfig
from evaluation.reports import cell, table_head, table_line
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


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, results.md and quality.png, and log the figures.

    Args:
        results: the content of results.json.
        folder: of the files.
    """
    rows = results["rows"]
    shown = {name: label for name, label in results["labels"].items() if rows[0][name] is not None}
    panels = []
    for name, label in shown.items():
        lines = {
            title: [(row["num_tokens"], row[name]) for row in rows if row["refined"] == refined]
            for refined, title in ((False, "decoded"), (True, "refined"))
        }
        panels.append(Panel(title=label, lines={name: line for name, line in lines.items() if line}, y_scale="linear"))
    title = f"{results['model']['name']} against {results['reference']['name']}"
    save_line_plot(
        panels, folder / "quality.png", title=title, x_label="k, tokens", columns=3, share_y=False, log2_x=True
    )
    text = [f"# {title}", "", f"`{results['command']}`", "", *table_head(["k", *shown.values(), "seconds a sample"])]
    for row in rows:
        figures = [format(row[name], FORMS[name]) for name in shown]
        seconds = f"{row['draw_seconds'] + row['decode_seconds']:.3g}"
        name = f"{row['num_tokens']}{' refined' if row['refined'] else ''}"
        text.append(table_line([name, *figures, seconds]))
        logger.info("k = %s  %s", name, "  ".join(map("{}: {}".format, shown.values(), figures)))
    sampling = ", ".join(f"{name} {value}" for name, value in results["sampling"].items())
    text += ["", f"Sampling: {sampling}. Reference and all other settings: results.json."]
    if results["anchors"] is not None:
        text += ["", "Anchors:", *_anchor_lines(results["anchors"])]
    write_text(folder / "results.md", "\n".join([*text, ""]))
    write_text(folder / "results.json", json.dumps(results, indent=1))
    logger.info("results.json, results.md and quality.png written to %s", folder)


def _anchor_lines(anchors: dict[str, Any]) -> list[str]:
    names = ["half against half, right classes", "shuffled classes"]
    names += [f"reconstructed from {row['num_tokens']} tokens" for row in anchors["reconstructions"]]
    found = [anchors["real"], {"distance": None} | anchors["shuffled"], *anchors["reconstructions"]]
    lines = ["", *table_head([f"{anchors['images']:,} images of the reference", "distance", "class accuracy"])]
    for name, row in zip(names, found, strict=True):
        lines.append(table_line([name, cell(row["distance"], ".3f"), cell(row["class_accuracy"], ".1%")]))
    return lines


def write_sweep(combinations: list[dict[str, Any]], found: list[dict[str, Any]], config: FidConfig) -> None:
    """Write sweep.md and sweep.json, of refined images if there are any.

    With config.write_settings, write the best settings of each k to the model's folder.

    Args:
        combinations: the settings that were varied.
        found: the content of results.json of each.
        config: all other settings.
    """
    refined = found[0]["refinement"] is not None
    compared = [[row for row in results["rows"] if row["refined"] == refined] for results in found]
    first, token_counts = found[0], [row["num_tokens"] for row in compared[0]]
    distance, label = next(iter(first["labels"].items()))
    table = [[row[distance] for row in rows] for rows in compared]
    # for each k the index of the combination with the lowest distance
    best = {k: min((values[j], i) for i, values in enumerate(table))[1] for j, k in enumerate(token_counts)}
    lines = [f"# Settings of {config.model}", "", f"`{first['command']}`", "", f"{label}; the best of each k is bold."]
    lines += ["", *table_head(["settings", *(f"k = {k}" for k in token_counts)])]
    for i, (settings, values) in enumerate(zip(combinations, table, strict=True)):
        title = ", ".join(f"{name}={value}" for name, value in settings.items())
        cells = zip(token_counts, values, strict=True)
        lines.append(table_line([title, *(f"**{v:.3f}**" if best[k] == i else f"{v:.3f}" for k, v in cells)]))
    write_text(Path(config.output_dir) / "sweep.md", "\n".join([*lines, ""]))
    keys = ("sampling", "rows")
    content = {name: first[name] for name in ("num_samples", "seed", "reference", "network", "command")}
    content |= {"label": label, "best": {str(k): combinations[i] for k, i in best.items()}}
    entries = zip(combinations, found, strict=True)
    content["combinations"] = [{"settings": settings, **{key: row[key] for key in keys}} for settings, row in entries]
    write_text(Path(config.output_dir) / "sweep.json", json.dumps(content, indent=1))
    logger.info("sweep.json and sweep.md written to %s", config.output_dir)
    if config.write_settings:
        measured = {name: value for name, value in content.items() if name not in ("best", "combinations")}
        measured["distances"] = {str(k): table[best[k]][j] for j, k in enumerate(token_counts)}
        best_sampling = {k: SamplingConfig(**found[i]["sampling"]) for k, i in best.items()}
        model = ModelSettings(by_num_tokens=best_sampling, fingerprint=first["model"]["fingerprint"], measured=measured)
        model.save(Path(config.model) / "generator")
