"""Malformed image files: encoded pictures of many formats, damaged in many ways, by a seed."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

WHOLE = "whole"


def _picture(mode: str, width: int = 40, height: int = 32) -> Image.Image:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((4, 4, width - 8, height - 6), fill=(200, 40, 90))
    draw.line((0, height, width, 0), fill=(10, 180, 60), width=3)
    if mode == "I;16":
        return Image.fromarray(np.array(picture.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.array(picture.convert("L")).astype(np.float32) / 255)
    if mode in ("RGBA", "LA"):
        picture = picture.convert("RGBA")
        picture.putalpha(Image.linear_gradient("L").resize((width, height)))
    return picture.convert(mode)


def _encoded(kind: str, mode: str, frames: int = 1, **settings: object) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a note"
    if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        settings["exif"] = exif
    if frames > 1:
        settings |= {"save_all": True, "append_images": [_picture(mode).rotate(90 * i) for i in range(1, frames)]}
    _picture(mode).save(buffer, kind, **settings)
    return buffer.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG file with right checksums, for any header."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    end = _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + end


@cache
def originals() -> list[bytes]:
    """Whole files of all formats and colour modes that are read."""
    deep = np.random.default_rng(0).integers(0, 2**16, (16, 18, 3), dtype=np.uint16)
    return [
        *(_encoded("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        _encoded("JPEG", "RGB", progressive=True, icc_profile=bytes(3000), comment=b"a comment"),
        *(_encoded("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        _encoded("PNG", "P", transparency=3),
        _encoded("PNG", "RGB", frames=3),
        png(18, 16, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)),
        *(_encoded("WEBP", mode) for mode in ("RGB", "RGBA")),
        _encoded("WEBP", "RGB", lossless=True),
        _encoded("WEBP", "RGB", frames=3),
        *(_encoded("GIF", "P", frames=count, transparency=2) for count in (1, 3)),
        *(_encoded("TIFF", mode) for mode in ("RGB", "CMYK", "L", "1", "I;16", "F", "RGBA", "P")),
        *(_encoded("TIFF", "RGB", compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        _encoded("TIFF", "1", compression="group4"),
        _encoded("TIFF", "RGB", big_tiff=True),
        *(_encoded("BMP", mode) for mode in ("RGB", "P", "1", "L")),
        *(_encoded("PPM", mode) for mode in ("RGB", "L", "1", "F")),
        *(_encoded("JPEG2000", mode) for mode in ("RGB", "L", "RGBA")),
        *([_encoded("AVIF", "RGB", max_threads=1)] if "AVIF" in Image.SAVE else []),
        b"P3 2 1 255 1 2 3 4 5 6\n",
    ]


def _any(rng: random.Random) -> bytes:
    return rng.choice(originals())


def _cut(rng: random.Random) -> bytes:
    content = _any(rng)
    return content[: rng.randrange(1, len(content))]


def _flipped(rng: random.Random) -> bytes:
    content = bytearray(_any(rng))
    # half of them in the header, where sizes and offsets are
    end = len(content) if rng.random() < 0.5 else min(len(content), 120)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(content)


def _overwritten(rng: random.Random) -> bytes:
    content = bytearray(_any(rng))
    start = rng.randrange(len(content))
    filling = rng.choice((b"\0", b"\xff", b"\x7f\xff\xff\xff", rng.randbytes(4)))
    length = min(rng.choice((2, 4, 8, 100)), len(content) - start)
    content[start : start + length] = (filling * 100)[:length]
    return bytes(content)


def _spliced(rng: random.Random) -> bytes:
    first, second = _any(rng), _any(rng)
    if rng.random() < 0.5:  # at the same place, so that sizes of the one meet data of the other
        place = rng.randrange(min(len(first), len(second)))
        return first[:place] + second[place:]
    return first[: rng.randrange(len(first))] + second[rng.randrange(len(second)) :]


def _shifted(rng: random.Random) -> bytes:
    content = _any(rng)
    start = rng.randrange(len(content))
    if rng.random() < 0.5:
        return content[:start] + content[start + rng.randrange(1, 50) :]
    return content[:start] + rng.randbytes(rng.randrange(1, 50)) + content[start:]


def _zeroed(rng: random.Random) -> bytes:
    return rng.choice((b"", b"\0", bytes(rng.randrange(2000))))


def _foreign(rng: random.Random) -> bytes:
    text = (
        *(b"hello\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4\n", b"PK\x03\x04", b"II*\0"),
        *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n", b"\0\0\0\x1cftypavif"),
        *(b"GIF89a", b"BM", b"P6 ", b"P3 9 9 255 "),
    )
    return rng.choice(text) + rng.choice((b"", rng.randbytes(rng.randrange(300))))


def _bomb(rng: random.Random) -> bytes:
    side = rng.choice((9460, 20_000, 65_535, 2**31 - 1))
    body = b"\0" * 100
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: png(side, side, 8, 2, body),
        lambda: png(side, side, 1, 0, body),
        lambda: png(1, 1, 8, 2, b"\0" * 4, _chunk(b"zTXt", b"a\0\0" + _packed_megabytes())),
        lambda: png(1, 1, 8, 2, b"\0" * 4, _chunk(b"iCCP", b"a\0\0" + _packed_megabytes())),
        lambda: png(1, 1, 8, 2, b"\0" * 4, _chunk(b"eXIf", _note_bomb())),
        lambda: b"GIF89a" + struct.pack("<HHBBB", side % 65536, side % 65536, 0xF0, 0, 0) + b"\0" * 6 + b",\0\0\0\0"
        + struct.pack("<HHBB", side % 65536, side % 65536, 0, 8) + b"\x01\x00\0;",
        lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + body,
        lambda: b"P6 %d %d 255\n" % (side, side) + body,
        lambda: _note_bomb()[6:],
        lambda: _resized_jpeg(min(side, 65_535)),
    )  # fmt: skip
    return rng.choice(kinds)()


@cache
def _packed_megabytes() -> bytes:
    return zlib.compress(bytes(2**23), 9)


@cache
def _note_bomb() -> bytes:
    # EXIF with 1000 entries that each claim the same two million bytes
    entries = b"".join(struct.pack("<HHLL", 1000 + i, 1, 2_000_000, 8) for i in range(1000))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1000) + entries + bytes(2000)


def _resized_jpeg(side: int) -> bytes:
    content = bytearray(originals()[1])
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", side, side)
    return bytes(content)


DAMAGES = (_cut, _flipped, _overwritten, _spliced, _shifted, _zeroed, _foreign, _bomb)
WEIGHTS = (20, 25, 12, 16, 12, 2, 4, 5)


def malformed(seed: int) -> tuple[str, bytes]:
    """The file of a seed: how it was made, and its content. 4 in 100 are whole."""
    rng = random.Random(seed)
    if rng.random() < 0.04:
        return WHOLE, _any(rng)
    (damage,) = rng.choices(DAMAGES, WEIGHTS)
    return damage.__name__[1:], damage(rng)
