import io
import os
import random
import struct
import subprocess
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.images import (
    Crop,
    UnreadableImageError,
    captioned_table,
    load_image,
    save_png,
    to_float,
    to_pil,
    to_uint8,
)

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def quarters(mode="RGB", side=16):
    """Four squares of one colour each: red, green / blue, white."""
    picture = Image.new("RGB", (2 * side, 2 * side))
    for i, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        picture.paste(tuple(colour), (i % 2 * side, i // 2 * side, (i % 2 + 1) * side, (i // 2 + 1) * side))
    return picture.convert(mode)


def corners(image):
    """The colours in the middle of the four squares."""
    quarter = image.shape[-1] // 4
    return [image[:, y, x].tolist() for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter)]


def near(found, expected, tolerance=6):
    return all(abs(a - b) <= tolerance for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert (floats.min().item(), floats.max().item()) == (-1, 1)
    assert torch.equal(to_uint8(floats), levels)


def test_floats_are_rounded_to_the_nearest_level_and_clipped():
    step = 2 / 255
    values = torch.tensor([-1 + 0.4 * step, -1 + 0.6 * step, -7.0, 7.0, 1 - 0.4 * step, 1 - 0.6 * step])
    assert to_uint8(values).tolist() == [0, 1, 0, 255, 255, 254]
    assert to_uint8(torch.tensor([1.0, -1.0], dtype=torch.bfloat16)).tolist() == [255, 0]


@pytest.mark.parametrize(("mode", "ending"), [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("P", "gif"),
                                              ("CMYK", "tif"), ("RGB", "bmp"), ("RGB", "webp")])  # fmt: skip
def test_colour_pictures_of_every_mode(tmp_path, mode, ending):
    path = tmp_path / f"a.{ending}"
    settings = {"lossless": True} if ending == "webp" else {}
    quarters(mode).save(path, **settings)
    image = load_image(path, 32)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 32, 32)
    assert near(corners(image), [RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_pictures_have_three_equal_channels(tmp_path, mode):
    picture = Image.new("L", (8, 8), 255 if mode == "1" else 77)
    picture.convert(mode).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8).unique().tolist() == [255 if mode == "1" else 77]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(tmp_path, ending):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(levels).save(tmp_path / f"a.{ending}")
    image = load_image(tmp_path / f"a.{ending}", 16)
    expected = torch.arange(256).reshape(16, 16).expand(3, 16, 16)
    assert (image.int() - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, [RED, GREEN, BLUE, WHITE]), (2, [GREEN, RED, WHITE, BLUE]), (3, [WHITE, BLUE, GREEN, RED]),
     (4, [BLUE, WHITE, RED, GREEN]), (5, [RED, BLUE, GREEN, WHITE]), (6, [BLUE, RED, WHITE, GREEN]),
     (7, [WHITE, GREEN, BLUE, RED]), (8, [GREEN, WHITE, RED, BLUE]), (9, [RED, GREEN, BLUE, WHITE])],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_pictures_are_rotated_by_their_exif_orientation(tmp_path, ending, orientation, expected):
    exif = Image.Exif()
    exif[0x112] = orientation
    quarters().save(tmp_path / f"a.{ending}", exif=exif)
    assert near(corners(load_image(tmp_path / f"a.{ending}", 32)), expected, tolerance=40)


def test_an_uncompressed_cmyk_tiff_is_rotated_as_well(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    quarters("CMYK").save(tmp_path / "a.tif", exif=exif)  # Pillow maps such a file without rotating it
    assert near(corners(load_image(tmp_path / "a.tif", 32)), [BLUE, RED, WHITE, GREEN])


def content_of(picture, kind, **settings):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(header, *chunks):
    """A PNG file of these chunks, each (kind, body), with right checksums."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *header)), *chunks, (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_a_file_and_its_content_give_the_same_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(content_of(quarters(), "JPEG"))
    assert torch.equal(load_image(path.read_bytes(), 20), load_image(path, 20))
    assert torch.equal(load_image(str(path), 20), load_image(path, 20))


@pytest.mark.parametrize("ending", ["jpg", "png", "txt", "gif"])
def test_the_format_is_that_of_the_content_and_not_of_the_name(tmp_path, ending):
    for kind in ("JPEG", "PNG", "WEBP"):
        (tmp_path / f"a.{ending}").write_bytes(content_of(quarters(), kind))
        assert near(corners(load_image(tmp_path / f"a.{ending}", 32)), [RED, GREEN, BLUE, WHITE], tolerance=40)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_parts_show_white(kind):
    picture = quarters("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((32, 32)).point(lambda level: 0 if level < 128 else 255))
    found = corners(load_image(content_of(picture, kind, **({"lossless": True} if kind == "WEBP" else {})), 32))
    assert near(found, [WHITE, WHITE, BLUE, WHITE])


def test_half_transparent_colours_are_mixed_with_white():
    for mode, colour, expected in (("RGBA", (0, 100, 200, 128), (127, 177, 227)), ("LA", (100, 64), (216, 216, 216))):
        image = load_image(content_of(Image.new(mode, (8, 8), colour), "PNG"), 8)
        assert near([image[:, 0, 0].tolist()], [list(expected)], tolerance=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_shows_white(kind):
    picture = quarters("P")
    red = picture.getpixel((2, 2))
    found = corners(load_image(content_of(picture, kind, transparency=red), 32))
    assert near(found, [WHITE, GREEN, BLUE, WHITE])


def test_a_colour_that_stands_for_transparency_shows_white():
    found = corners(load_image(content_of(quarters(), "PNG", transparency=(255, 0, 0)), 32))
    assert near(found, [WHITE, GREEN, BLUE, WHITE])


def test_opaque_pictures_with_an_alpha_channel_are_the_same_as_without():
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert torch.equal(
        load_image(content_of(pixels.convert("RGBA"), "PNG"), 8), load_image(content_of(pixels, "PNG"), 8)
    )


def test_an_inverted_cmyk_jpeg_of_adobe_programs_has_its_colours():
    # Adobe's programs write inverted ink, and an APP14 segment that names them
    content = content_of(quarters("CMYK"), "JPEG", quality=95)
    assert b"\xff\xee\x00\x0eAdobe" in content
    assert near(corners(load_image(content, 32)), [RED, GREEN, BLUE, WHITE], tolerance=40)


def test_sixteen_bit_colours_keep_their_high_byte():
    pixels = np.random.default_rng(0).integers(0, 2**16, (8, 8, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    image = load_image(png((8, 8, 16, 2, 0, 0, 0), (b"IDAT", zlib.compress(rows))), 8)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels >> 8)


def test_floats_lie_between_black_at_0_and_white_at_1():
    levels = np.linspace(-0.25, 1.25, 64, dtype=np.float32).reshape(8, 8)
    image = load_image(content_of(Image.fromarray(levels), "TIFF"), 8)
    expected = (levels.clip(0, 1) * 255).round()
    assert np.abs(image.numpy() - expected).max() <= 1
    levels[3, 3] = np.nan
    with pytest.raises(UnreadableImageError, match="not finite"):
        load_image(content_of(Image.fromarray(levels), "TIFF"), 8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [quarters(), *(Image.new("RGB", (32, 32), colour) for colour in ("black", "red"))]
    settings = {"lossless": True} if kind == "WEBP" else {}
    content = content_of(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    with Image.open(io.BytesIO(content)) as file:
        assert file.n_frames == 3
    assert near(corners(load_image(content, 32)), [RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (2, 60_000)])
def test_extreme_shapes_give_their_middle(size):
    picture = Image.new("RGB", size, "black")
    picture.paste("red", (size[0] // 2 - 9, size[1] // 2 - 9, size[0] // 2 + 9, size[1] // 2 + 9))
    image = load_image(content_of(picture, "PNG"), 8)
    assert image.shape == (3, 8, 8)
    assert image[:, 4, 4].tolist() == RED


@pytest.mark.parametrize("size", [(90, 60), (32, 96), (20, 16)])
@pytest.mark.parametrize(("across", "down"), [(0.5, 0.5), (0.0, 0.25), (1.0, 1.0), (0.7, 0.1)])
def test_a_crop_is_the_square_that_pillow_fits(size, across, down):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    fitted = ImageOps.fit(picture, (24, 24), Image.Resampling.LANCZOS, centering=(across, down))
    found = load_image(content_of(picture, "PNG"), 24, Crop(across=across, down=down))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(fitted))


def test_a_crop_may_keep_a_share_of_the_side_and_is_the_middle_square_by_default():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    content = content_of(picture, "PNG")
    assert torch.equal(load_image(content, 30), load_image(content, 30, Crop(share=1.0, across=0.5, down=0.5)))
    corner = picture.crop((60, 0, 90, 30)).resize((30, 30), Image.Resampling.LANCZOS)
    found = load_image(content, 30, Crop(share=0.5, across=1.0, down=0.0))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(corner))


def encoded(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def refusal(path):
    with pytest.raises(UnreadableImageError) as caught:
        load_image(path, 8)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_truncated_file_is_unreadable_and_named(tmp_path, kind, share):
    content = encoded(kind)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(content[: int(len(content) * share)])
    refusal(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"<svg></svg>", b"\0" * 500])
def test_what_is_no_image_is_unreadable_and_named(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    refusal(path)


def test_a_missing_file_and_a_folder_are_unreadable_and_named(tmp_path):
    refusal(tmp_path / "nothing.png")
    (tmp_path / "folder.png").mkdir()
    refusal(tmp_path / "folder.png")


def test_a_picture_too_large_to_be_meant_is_unreadable_and_named(tmp_path, monkeypatch):
    quarters().save(tmp_path / "a.png")
    for limit in (1000, 10):  # pillow warns above its limit and refuses above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refusal(tmp_path / "a.png")


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("width", "height"), [(8, 8), (5, 7), (1, 1), (3, 1), (1, 9)])
def test_a_png_whose_rows_end_early_is_unreadable(interlaced, width, height):
    # an independent count of an interlaced picture's bytes: each pixel belongs to the pass that the pattern names
    pattern = np.array([[1, 6, 4, 6, 2, 6, 4, 6], [7] * 8, [5, 6] * 4, [7] * 8,
                        [3, 6, 4, 6, 3, 6, 4, 6], [7] * 8, [5, 6] * 4, [7] * 8])  # fmt: skip
    number = np.tile(pattern, (2, 2))[:height, :width]
    if interlaced:
        lines = [1 + 3 * int(row.sum()) for i in range(1, 8) for row in number == i if row.any()]
    else:
        lines = [1 + 3 * width] * height
    header, size = (width, height, 8, 2, 0, 0, interlaced), sum(lines)
    rows = b"".join(b"\0" + b"\x55" * (line - 1) for line in lines)
    whole = load_image(png(header, (b"IDAT", zlib.compress(rows))), 8)
    assert whole.unique().tolist() == [0x55]
    with pytest.raises(UnreadableImageError):
        load_image(png(header, (b"IDAT", zlib.compress(rows[: size - lines[-1]]))), 8)
    with pytest.raises(UnreadableImageError):
        load_image(png(header), 8)


def test_a_damaged_exif_note_does_not_cost_the_picture():
    content = content_of(quarters(), "JPEG")
    for note in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 60):
        segment = b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note
        found = load_image(content[:2] + segment + content[2:], 32)
        assert near(corners(found), [RED, GREEN, BLUE, WHITE], tolerance=40)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_and_profiles_that_unpack_to_a_gigabyte_are_refused_at_once(kind):
    bomb = zlib.compress(bytes(2**24), 9)
    bomb = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind] + bomb
    rows = zlib.compress(b"\0" + bytes(3))
    content = png((1, 1, 8, 2, 0, 0, 0), *[(kind, bomb)] * 64, (b"IDAT", rows))
    start = time.process_time()
    with pytest.raises(UnreadableImageError, match="too large"):
        load_image(content, 8)
    assert time.process_time() - start < 5


def test_a_jpeg_of_endless_scans_is_refused_at_once():
    content = content_of(Image.new("L", (4000, 4000), 128), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    start = time.process_time()
    with pytest.raises(UnreadableImageError, match="scans"):
        load_image(content[:-2] + last * 20_000 + content[-2:], 8)
    assert time.process_time() - start < 5
    assert load_image(content[:-2] + last * 3 + content[-2:], 8).unique().tolist() == [128]


def test_a_pipe_and_a_file_of_enormous_size_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")  # to open it would wait for ever
    refusal(tmp_path / "a.jpg")
    with (tmp_path / "b.jpg").open("wb") as file:
        file.write(content_of(quarters(), "JPEG"))
        file.truncate(2**40)
    refusal(tmp_path / "b.jpg")


def test_no_other_program_is_started_for_a_file(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    content = content_of(quarters(), "EPS")
    with pytest.raises(UnreadableImageError, match="not an image"):
        load_image(content, 8)


def test_what_pillow_and_libtiff_complain_about_stays_off_the_terminal(capfd, recwarn, caplog):
    content = bytearray(content_of(quarters(), "TIFF", compression="tiff_lzw"))
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            load_image(bytes(damaged), 8)
        except UnreadableImageError:
            refused += 1
    assert refused > 20
    samples = content.index(struct.pack("<HHL", 277, 3, 1)) + 8  # how many there are to a pixel
    content[samples : samples + 2] = b"\x03\x10"
    with pytest.raises(UnreadableImageError):
        load_image(bytes(content), 8)
    assert not caplog.records
    os.write(2, b"stderr is still open\n")
    assert capfd.readouterr() == ("", "stderr is still open\n")
    assert not recwarn.list


def test_messages_are_one_printable_line_and_the_same_each_time(tmp_path):
    path = tmp_path / "a\n\x1b[31m\udcff.jpg"
    path.write_bytes(b"no image")
    lines = []
    for _ in range(2):
        with pytest.raises(UnreadableImageError) as caught:
            load_image(path, 8)
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "\\x1b[31m\\udcff.jpg: not an image" in lines[0]
    assert lines[0].isprintable()
    assert "0x" not in lines[0]
    with pytest.raises(UnreadableImageError, match=r"^row 3: ") as caught:
        load_image(b"no image", 8, name="row 3")
    assert "object at" not in str(caught.value)


def test_a_saved_picture_is_the_same_when_read_again(tmp_path):
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(to_pil(image), tmp_path / "deep" / "a.png")
    assert torch.equal(load_image(tmp_path / "deep" / "a.png", 8), image)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_a_table_shows_every_picture_enlarged_at_its_place():
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    plain = captioned_table([[red, blue], [blue]], min_side=64)
    pixels = np.asarray(plain).reshape(-1, 3)
    assert (pixels == RED).all(1).sum() == 64 * 64
    assert (pixels == BLUE).all(1).sum() == 2 * 64 * 64
    labelled = captioned_table([[red, blue], [blue]], ["first", "second"], ["a", "b"], min_side=64)
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    assert (np.asarray(labelled).reshape(-1, 3) == RED).all(1).sum() == 64 * 64
