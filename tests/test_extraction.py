"""extract_tokens.py: views, several processes, runs that are killed, and --verify."""

import copy
import json
import logging
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from PIL import Image

import extract_tokens
from common.config import InputError
from generator import tokens as store_side
from generator.tokens import TokenStore
from tokenizer import ChannelTokenizer, extraction


@pytest.fixture(scope="module")
def sharp_tokenizer(tiny_tokenizer: ChannelTokenizer) -> ChannelTokenizer:
    """Without biases, which are large next to the signal: hardly two crops have the same tokens."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(sharp_tokenizer: ChannelTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharp")
    sharp_tokenizer.save_pretrained(folder)
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


def test_both_sides_of_the_store_know_the_same_views() -> None:
    assert {name: count for name, (count, _, _) in extraction.VIEWS.items()} == store_side.VIEWS
    for count, side, cut in extraction.VIEWS.values():
        images = torch.rand(2, 3, round(32 * side), round(32 * side))
        assert [tuple(view.shape) for view in cut(images, 32)] == [(2, 3, 32, 32)] * count


def test_ten_crops_are_those_cut_by_hand(
    scripts: ScriptRunner, tokenizer_folder: Path, image_folder: Path, sharp_tokenizer: ChannelTokenizer, tmp_path: Path
) -> None:
    done = scripts(
        "extract_tokens.py", *words(tokenizer_folder, image_folder, tmp_path / "store", "--views", "ten-crop")
    )
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
    assert len({tuple(view) for row in found.tolist() for view in row}) > 100  # nearly all differ
    # what is held out is the image as it is
    held, _ = store.read_shard("val", 0)
    assert held.shape == (5, 1, 16)
    for row, path in zip(held, sorted((image_folder / "val").glob("*/*"))[:5], strict=True):
        assert row.tolist() == sharp_tokenizer.tokenize(square(path, 32)[None]).tolist()


def shards_of(folder: Path) -> dict[str, bytes]:
    """All files of a store but its tokenizer's, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(
    scripts: ScriptRunner, tokenizer_folder: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Made by one process: 6 shards of train, 3 of val, with an image of each that cannot be read."""
    images = tmp_path_factory.mktemp("photos") / "images"
    shutil.copytree(image_folder, images)
    for name in ("train/n02/1.png", "val/n03/0.jpg"):
        (images / name).write_bytes(b"no image")
    store = images.parent / "store"
    done = scripts("extract_tokens.py", *words(tokenizer_folder, images, store, *SMALL))
    assert done.code == 0, done.err
    assert len(list(store.glob("*.json"))) == 1 + 6 + 3
    return store


SMALL = ("--views", "flip", "--shard-size", 2)


def test_several_processes_make_the_store_of_one(
    scripts: ScriptRunner, tokenizer_folder: Path, whole: Path, tmp_path: Path
) -> None:
    given = words(tokenizer_folder, whole.parent / "images", tmp_path / "store", *SMALL)
    done = scripts("extract_tokens.py", *given, processes=2, before=REPORTS_SHARDS)
    assert done.code == 0, done.err
    assert shards_of(tmp_path / "store") == shards_of(whole)
    assert done.err.count("complete, 2 unreadable files left out") == 1
    assert done.err.count("n02/1.png") == done.err.count("n03/0.jpg") == 1
    made = [line.split() for line in done.out.splitlines()]
    pairs = [["train", str(i)] for i in range(6)] + [["val", str(i)] for i in range(3)]
    # each process writes every n-th shard
    assert made == [[str(rank), *pair] for rank in range(2) for pair in pairs[rank::2]]


REPORTS_SHARDS = """
import os
from generator.tokens import TokenStore
write = TokenStore.write_shard
def reported(self, split, shard, *rest):
    print(os.environ["RANK"], split, shard, flush=True)
    write(self, split, shard, *rest)
TokenStore.write_shard = reported
"""
DELAYS_RECORDS = """
import time, generator.tokens
text = generator.tokens.write_text
def delayed(path, content):
    time.sleep(0.1)  # the arrays exist, the record that makes them valid does not
    text(path, content)
