import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import (
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


def test_cmyk_jpeg(tmp_path):
    quarters("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert near(corners(load_image(tmp_path / "a.jpg", 32)), [RED, GREEN, BLUE, WHITE], tolerance=40)


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
     (6, [BLUE, RED, WHITE, GREEN]), (8, [GREEN, WHITE, RED, BLUE])],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_pictures_are_turned_as_their_exif_note_says(tmp_path, ending, orientation, expected):
    exif = Image.Exif()
    exif[0x112] = orientation
    quarters().save(tmp_path / f"a.{ending}", exif=exif)
    assert near(corners(load_image(tmp_path / f"a.{ending}", 32)), expected, tolerance=40)


def test_one_pixel_fills_the_image(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 8)
    assert image.shape == (3, 8, 8)
    assert image[:, 3, 3].tolist() == [10, 20, 30]
    assert all(len(channel.unique()) == 1 for channel in image)


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (20, 16)])
def test_the_middle_square_is_kept_and_nothing_is_stretched(tmp_path, size):
    width, height = size
    side = min(size)
    picture = Image.new("RGB", size, "black")
    picture.paste((255, 0, 0), ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    picture.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 16)
    assert near([image[:, y, x].tolist() for y in (1, 8, 14) for x in (1, 8, 14)], [RED] * 9, tolerance=30)


def test_a_picture_of_the_right_size_is_not_touched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png", 8).permute(1, 2, 0).numpy(), pixels)


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_any_damage_gives_a_picture_or_an_unreadable_image(tmp_path, kind):
    content, rng = encoded(kind), random.Random(0)
    refused = 0
    for i in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(min(len(damaged), 300 if i % 2 else len(damaged)))] = rng.randrange(256)
        path = tmp_path / "a"
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert load_image(path, 8).shape == (3, 8, 8)
            except UnreadableImageError as error:
                assert str(path) in str(error)
                refused += 1
    assert 0 < refused < 150


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
