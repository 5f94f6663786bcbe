"""What a measurement leaves: results.json (everything), results.md (a table), plots and a sheet of pictures."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from common.checkpoint import read_json, write_text
from common.errors import InputError
from common.images import captioned_table, save_png, to_pil
from common.measuring import machine, versions
from common.plots import Panel, save_line_plot
from evaluation.reconstruction.measure import ReconstructionResults
from evaluation.tables import table_head, table_line

logger = logging.getLogger(__name__)
PACKAGES = ("torchmetrics", "torch-fidelity")
FEW_IMAGES = 10_000
METHODS = {
    "psnr": "mean over images of the dB of 8-bit pictures, peak 255",
    "ssim": "torchmetrics: Gaussian window 11 x 11, sigma 1.5, data range 255, border mirrored; mean over images",
    "lpips": "torchmetrics: VGG-16, on 8-bit pictures; mean over images",
    "rfid": "InceptionV3 of torch-fidelity, layer 2048; Fréchet distance in float64, by singular values",
    "bits": "negative log-likelihood under a linear prior fitted to the tokens of training images, sum over k tokens",
    "prior_distance": "Fréchet distance between samples of that prior and the images, in the classifier's features",
}
COLUMNS = {
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS (VGG)", "{:.4f}"),
    "rfid": ("rFID", "{:.2f}"),
    "bits_per_pixel": ("bits per pixel", "{:.4f}"),
    "codebook_use": ("codes used", "{:.1%}"),
    "nats_per_token": ("nats per token", "{:.3f}"),
    "bits": ("bits", "{:,.0f}"),
    "prior_distance": ("distance of the prior's samples", "{:.2f}"),
}
PANELS = {
    "psnr": ("PSNR, dB (higher is better)", "linear"),
    "ssim": ("SSIM (higher is better)", "linear"),
    "lpips": ("LPIPS, VGG (lower is better)", "linear"),
    "rfid": ("rFID (lower is better)", "log"),
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Rate-distortion curve of a tokenizer.

    points: (bits, PSNR in dB) for each k. images: fingerprint and number of the images, and how many the prior was
    fitted to; curves are comparable where these are equal.
    """

    name: str
    path: str
    points: list[tuple[float, float]]
    images: tuple[str, int, int]

    @classmethod
    def of(cls, found: dict[str, Any], path: str) -> Self:
        """From what a results.json holds; KeyError, TypeError or ValueError if it has no rates."""
        return cls(
            name=str(found["tokenizer"]["name"]),
            path=path,
            points=[(float(row["bits"]), float(row["psnr"])) for row in found["rows"]],
            images=(found["reference"]["fingerprint"], found["images"], found["prior"]["train_images"]),
        )


def channel_gain(curve: Sequence[float]) -> list[float | None] | None:
    """Mean PSNR at k = 1..C -> what each channel adds to those before it, in dB; nothing is before the first one.

    None for an empty curve.
    """
    if not curve:
        return None
    return [None, *(after - before for before, after in pairwise(curve))]


def content(results: ReconstructionResults, command: str) -> dict[str, Any]:
    """What results.json holds.

    rows: one for each k, see `measure._row`; null is "not measured". images: N, of all rows. codebook: see
    `CodebookCounts.summary`. prior: nats of each token under a prior fitted to train_images images and their mirror
    images; null if not measured. channel_gain: dB by channel, the first null, over `curve.images` images.
    """
    measured = [name for name in METHODS if results.rows[0][name] is not None]
    return {
        "rows": results.rows,
        "images": results.images,
        "unreadable": results.unreadable,
        "reference": results.reference,
        "methods": {name: METHODS[name] if name in measured else None for name in METHODS},
        "tokenizer": results.tokenizer,
        "codebook": results.codebook,
        "prior": {"train_images": results.rate.train_images, "nats": results.rate.nats.tolist()}
        if results.rate
        else None,
        "channel_gain": channel_gain(results.curve),
        "curve": {"images": results.curve_images, "psnr": results.curve},
        "settings": results.config,
        "command": command,
        "machine": machine(results.device),
        "device": str(results.device),
        "dtype": results.config["dtype"],
        "versions": versions(PACKAGES),
        "seconds": results.seconds,
        "images_per_second": results.images / results.seconds,
    }


def _measured(found: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if found["rows"][0][name] is not None]


def _where(found: dict[str, Any]) -> str:
    """Which images: how many, and of what."""
    reference = found["reference"]
    of_all = "" if found["images"] == reference["available"] else f" of {reference['available']:,}, spread evenly"
    return f"{found['images']:,} images{of_all} ({reference['name']})"


def table(found: dict[str, Any]) -> str:
    """results.md: a line for each k, and under it what the figures rest on."""
    model, book, reference = found["tokenizer"], found["codebook"], found["reference"]
    names = _measured(found, tuple(COLUMNS))
    heads = {name: COLUMNS[name][0] for name in names}
    if "rfid" in heads:
        heads["rfid"] = f"rFID, N = {found['images']:,}"
    lines = [f"# Reconstruction: {model['name']}", "", f"`{found['command']}`", ""]
    lines += table_head(["k", *heads.values()])
    for row in found["rows"]:
        lines.append(table_line([str(row["num_tokens"]), *(COLUMNS[name][1].format(row[name]) for name in names)]))
    unread = found["unreadable"]["count"]
    lines += [
        "",
        f"N = {_where(found)}, fingerprint {reference['fingerprint']}; {unread or 'none'} unreadable. "
        f"Prepared: {reference['preparation']}. Tokenizer: {model['image_size']}x{model['image_size']}, "
        f"C = {model['num_channels']}, {model['num_bits']} bits, fingerprint {model['fingerprint']}. "
        f"Decoded in {found['dtype']} on {found['machine']['gpu'] or found['machine']['cpu']}, "
        f"torch {found['versions']['torch']}.",
        "",
        f"Codebook: {book['use']:.1%} of {book['codes']:,} codes occur among {book['tokens_counted']:,} tokens. "
        "Codes used: those that occur among the first k channels of these images.",
        "",
        *(f"{COLUMNS[name][0].split(',')[0]}: {text}." for name, text in found["methods"].items() if text),
    ]
    if "rfid" in heads:
        lines.append(f"rFID compares with the same {found['images']:,} images, as the tokenizer sees them.")
        if found["images"] < FEW_IMAGES:
            lines += ["", f"**{_few_images(found['images'])}**"]
    absent = [COLUMNS[name][0] for name in METHODS if name not in names]
    if absent:
        lines += ["", f"Not measured: {', '.join(absent)}."]
    return "\n".join([*lines, ""])


