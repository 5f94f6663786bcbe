"""Write a measurement: results.json (everything), results.md (a table), plots and sheets of pictures."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from common.files import write_text
from common.images import captioned_table, save_png, to_pil
from common.plots import Panel, save_line_plot
from evaluation.reports import place, table_head, table_line

logger = logging.getLogger(__name__)
FORMS = {
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS (VGG)", ".4f"),
    "rfid": ("rFID", ".2f"),
    "feature_distance": ("distance of features", ".3f"),
    "bits_per_pixel": ("bits per pixel", ".4f"),
    "codebook_use": ("codes used", ".1%"),
    "nats_per_token": ("nats per token", ".3f"),
    "bits": ("bits", ",.0f"),
    "prior_distance": ("distance of the prior's samples", ".2f"),
}
PLOTTED = ("psnr", "ssim", "lpips", "rfid", "feature_distance")


def _images(found: dict[str, Any]) -> str:
    """Which images: how many, and of what."""
    reference = found["reference"]
    of_all = "" if found["images"] == reference["available"] else f" of {reference['available']:,}, spread evenly"
    return f"{found['images']:,} images{of_all} ({reference['name']})"


def table(found: dict[str, Any]) -> str:
    """Format results.md: a line for each k, then the images and the tokenizer."""
    model, book, reference = found["tokenizer"], found["codebook"], found["reference"]
    names = [name for name in FORMS if found["rows"][0][name] is not None]
    heads = [f"rFID, N = {found['images']:,}" if name == "rfid" else FORMS[name][0] for name in names]
    lines = [f"# Reconstruction: {model['name']}", "", f"`{found['command']}`", "", *table_head(["k", *heads])]
    for row in found["rows"]:
        cells = ["-" if row[name] is None else format(row[name], FORMS[name][1]) for name in names]
        lines.append(table_line([f"{row['num_tokens']}{' refined' if row['refined'] else ''}", *cells]))
    lines += [
        "",
        f"N = {_images(found)}, fingerprint {reference['fingerprint']}; {found['unreadable']['count'] or 'none'} "
        f"unreadable. Tokenizer: {model['image_size']}x{model['image_size']}, C = {model['num_channels']}, "
        f"{model['num_bits']} bits, fingerprint {model['fingerprint']}. "
        f"Decoded in {found['settings']['dtype']} on {place(found['machine'], found['versions'])}.",
        "",
        f"Codebook: {book['use']:.1%} of {book['codes']:,} codes occur among {book['tokens_counted']:,} tokens. "
        "Codes used: those that occur among the first k channels of these images.",
    ]
    if "rfid" in names:
        lines += ["", "rFID compares with the same images, as the tokenizer receives them. Below 10,000 images it is "
                      "biased upwards: compare it only with figures of the same images."]  # fmt: skip
    if found["rows"][-1]["refined"]:
        lines += ["", "Detail of a refined image that its tokens do not hold is invented: PSNR falls where there is "
                      "much of it, while distances between sets of images may fall, too."]  # fmt: skip
    absent = [title for name, (title, _) in FORMS.items() if name not in names]
    lines += ["", f"Not measured: {', '.join(absent)}."] if absent else []
    return "\n".join([*lines, ""])


def _plots(found: dict[str, Any], folder: Path) -> None:
    """Write plots.png and, with a curve, channel_gain.png."""
    name, where, curve = found["tokenizer"]["name"], _images(found), found["curve"]
    names = {row["refined"]: f"{name}, refined" if row["refined"] else name for row in found["rows"]}
    panels = [
        Panel(
            title=FORMS[measure][0],
            lines={
                title: [(row["num_tokens"], row[measure]) for row in found["rows"] if row["refined"] == refined]
                for refined, title in names.items()
            },
            y_scale="log" if measure == "rfid" else "linear",
        )
        for measure in PLOTTED
        if found["rows"][0][measure] is not None
    ]
    title = f"Reconstruction from k tokens\n{name}: {where}"
    options: dict[str, Any] = {"columns": 2, "share_y": False, "log2_x": True}
    save_line_plot(panels, folder / "plots.png", title=title, x_label="k, tokens kept", **options)
    if found["channel_gain"]:
        points = list(enumerate(found["channel_gain"], 1))[1:]
        panel = Panel(title="gain in PSNR, dB", lines={name: points}, y_scale="linear")
        title = f"Gain of each channel over those before it\n{name}: {curve['images']} images"
        save_line_plot([panel], folder / "channel_gain.png", title=title, x_label="channel", columns=1)


def write_report(found: dict[str, Any], sheet: list[list[Tensor]], output_dir: str | Path, command: str) -> None:
    """Write results and pictures of `measure_reconstruction`, each file whole; `command` repeats the measurement."""
    folder, found = Path(output_dir), found | {"command": command}
    write_text(folder / "results.json", json.dumps(found, indent=1))
    write_text(folder / "results.md", table(found))
    _plots(found, folder)
    if sheet:
        labels = ["refined" if row["refined"] else f"k={row['num_tokens']}" for row in found["rows"]] + ["original"]
        pictures = captioned_table([[to_pil(image) for image in row] for row in sheet], column_labels=labels)
        save_png(pictures, folder / "reconstructions.png")
    logger.info("results.json, results.md and pictures written to %s, after %.0f s", folder, found["seconds"])