generator.tokens.write_text = delayed
"""


def test_killed_processes_leave_what_another_number_can_finish(
    scripts: ScriptRunner, tokenizer_folder: Path, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    given = words(tokenizer_folder, whole.parent / "images", store, *SMALL)
    running = scripts.start("extract_tokens.py", *given, processes=2, before=DELAYS_RECORDS)
    while running.poll() is None and len(list(store.glob("*-*.json"))) < 3:
        time.sleep(0.005)
    running.kill(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    there = {name: (store / name).stat().st_mtime_ns for name in shards_of(store) if name.endswith(".json")}
    assert 3 <= len(there) < 9
    (store / ".train-00000.tokens.npy.1.partial").write_bytes(b"left by a kill while writing")
    done = scripts("extract_tokens.py", *given)
    assert done.code == 0, done.err
    assert shards_of(store) == shards_of(whole)
    assert all((store / name).stat().st_mtime_ns == stamp for name, stamp in there.items())


def test_a_mistake_in_one_process_ends_all(
    scripts: ScriptRunner, tokenizer_folder: Path, whole: Path, tmp_path: Path
) -> None:
    before = shards_of(whole)
    given = words(tokenizer_folder, whole.parent / "images", whole, "--views", "none", "--shard-size", 2)
    done = scripts("extract_tokens.py", *given, processes=2)
    assert done.code == 2
    assert done.err.count("made with views = flip") == done.err.count("\n") == 2
    # an unreadable image in the shard of one process: another, which waits for it, ends with a line of its own
    given = words(tokenizer_folder, whole.parent / "images", tmp_path / "store", "--strict", "true", "--shard-size", 50)
    done = scripts("extract_tokens.py", *given, processes=3)
    assert (done.code, done.err.count("Traceback"), done.err.count("unreadable image")) == (2, 0, 2)
    assert done.err.count("another process has ended") == 1
    assert shards_of(whole) == before


def verified(store: Path, caplog: pytest.LogCaptureFixture) -> tuple[str | None, list[str]]:
    """The error, if any, and the lines that are reported."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        try:
            extract_tokens.check(str(store))
        except InputError as error:
            return str(error), caplog.messages
    return None, caplog.messages


def test_a_sound_store_is_described(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert verified(whole, caplog) == (None, [
        "train: 11 images, 3 to 4 a class, each of 2 x 16 tokens; 1 unreadable files left out",
        "val: 5 images, 1 to 2 a class, each of 1 x 16 tokens; 1 unreadable files left out",
        f"{whole}: no problem found",
    ])  # fmt: skip


def test_every_problem_is_reported(
    tiny_tokenizer: ChannelTokenizer, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, other = tmp_path / "store", tiny_tokenizer.token_fingerprint()
    shutil.copytree(whole, store)
    for name in ("train-00001.tokens.npy", "val-00000.labels.npy"):
        data = bytearray((store / name).read_bytes())
        data[-5] ^= 16
        (store / name).write_bytes(data)
    (store / "train-00003.labels.npy").unlink()
    (store / "val-00001.json").unlink()
    record = json.loads((store / "train-00005.json").read_text())
    (store / "train-00005.json").write_text(json.dumps(record | {"tokenizer_fingerprint": other}))
    shutil.rmtree(store / "tokenizer")
    tiny_tokenizer.save_pretrained(store / "tokenizer")
    error, lines = verified(store, caplog)
    assert error is not None
    assert f"{store}: problems found: 6" in error
    assert len(lines) == 2 + 6
    for name, problem in (
        ("train-00001.tokens.npy", "damaged"),
        ("train-00003.labels.npy", "missing"),
        ("train-00005.json", f"of the tokenizer {other}"),
        ("val-00000.labels.npy", "damaged"),
        ("val-00001.json", "missing"),
        ("tokenizer", f"is the tokenizer {other}"),
    ):
        (line,) = [line for line in lines if f"/{name} " in line]
        assert problem in line
    assert lines[0].startswith("train: 5 images")  # of the three shards that are sound
    shutil.rmtree(store / "tokenizer")
    error, lines = verified(store, caplog)
    assert "problems found: 6" in str(error)
    assert "is no folder" in lines[-1]


def test_verify_is_exclusive(scripts: ScriptRunner, whole: Path, tmp_path: Path) -> None:
    for given, named in (
        (["--verify", whole, "--views", "flip"], "--views"),
        (["--verify", tmp_path], "store.json is"),
    ):
        done = scripts("extract_tokens.py", *given)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert named in done.err
