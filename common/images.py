"""The one place where image files, bytes 0..255 and floats in [-1, 1] become one another."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.checkpoint import written_whole


class UnreadableImageError(Exception):
    """An image file that cannot be decoded; the message names it and says why."""


def to_float(images: Tensor) -> Tensor:
    """Bytes (..., 3, H, W) uint8 -> float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats (..., 3, H, W) in [-1, 1] -> uint8, rounded to the nearest level; beyond the range is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit grey to 255 instead of scaling it
    if image.mode not in ("I", "I;16", "I;16B", "I;16L"):
        return image
    return Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))


def load_image(path: str | Path, size: int) -> Tensor:
    """Read an image file as bytes (3, size, size) uint8, RGB.

    Turned as its EXIF note says; the shorter side is scaled to `size`, the middle square is kept.

    Raises:
        UnreadableImageError: not an image, truncated, or too large to be meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = _eight_bits(ImageOps.exif_transpose(file)).convert("RGB")
    except (
        OSError, ValueError, SyntaxError, UnidentifiedImageError,
        Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise UnreadableImageError(f"{path}: {error}") from error
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


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
