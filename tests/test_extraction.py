"""extract_tokens.py: views, several processes, runs that are killed, and --verify."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from PIL import Image

from common.checkpoint import save_pretrained_whole
from generator import tokens as store_side
from generator.tokens import TokenStore
from tokenizer import ChannelTokenizer, extraction


@pytest.fixture(scope="module")
def sharp_tokenizer(tiny_tokenizer: ChannelTokenizer) -> ChannelTokenizer:
    """Without biases, which drown what is in an image: hardly two crops have the same tokens."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(sharp_tokenizer: ChannelTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharp")
    save_pretrained_whole(sharp_tokenizer, folder)
    return folder


def words(tokenizer: Path, images: Path, store: Path, *more: object) -> list[object]:
    given = ["--tokenizer", tokenizer, "--data-dir", images, "--output-dir", store, "--device", "cpu"]
    return [*given, "--shard-size", 5, "--batch-size", 2, "--num-workers", 0, *more]


def square(path: Path, side: int) -> torch.Tensor:
    """The middle square of a picture (3, side, side) in [-1, 1], by PIL and numpy alone."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) / 2, (picture.height - short) / 2
    small = picture.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))
    return torch.from_numpy(np.array(small).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


# ------------------------------------------------------------------------------------- views


def test_both_sides_of_the_store_know_the_same_views() -> None:
    images = torch.rand(2, 3, 35, 35)
    assert list(extraction.VIEWS) == list(store_side.VIEWS)
    for name, views in extraction.VIEWS.items():
        assert views.count == store_side.VIEWS[name]
        cut = views.cut(images[..., : views.pixels(32), : views.pixels(32)], 32)
        assert [tuple(view.shape) for view in cut] == [(2, 3, 32, 32)] * views.count


def test_ten_crops_are_those_cut_by_hand(
    scripts: ScriptRunner,
    tokenizer_folder: Path,
    image_folder: Path,
    sharp_tokenizer: ChannelTokenizer,
    tmp_path: Path,
) -> None:
    given = words(tokenizer_folder, image_folder, tmp_path / "store", "--views", "ten-crop")
    done = scripts("extract_tokens.py", *given)
    assert done.code == 0, done.err
    store = TokenStore.open(tmp_path / "store")
    pictures = sorted((image_folder / "train").glob("*/*"))
    found = np.concatenate([store.read_shard("train", shard)[0] for shard in range(3)])
    assert found.shape == (12, 10, 16)
    for row, path in zip(found, pictures, strict=True):
        large = square(path, 35)  # 1.1 x 32 = 35.2
        places = ((0, 0), (0, 3), (3, 0), (3, 3), (2, 2))
        crops = [seen[:, y : y + 32, x : x + 32] for seen in (large, large.flip(2)) for y, x in places]
        assert row.tolist() == [sharp_tokenizer.tokenize(crop[None])[0].tolist() for crop in crops]
    assert len({tuple(view) for row in found.tolist() for view in row}) > 100  # they can be told apart
    # what is held out is the image as it is
    held, _ = store.read_shard("val", 0)
    assert held.shape == (5, 1, 16)
    for row, path in zip(held, sorted((image_folder / "val").glob("*/*")), strict=False):
        assert row.tolist() == sharp_tokenizer.tokenize(square(path, 32)[None]).tolist()