def _few_images(count: int) -> str:
    return (
        f"N = {count:,} is below {FEW_IMAGES:,}: rFID is biased upwards at so few images and can only be compared with "
        "figures of the same N and the same images."
    )


def _plots(found: dict[str, Any], compared: Sequence[Curve], folder: Path) -> None:
    """plots.png, codebook.png and, where a curve was measured, channel_gain.png."""
    model, book, curve = found["tokenizer"], found["codebook"], found["curve"]
    name, about = model["name"], f"{model['name']}: {_where(found)}"
    channels = range(1, model["num_channels"] + 1)
    panels = []
    for metric in _measured(found, tuple(PANELS)):
        title, y_scale = PANELS[metric]
        title += f", N = {found['images']:,}" if metric == "rfid" else ""
        points = [(row["num_tokens"], row[metric]) for row in found["rows"]]
        panels.append(Panel(title=title, lines={name: points}, y_scale=y_scale))
    title = f"Reconstruction from k tokens\n{about}"
    _save_plot(panels, folder / "plots.png", title, "k, tokens kept", log2_x=True)

    panels = []
    for measure, title in (("entropy_bits", f"entropy, of {model['num_bits']} bits"), ("use", "share of codes used")):
        points = list(zip(channels, book["by_channel"][measure], strict=True))
        most = book["limit_by_channel"][measure]
        limit = [(channels[0], most), (channels[-1], most)]
        panels.append(Panel(title=title, lines={name: points}, limit=limit, y_scale="linear"))
    limit_label = f"most that {found['images']:,} images can show"
    _save_plot(panels, folder / "codebook.png", f"Codes by channel\n{about}", "channel", limit_label=limit_label)

    if found["prior"]:
        _plot_rate_distortion(found, compared, folder)
    if found["channel_gain"]:
        points = list(zip(channels, curve["psnr"], strict=True))
        gains = list(zip(channels, found["channel_gain"], strict=True))[1:]
        panels = [
            Panel(title="PSNR, dB", lines={name: points}, y_scale="linear"),
            Panel(title="gain of each further channel, dB", lines={name: gains}, y_scale="linear"),
        ]
        title = f"What each channel adds\n{name}: {curve['images']} images, every k from 1 to {channels[-1]}"
        _save_plot(panels, folder / "channel_gain.png", title, "k, tokens kept")


def read_curve(path: str | Path) -> Curve:
    """Rate-distortion curve of an earlier results.json.

    Raises:
        InputError: a file that cannot be read or has no rate.
    """
    found = read_json(path)
    try:
        return Curve.of(found, str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} has no rates; make it with benchmark.py reconstruction --prior-images N") from error


def _plot_rate_distortion(found: dict[str, Any], compared: Sequence[Curve], folder: Path) -> None:
    own = Curve.of(found, str(folder))
    lines = {own.name: own.points}
    for curve in compared:
        lines[curve.name if curve.name not in lines else f"{curve.name} ({curve.path})"] = curve.points
        if curve.images != own.images:
            logger.warning("%s was measured on other images or with a prior fitted to others", curve.path)
    save_line_plot(
        [Panel(title="", lines=lines, y_scale="linear")],
        folder / "rate_distortion.png",
        title=f"Rate and distortion by k\n{_where(found)}",
        x_label="bits of the first k tokens under a linear prior",
        y_label="PSNR, dB",
        columns=1,
        log2_x=True,
        tick_each=False,
    )


def _save_plot(panels: list[Panel], path: Path, title: str, x_label: str, **options: Any) -> None:
    save_line_plot(panels, path, title=title, x_label=x_label, columns=2, share_y=False, **options)


def write_report(
    results: ReconstructionResults, output_dir: str | Path, command: str, compared: Sequence[Curve] = ()
) -> None:
    """Write everything into a folder, each file whole.

    Args:
        results: of the measurement.
        output_dir: the folder.
        command: what the reader can repeat.
        compared: curves of other tokenizers, for rate_distortion.png.
    """
    folder, found = Path(output_dir), content(results, command)
    write_text(folder / "results.json", json.dumps(found, indent=1))
    write_text(folder / "results.md", table(found))
    _plots(found, compared, folder)
    labels = [*(f"k={row['num_tokens']}" for row in results.rows), "original"]
    if results.sheet:
        rows = [[to_pil(image) for image in row] for row in results.sheet]
        save_png(captioned_table(rows, column_labels=labels), folder / "reconstructions.png")
    if results.rate and results.rate.sheet:
        rows = [[to_pil(image) for image in row] for row in results.rate.sheet]
        save_png(captioned_table(rows, column_labels=labels[:-1]), folder / "prior_samples.png")
    if found["rows"][0]["rfid"] is not None and found["images"] < FEW_IMAGES:
        logger.warning("%s", _few_images(found["images"]))
    logger.info("results.json, results.md and pictures written to %s, after %.0f s", folder, results.seconds)
