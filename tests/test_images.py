"""Image files: colour modes, orientation, crops, and files that are damaged or hostile."""

import io
import os
import random
import subprocess

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


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def content_of(picture, kind, **settings):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def near(image, expected, tolerance=6):
    """Whether the middles of the four squares have these colours."""
    quarter = image.shape[-1] // 4
    found = [image[:, y, x].tolist() for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter)]
    return np.abs(np.array(found) - np.array(expected)).max() <= tolerance


def test_all_256_levels_survive_the_round_trip_and_floats_are_rounded_and_clipped():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    floats = to_float(levels)
    assert (floats.dtype, floats.min().item(), floats.max().item()) == (torch.float32, -1, 1)
    assert torch.equal(to_uint8(floats), levels)
    step = 2 / 255
    values = torch.tensor([-1 + 0.4 * step, -1 + 0.6 * step, -7.0, 7.0, 1 - 0.4 * step, 1 - 0.6 * step])
    assert to_uint8(values).tolist() == [0, 1, 0, 255, 255, 254]
    assert to_uint8(torch.tensor([1.0, -1.0], dtype=torch.bfloat16)).tolist() == [255, 0]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("RGB", "WEBP")],
)
def test_every_mode_becomes_rgb_by_path_and_by_content(tmp_path, mode, kind):
    path = tmp_path / "a.txt"  # the content decides, not the name
    path.write_bytes(content_of(quarters(mode), kind, **({"lossless": True} if kind == "WEBP" else {})))
    image = load_image(path, 32)
    assert (image.dtype, image.shape) == (torch.uint8, (3, 32, 32))
    assert near(image, [RED, GREEN, BLUE, WHITE], 40)
    assert torch.equal(load_image(path.read_bytes(), 32), image)
    assert torch.equal(load_image(str(path), 32), image)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(kind):
    levels = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    image = load_image(content_of(Image.fromarray(levels), kind), 16)
    assert np.array_equal(image.numpy(), np.broadcast_to((levels.astype(int) + 128) // 257, (3, 16, 16)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_rotated_by_their_exif_orientation(kind):
    expected = [
        [RED, GREEN, BLUE, WHITE], [GREEN, RED, WHITE, BLUE], [WHITE, BLUE, GREEN, RED], [BLUE, WHITE, RED, GREEN],
        [RED, BLUE, GREEN, WHITE], [BLUE, RED, WHITE, GREEN], [WHITE, GREEN, BLUE, RED], [GREEN, WHITE, RED, BLUE],
    ]  # fmt: skip
    for orientation, colours in enumerate(expected, 1):
        exif = Image.Exif()
        exif[0x112] = orientation
        assert near(load_image(content_of(quarters(), kind, exif=exif), 32), colours, tolerance=40), orientation


def test_a_damaged_exif_note_does_not_make_an_image_unreadable():
    exif = Image.Exif()
    exif[0x112], exif[0x131], exif[0x8769] = 6, "prog", {0x9003: "2020", 0x829A: (1, 3)}
    content = content_of(quarters(), "JPEG", exif=exif)
    text, floats = b"\x01\x31\x00\x02", b"\x01\x31\x00\x0b"  # Pillow fails to write this note again
    assert text in content
    assert near(load_image(content.replace(text, floats), 32), [BLUE, RED, WHITE, GREEN], tolerance=40)


@pytest.mark.parametrize("size", [(90, 60), (32, 96), (20, 16), (1, 5000)])
@pytest.mark.parametrize(("across", "down"), [(0.5, 0.5), (0.0, 0.25), (1.0, 1.0), (0.7, 0.1)])
def test_photographs_have_the_pixels_of_pillows_own_fit(size, across, down):
    for content in (content_of(noise(*size), "PNG"), content_of(noise(*size), "JPEG")):
        with Image.open(io.BytesIO(content)) as picture:
            fitted = ImageOps.fit(picture, (24, 24), Image.Resampling.LANCZOS, centering=(across, down))
        found = load_image(content, 24, Crop(across=across, down=down))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(fitted))
    corner = noise(90, 60).crop((60, 0, 90, 30)).resize((30, 30), Image.Resampling.LANCZOS)
    found = load_image(content_of(noise(90, 60), "PNG"), 30, Crop(share=0.5, across=1.0, down=0.0))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(corner))


def refusal(source, name=None):
    """The one printable line of an unreadable image."""
    with pytest.raises(UnreadableImageError) as caught:
        load_image(source, 8, name=name)
    assert str(caught.value).isprintable()
    assert "0x" not in str(caught.value)  # an address would differ each time
    return str(caught.value)


def test_what_cannot_be_read_is_named_in_one_printable_line(tmp_path, monkeypatch):
    path = tmp_path / "a\n\x1b[31m\udcff.jpg"
    path.write_bytes(b"no image")
    assert "\\x1b[31m\\udcff.jpg: not an image" in refusal(path)
    assert refusal(b"no image", "row 3").startswith("row 3: not an image")
    assert "missing" in refusal(tmp_path / "nothing.png")
    assert "regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "b.jpg")  # to open it would block
    assert "regular file" in refusal(tmp_path / "b.jpg")
    assert "floats" in refusal(content_of(Image.new("F", (8, 8)), "TIFF"))
    monkeypatch.setattr(subprocess, "Popen", None)  # no other program is started
    assert "not an image" in refusal(content_of(quarters(), "EPS"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_and_decompression_bombs_are_unreadable(kind, monkeypatch):
    content = content_of(noise(32, 24), kind)
    for share in (0.0, 0.1, 0.6):
        refusal(content[: int(len(content) * share)])
    load_image(content, 8)
    for limit in (700, 10):  # of 768 pixels; Pillow warns above its limit and refuses above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "bomb" in refusal(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_files_are_read_or_refused_without_warnings(kind, recwarn):
    content, rng, refused = content_of(noise(40, 32), kind), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[rng.randrange(min(len(damaged), 150))] = rng.randrange(256)  # where sizes and offsets are
        try:
            assert load_image(bytes(damaged), 8).shape == (3, 8, 8)
        except UnreadableImageError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused > 0
    assert not recwarn.list


def test_a_saved_image_is_the_same_when_read_again(tmp_path):
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(to_pil(image), tmp_path / "deep" / "a.png")
    assert torch.equal(load_image(tmp_path / "deep" / "a.png", 8), image)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_a_table_shows_every_image_enlarged_at_its_place():
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    plain = captioned_table([[red, blue], [blue]], min_side=64)
    pixels = np.asarray(plain).reshape(-1, 3)
    assert ((pixels == RED).all(1).sum(), (pixels == BLUE).all(1).sum()) == (64 * 64, 2 * 64 * 64)
    labelled = captioned_table([[red, blue], [blue]], ["first", "second"], ["a", "b"], min_side=64)
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    captioned = np.asarray(captioned_table([[red, blue], [blue]], min_side=64, cell_labels=[["a", "b" * 99], [""]]))
    assert (captioned[90:154, 4:68] == BLUE).all()
    below = captioned[68:84]
    assert (below[:, 4:68] < 128).any() and (below[:, 72:136] < 128).any() and (below[:, 136:] == 255).all()
