"""Write a measurement: results.json (everything), results.md (a table), plots and sheets of pictures."""

from pathlib import Path
from typing import Any

from torch import Tensor

from common.images import captioned_table, save_line_plot, save_png, to_pil
from evaluation.reports import cell, place, table, write_report

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


def report(found: dict[str, Any]) -> list[str]:
    """Format results.md: paragraphs, one of them a table with a line for each k."""
    model, book, rows = found["tokenizer"], found["codebook"], found["rows"]
    names = [name for name in FORMS if rows[0][name] is not None]
    heads = [f"rFID, N = {found['images']:,}" if name == "rfid" else FORMS[name][0] for name in names]
    lines = [
        [f"{row['num_tokens']}{' refined' * row['refined']}", *(cell(row[name], FORMS[name][1]) for name in names)]
        for row in rows
    ]
    paragraphs = [
        f"# Reconstruction: {model['name']}",
        f"`{found['command']}`",
        table(["k", *heads], lines),
        f"N = {_images(found)}, fingerprint {found['reference']['fingerprint']}; "
        f"{found['unreadable']['count'] or 'none'} unreadable. Tokenizer: {model['image_size']}x{model['image_size']}, "
        f"C = {model['num_channels']}, {model['num_bits']} bits, fingerprint {model['fingerprint']}. "
        f"Decoded in {found['settings']['dtype']} on {place(found)}.",
        f"Codebook: {book['use']:.1%} of {book['codes']:,} codes occur among {book['tokens_counted']:,} tokens. "
        "Codes used: those that occur among the first k channels of these images.",
    ]
    if "rfid" in names:
        paragraphs.append(
            "rFID compares with the same images, as the tokenizer receives them. Below 10,000 images it is biased "
            "upwards: compare it only with figures of the same images."
        )
    if rows[-1]["refined"]:
        paragraphs.append(
            "Detail of a refined image that its tokens do not hold is invented: PSNR falls where there is much of it, "
            "while distances between sets of images may fall, too."
        )
    absent = [title for name, (title, _) in FORMS.items() if name not in names]
    return paragraphs + ([f"Not measured: {', '.join(absent)}."] if absent else [])


def _plots(found: dict[str, Any], folder: Path) -> None:
    """Write plots.png and, with a curve, channel_gain.png."""
    name, rows = found["tokenizer"]["name"], found["rows"]
    names = {row["refined"]: f"{name}, refined" if row["refined"] else name for row in rows}
    panels = {
        FORMS[measure][0]: {
            title: [(row["num_tokens"], row[measure]) for row in rows if row["refined"] == refined]
            for refined, title in names.items()
        }
        for measure in PLOTTED
        if rows[0][measure] is not None
    }
    title = f"Reconstruction from k tokens\n{name}: {_images(found)}"
    save_line_plot(panels, folder / "plots.png", title=title, x_label="k, tokens kept", columns=2, log2_x=True)
    if found["channel_gain"]:
        points = list(enumerate(found["channel_gain"], 1))[1:]
        title = f"Gain of each channel over those before it\n{name}: {found['curve']['images']} images"
        save_line_plot(
            {"gain in PSNR, dB": {name: points}}, folder / "channel_gain.png", title=title, x_label="channel"
        )


def write_reconstruction(found: dict[str, Any], sheet: list[list[Tensor]], output_dir: str) -> None:
    """Write results and pictures of `measure_reconstruction` with its command, each file whole."""
    folder = Path(output_dir)
    write_report(folder, "results", found, report(found))
    _plots(found, folder)
    if sheet:
        labels = ["refined" if row["refined"] else f"k={row['num_tokens']}" for row in found["rows"]] + ["original"]
        pictures = captioned_table([[to_pil(image) for image in row] for row in sheet], column_labels=labels)
        save_png(pictures, folder / "reconstructions.png")
