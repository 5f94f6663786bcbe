"""From the bytes of an image file, whatever they are, to an upright RGB picture.

What bounds the time and memory that a file can cost: only regular files of at most MAX_FILE_BYTES are opened;
only the FORMATS below are tried (none of them starts another program, as EPS would); Pillow refuses pictures
of more than `Image.MAX_IMAGE_PIXELS` pixels before it decodes any, and text, profiles and tags that unpack to
more than a fixed size; the one format that may go over every pixel again and again, progressive JPEG, is
held to MAX_SCANNED_PIXELS. All that remains is linear in the file's bytes and the picture's pixels.
"""

import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
MAX_FILE_BYTES = 2**29
MAX_SCANNED_PIXELS = 2**32  # pixels x scans; a 50-megapixel progressive photograph has a tenth of it
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# columns and rows of each pass of an interlaced PNG: first, step, first, step
ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
_stderr_in_use = threading.Lock()


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a folder, a pipe or a device (which might never end), or larger than MAX_FILE_BYTES.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"the file has {size} bytes, more than the {MAX_FILE_BYTES} that are read")
    return path.read_bytes()


def decode(content: bytes) -> Image.Image:
    """Decode a file's content, all of it, as an upright RGB picture; of an animation the first frame.

    Colour profiles are not applied. Transparent parts show white. 16-bit grey is scaled to 8 bits, floats
    are taken to lie in [0, 1]. Notes (EXIF, XMP) that cannot be understood are passed over.

    Raises:
        Exception: of any class that Pillow may raise on malformed content.
    """
    if not content:
        raise ValueError("the file is empty")
    talkative = content[:2] in (b"II", b"MM") or content[4:8] == b"ftyp"  # TIFF and AVIF
    with _silenced() if talkative else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            file = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:  # its own message holds a memory address
            raise ValueError(f"not an image, or its header is damaged; read are {', '.join(FORMATS)}") from error
        with file:
            if file.format == "PNG":
                _check_png_is_whole(content)
            if file.format in ("JPEG", "MPO"):
                _check_scans(content, file.width * file.height)
            file.load()
            return _as_rgb(_upright(file))


def _check_png_is_whole(content: bytes) -> None:
    # where the compressed rows end early, Pillow leaves the rest of the picture black and says nothing
    inflate, missing, position = zlib.decompressobj(), 0, 8
    view = memoryview(content)
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        body: memoryview | bytes = view[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            missing = _png_row_bytes(*struct.unpack_from(">IIBBBBB", body))
        while kind == b"IDAT" and body and missing > 0 and not inflate.eof:
            missing -= len(inflate.decompress(body, 2**20))
            body = inflate.unconsumed_tail
        position += 12 + length
    if missing > 0:
        raise ValueError("the image data end early")


def _png_row_bytes(width: int, height: int, depth: int, colour: int, _: int, __: int, interlaced: int) -> int:
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    total = 0
    for left, across, top, down in ADAM7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = len(range(left, width, across)), len(range(top, height, down))
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total


def _check_scans(content: bytes, pixels: int) -> None:
    # FF DA starts a scan and cannot occur inside one; a scan of a few bytes makes the decoder visit every pixel
    scans = content.count(b"\xff\xda")
    if scans * pixels > MAX_SCANNED_PIXELS:
        raise ValueError(f"{scans} scans over {pixels} pixels, more than any real picture needs")


@contextmanager
def _silenced() -> Iterator[None]:
    # libtiff and some versions of libaom write their complaints to the process's error output, and Pillow one of
    # its own to a log; all of them end in an exception as well
    log = logging.getLogger("PIL.TiffImagePlugin")
    with _stderr_in_use:
        try:
            kept = os.dup(2)
        except OSError:  # the process has none
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        log.addFilter(_drop)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(nowhere)
            os.close(kept)
            log.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False


def _upright(file: ImageFile.ImageFile) -> Image.Image:
    # not ImageOps.exif_transpose: it writes all other notes anew and fails on those it cannot write
    try:
        method = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - a damaged note is no reason to lose a picture that is whole
        return file
    return file if method is None else file.transpose(method)


def _as_rgb(image: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit grey and floats to 0..255 instead of scaling them
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        levels = (np.array(image).clip(0, 65535).astype(np.uint32) + 128) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == "F":
        floats = np.array(image)
        if not np.isfinite(floats).all():
            raise ValueError("it holds numbers that are not finite")
        image = Image.fromarray((floats.clip(0, 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
