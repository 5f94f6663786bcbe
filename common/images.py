"""Image files, bytes 0..255 and floats in [-1, 1], the conversions between them, and plots."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.files import written_whole

MAX_MARKERS = 12  # of a line in a plot; one with more points has none
Lines = Mapping[str, Sequence[tuple[float, float]]]
# none of these decoders starts another program, as Pillow's EPS decoder does
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")


class UnreadableImageError(Exception):
    """An image that cannot be decoded: name and reason, both printable and on one line."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # as pickle passes them to another process
        self.name, self.reason = _printable(name), _printable(reason)[:300]

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A square part of an image.

    share: its side as a share of the shorter side of the image, in (0, 1].
    across, down: its position, each in [0, 1]: 0 is the left or upper edge, 1 the other one, 0.5 the middle.
    """

    share: float = 1.0
    across: float = 0.5
    down: float = 0.5


MIDDLE_SQUARE = Crop()


def _printable(text: str) -> str:
    # file names and contents may hold line breaks, terminal codes, or bytes that are not text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_float(images: Tensor) -> Tensor:
    """Bytes (..., 3, H, W) uint8 -> float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats (..., 3, H, W) in [-1, 1] -> uint8, rounded to the nearest level; beyond the range is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def decode_image(source: str | Path | bytes) -> Image.Image:
    """Decode a file, or the content of one, as an upright RGB image; of an animation the first frame.

    The format follows from the content, not from the file name. EXIF orientation is applied, transparency and
    colour profiles are not; 16-bit grey is scaled to 8 bits. Malformed content raises any class of exception.
    """
    if not isinstance(source, bytes) and not Path(source).is_file():  # to open a pipe would block
        raise ValueError("missing, or not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        except UnidentifiedImageError as error:  # its own message holds a memory address
            raise ValueError(f"not an image, or its header is damaged; read are {', '.join(FORMATS)}") from error
        with image:
            image.load()
            with suppress(Exception):  # a damaged EXIF note does not make the image unreadable
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise ValueError("its pixels are floats, whose range is not defined; convert it to 8 bits")
            if image.mode.startswith("I"):  # Pillow would clip 16 bits to 0..255
                return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


def load_image(source: str | Path | bytes, size: int, crop: Crop = MIDDLE_SQUARE, name: str | None = None) -> Tensor:
    """Read an image with `decode_image`, cut it to a square and scale it: (3, size, size) uint8, RGB.

    Args:
        source: path of a file, or its content.
        size: pixels of a side.
        crop: the part to keep.
        name: name of the image in errors; None uses the path.

    Raises:
        UnreadableImageError: not an image, damaged, cut short, or of more than `Image.MAX_IMAGE_PIXELS` pixels.
    """
    try:
        image = decode_image(source)
    except Exception as error:
        # Pillow's plugins raise whatever their code runs into: KeyError, struct.error, MemoryError, ...
        shown = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
        raise UnreadableImageError(name or shown, str(error) or type(error).__name__) from error
    side = min(image.size) * crop.share
    left, upper = (image.width - side) * crop.across, (image.height - side) * crop.down
    # sums of floats may exceed the edge by a rounding error, which Pillow refuses
    box = (left, upper, min(left + side, image.width), min(upper + side, image.height))
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return rearrange(torch.from_numpy(np.array(square)), "h w c -> c h w")


def to_pil(image: Tensor) -> Image.Image:
    """Bytes (3, H, W) uint8 -> a PIL image."""
    return Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").contiguous().numpy())


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG file, whole or not at all."""
    with written_whole(path) as temporary:
        picture.save(temporary, format="PNG")


def captioned_table(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    min_side: int = 96,
    cell_labels: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Arrange images in a labelled table.

    Args:
        rows: images, all of one size; rows may differ in length, and None is an empty cell.
        row_labels: captions on the left; each kind of label may be empty.
        column_labels: captions at the top.
        min_side: small images are enlarged by an integer factor until a side has about this many pixels.
        cell_labels: captions below the images, one for each cell.
    """
    table = [[picture and _enlarged(picture, min_side) for picture in row] for row in rows]
    width, height = next(picture.size for row in table for picture in row if picture)
    font, gap = ImageFont.load_default(size=14), 4
    left = gap + max((int(font.getlength(label)) + 8 for label in row_labels), default=0)
    top = gap + (22 if column_labels else 0)
    line = height + gap + (18 if cell_labels else 0)
    sheet = Image.new("RGB", (left + max(map(len, table)) * (width + gap), top + len(table) * line), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(row_labels):
        draw.text((gap, top + i * line + height // 2), label, "black", font, anchor="lm")
    for j, label in enumerate(column_labels):
        draw.text((left + j * (width + gap) + width // 2, gap + 9), label, "black", font, anchor="mm")
    for i, row in enumerate(table):
        for j, picture in enumerate(row):
            x, y = left + j * (width + gap), top + i * line
            if picture:
                sheet.paste(picture, (x, y))
            if cell_labels:
                label = cell_labels[i][j]
                while font.getlength(label) > width:
                    label = label[:-1]
                draw.text((x + width // 2, y + height + 9), label, "black", font, anchor="mm")
    return sheet


def _enlarged(picture: Image.Image, min_side: int) -> Image.Image:
    factor = max(1, round(min_side / picture.height))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_animation(pictures: Sequence[Image.Image], path: str | Path) -> None:
    """Write an animated WebP or GIF, by the ending of `path`: three seconds, then the last picture for a second."""
    first, *others = [_enlarged(picture, min_side=256) for picture in pictures]
    durations = [max(20, round(3000 / len(pictures)))] * len(others) + [1000]
    settings: dict[str, Any] = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    with written_whole(path) as temporary:
        first.save(temporary, format=Path(path).suffix[1:].upper(), quality=90, **settings)


def save_line_plot(
    panels: Mapping[str, Lines],
    path: str | Path,
    *,
    title: str,
    x_label: str,
    columns: int = 1,
    log2_x: bool = False,
) -> None:
    """Draw panels, `columns` in a row, with one legend, in which a name has the same colour in all of them.

    `panels`: lines of each panel by its title; points (x, y) of each line by its name. `log2_x`: logarithmic x axes.
    """
    # here, because drawing needs no plots
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns + 1), 3.4 * rows + 1.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (panel, lines) in zip(axes[: len(panels)], panels.items(), strict=True):
        axis.set(title=panel, xlabel=x_label)
        if log2_x:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(color="#dddddd", linewidth=0.8)
        for name, points in lines.items():
            marker = "o" if len(points) <= MAX_MARKERS else ""
            axis.plot(*zip(*points, strict=True), marker=marker, color=f"C{names.index(name)}", label=name)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    if len(names) > 1:
        handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns + 1, frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
