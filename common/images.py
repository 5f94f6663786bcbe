"""The one place where image files, bytes 0..255 and floats in [-1, 1] become one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.checkpoint import written_whole
from common.image_files import decode, read_file


class UnreadableImageError(Exception):
    """An image that cannot be decoded: its name and the reason, both printable and on one line."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = _printable(name), _printable(reason)[:300]

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A square part of a picture.

    share: its side as a share of the picture's shorter side, in (0, 1].
    across, down: where it lies, each in [0, 1]: 0 is the left or upper edge, 1 the other, 0.5 the middle.
    """

    share: float = 1.0
    across: float = 0.5
    down: float = 0.5


MIDDLE_SQUARE = Crop()


def _printable(text: str) -> str:
    # a file's name or content may hold line breaks, terminal codes, or bytes that are no text at all
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_float(images: Tensor) -> Tensor:
    """Bytes (..., 3, H, W) uint8 -> float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats (..., 3, H, W) in [-1, 1] -> uint8, rounded to the nearest level; beyond the range is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_image(source: str | Path | bytes, size: int, crop: Crop = MIDDLE_SQUARE, name: str | None = None) -> Tensor:
    """Read an image as bytes (3, size, size) uint8, RGB.

    Turned as its EXIF note says, cut to a square and scaled; `common.image_files.decode` tells what is done
    about transparency, other colour modes and animations. The kind of file is told by its content, not its name.

    Args:
        source: a file's path, or its content.
        size: pixels of a side.
        crop: the part to keep.
        name: what an error calls the image; None takes the path.

    Raises:
        UnreadableImageError: not an image, damaged, cut short, or too large to be meant; nothing else
            is raised, whatever the file holds.
    """
    if name is None:
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        image = decode(source if isinstance(source, bytes) else read_file(Path(source)))
    except Exception as error:
        # Pillow's plugins raise what their code happens to run into: KeyError, struct.error, MemoryError, ...
        raise UnreadableImageError(name, str(error) or type(error).__name__) from error
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
) -> Image.Image:
    """Lay pictures out as a labelled table.

    Args:
        rows: pictures, all of one size; rows may differ in length, and None leaves a place empty.
        row_labels: a caption to the left of each row; empty for none.
        column_labels: a caption above each column; empty for none.
        min_side: small pictures are enlarged by a whole factor until a side has about this many pixels.
    """
    width, height = next(picture.size for row in rows for picture in row if picture)
    factor = max(1, round(min_side / height))
    height, width, gap = height * factor, width * factor, 4
    font = ImageFont.load_default(size=14)
    left = gap + max((int(font.getlength(label)) + 8 for label in row_labels), default=0)
    top = gap + (22 if column_labels else 0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(row_labels):
        draw.text((gap, top + i * (height + gap) + height // 2), label, "black", font, anchor="lm")
    for j, label in enumerate(column_labels):
        draw.text((left + j * (width + gap) + width // 2, gap + 9), label, "black", font, anchor="mm")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            if picture:
                enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left + j * (width + gap), top + i * (height + gap)))
    return sheet
