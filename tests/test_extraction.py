"""extract_tokens.py: views, several processes, runs that are killed, and --verify."""

import copy
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from PIL import Image

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


def test_a_copy_of_a_tokenizer_has_the_smallest_exact_format(sharp_tokenizer: ChannelTokenizer) -> None:
    assert extraction.exact_dtype(sharp_tokenizer) == torch.float32
    assert extraction.exact_dtype(copy.deepcopy(sharp_tokenizer).bfloat16()) == torch.bfloat16


def test_both_sides_of_the_store_know_the_same_views() -> None:
    images = torch.rand(2, 3, 35, 35)
    assert list(extraction.VIEWS) == list(store_side.VIEWS)
    for name, views in extraction.VIEWS.items():
        assert views.count == store_side.VIEWS[name]
        cut = views.cut(images[..., : views.pixels(32), : views.pixels(32)], 32)
        assert [tuple(view.shape) for view in cut] == [(2, 3, 32, 32)] * views.count


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
    for row, path in zip(held, sorted((image_folder / "val").glob("*/*")), strict=False):
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


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_make_the_store_of_one(
    scripts: ScriptRunner, tokenizer_folder: Path, whole: Path, tmp_path: Path, processes: int
) -> None:
    given = words(tokenizer_folder, whole.parent / "images", tmp_path / "store", *SMALL)
    done = scripts("extract_tokens.py", *given, processes=processes, before=REPORTS_SHARDS)
    assert done.code == 0, done.err
    assert shards_of(tmp_path / "store") == shards_of(whole)
    assert done.err.count("complete, 2 unreadable files left out") == 1
    assert done.err.count("n02/1.png") == done.err.count("n03/0.jpg") == 1
    made = [line.split() for line in done.out.splitlines()]
    pairs = [["train", str(i)] for i in range(6)] + [["val", str(i)] for i in range(3)]
    # each process writes every n-th shard
    assert made == [[str(rank), *pair] for rank in range(processes) for pair in pairs[rank::processes]]


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


@pytest.mark.parametrize("then", [1, 3])
def test_killed_processes_leave_what_any_number_can_finish(
    scripts: ScriptRunner, tokenizer_folder: Path, whole: Path, tmp_path: Path, then: int
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
    done = scripts("extract_tokens.py", *given, processes=then)
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
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.count("unreadable image") == 2
    assert done.err.count("another process has ended") == 1
    assert shards_of(whole) == before


def verified(scripts: ScriptRunner, store: Path) -> tuple[int, list[str]]:
    """Exit code and lines of stderr, without the progress bar."""
    done = scripts("extract_tokens.py", "--verify", store)
    assert "Traceback" not in done.err
    return done.code, [line for line in done.err.splitlines() if line.strip() and "shard/s]" not in line]


def test_a_sound_store_is_described(scripts: ScriptRunner, whole: Path) -> None:
    assert verified(scripts, whole) == (0, [
        "train: 11 images, 3 to 4 a class, each of 2 x 16 tokens; 1 unreadable files left out",
        "val: 5 images, 1 to 2 a class, each of 1 x 16 tokens; 1 unreadable files left out",
        f"{whole}: no problem found",
    ])  # fmt: skip


def test_every_problem_is_reported(
    scripts: ScriptRunner, tiny_tokenizer: ChannelTokenizer, pipeline_folder: Path, whole: Path, tmp_path: Path
) -> None:
    store, other = tmp_path / "store", tmp_path / "other"
    shutil.copytree(whole, store)
    for name in ("train-00001.tokens.npy", "val-00000.labels.npy"):
        data = bytearray((store / name).read_bytes())
        data[-5] ^= 16
        (store / name).write_bytes(data)
    (store / "train-00003.labels.npy").unlink()
    (store / "val-00001.json").unlink()
    # a shard of the same images, made by another tokenizer
    given = words(pipeline_folder / "tokenizer", whole.parent / "images", other, *SMALL)
    assert scripts("extract_tokens.py", *given).code == 0
    for path in other.glob("train-00005.*"):
        shutil.copy(path, store)
    code, lines = verified(scripts, store)
    reported = [line for line in lines if "train-000" in line or "val-000" in line]
    assert (code, len(reported)) == (2, 5)
    for name, problem in (
        ("train-00001.tokens.npy", "damaged"),
        ("train-00003.labels.npy", "missing"),
        ("train-00005.json", f"of the tokenizer {tiny_tokenizer.token_fingerprint()}"),
        ("val-00000.labels.npy", "damaged"),
        ("val-00001.json", "missing"),
    ):
        (line,) = [line for line in reported if f"/{name} " in line]
        assert problem in line
    assert f"extract_tokens.py: error: {store}: problems found: 5" in lines[-1]
    assert lines[0].startswith("train: 5 images")  # of the three shards that are sound


def test_a_missing_or_another_tokenizer_in_the_store_is_reported(
    scripts: ScriptRunner, tiny_tokenizer: ChannelTokenizer, pipeline_folder: Path, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    for named in ("tokenizer", f"is the tokenizer {tiny_tokenizer.token_fingerprint()}"):
        shutil.rmtree(store / "tokenizer")
        if named != "tokenizer":
            shutil.copytree(pipeline_folder / "tokenizer", store / "tokenizer")
        code, lines = verified(scripts, store)
        assert code == 2
        assert named in lines[-2]
        (store / "tokenizer").mkdir(exist_ok=True)
    assert "problems found: 1" in lines[-1]


def test_verify_is_exclusive(scripts: ScriptRunner, whole: Path, tmp_path: Path) -> None:
    config = tmp_path / "flags.yaml"
    config.write_text(f"verify: {whole}\n")
    for given, named in (
        (["--verify", whole, "--views", "flip"], "--views"),
        (["--verify"], "expected one argument"),
        (["--verify", tmp_path], "store.json is missing"),
        (["--config", config, "--tokenizer", "a", "--output-dir", "b", "--data-dir", "c"], "unknown key 'verify'"),
    ):
        done = scripts("extract_tokens.py", *given)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert named in done.err
    assert "--verify" in scripts("extract_tokens.py", "--help").out
