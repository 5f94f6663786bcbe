"""sample.py and extract_tokens.py as a user runs them: files, exit codes and messages."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Finished, ScriptRunner
from PIL import Image

from generator.config import SamplingConfig
from generator.pipeline import ChannelTokPipeline
from generator.token_data import TokenDataset
from generator.token_file import TokenFile
from generator.tokens import TokenStore
from tokenizer import ChannelTokenizer

C = 16


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(done: Finished) -> str:
    """The one line of a refusal, without progress bars."""
    lines = [line for line in done.err.splitlines() if line and "shard/s]" not in line]
    assert done.code == 2, done.err
    assert len(lines) == 1, done.err
    assert done.out == ""
    assert lines[0].split(": ")[0].endswith(".py")
    assert "Traceback" not in lines[0]
    return lines[0]


# ------------------------------------------------------------------------------------- sample.py


def test_sample_writes_pictures_and_tokens(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, from a folder that is not the repository's."""
    words = ["--model", pipeline_folder, "--class-names", "goldfish", "man-eater", "--num-tokens", 8]
    words += ["--previews", 4, 8, "--output-dir", "out", "--seed", 5, "--samples-per-class", 2, "--batch-size", 3]
    done = subprocess.run(
        scripts.command("sample.py", words), cwd=tmp_path, env=scripts.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "4 images of 8 tokens written to out" in done.stderr
    out = tmp_path / "out"
    previews = [f"previews/0000{i}_k000{k}.png" for i in range(4) for k in (4, 8)]
    assert files_below(out) == [*(f"0000{i}.png" for i in range(4)), "grid.png", *previews, "tokens.npz"]
    assert files_below(tmp_path) == [f"out/{name}" for name in files_below(out)]

    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    expected = pipeline([0, 0, 2, 2], num_tokens=8, seed=5)
    with np.load(out / "tokens.npz") as content:
        assert content["tokens"].dtype == np.uint16
        assert content["tokens"].tolist() == expected.tokens.tolist()
        assert content["num_tokens"].tolist() == [8] * 4
        assert content["class_labels"].tolist() == [0, 0, 2, 2]
        assert content["seeds"].tolist() == [5, 6, 7, 8]
        assert str(content["fingerprint"]) == pipeline.tokens_fingerprint
    sketch = pipeline([0, 0, 2, 2], num_tokens=4, seed=5)
    for i in range(4):
        for name, picture in (
            (f"0000{i}.png", expected.images[i]),
            (f"previews/0000{i}_k0008.png", expected.images[i]),
            (f"previews/0000{i}_k0004.png", sketch.images[i]),
        ):
            with Image.open(out / name) as found:
                # pixels may be rounded differently in batches of other sizes
                difference = np.asarray(found.convert("RGB")).astype(int) - np.asarray(picture).astype(int)
                assert np.abs(difference).max() <= 1, name


def test_sample_without_classes_shows_some_at_growing_k(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    done = scripts("sample.py", "--model", pipeline_folder, cwd=tmp_path)
    assert done.code == 0, done.err
    drawing = TokenFile.load(tmp_path / "samples" / "tokens.npz")
    assert drawing.class_labels == [0, 1, 2, 3, 4]
    assert drawing.tokens.shape == (5, C)
    names = [f"previews/0000{i}_k{k:04d}.png" for i in range(5) for k in (1, 4)]
    assert set(names) <= set(files_below(tmp_path / "samples"))
    with Image.open(tmp_path / "samples" / "grid.png") as grid:
        # a column for each of k = 1, 4, 16 and a row for each class
        assert grid.width > 3 * 96
        assert grid.height > 5 * 96


def test_sample_again_replaces_the_earlier_pictures_and_nothing_else(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--output-dir", "o", "--num-tokens", 4]
    assert scripts("sample.py", *words, "--class-labels", 0, 1, 4, "--previews", 2, cwd=tmp_path).code == 0
    Image.new("RGB", (4, 4)).save(tmp_path / "o" / "holiday.png")
    assert scripts("sample.py", *words, "--class-labels", 3, cwd=tmp_path).code == 0
    assert files_below(tmp_path / "o") == ["00000.png", "grid.png", "holiday.png", "tokens.npz"]
    assert TokenFile.load(tmp_path / "o" / "tokens.npz").class_labels == [3]


MISTAKES: list[tuple[list[object], str]] = [
    (["--class-names", "goldfsh"], "'goldfish'"),
    (["--class-names", "hen", ""], "''"),
    (["--class-labels", 5], "0..4"),
    (["--class-labels", 0, -1], "-1"),
    (["--class-labels", 0, "--num-tokens", 0], "1..16"),
    (["--class-labels", 0, "--num-tokens", 17], "1..16"),
    (["--class-labels", 0, "--num-tokens", 8, "--previews", 9], "1..8"),
    (["--class-labels", 0, 1, "--batch-size", 1, "--seed", 2**63 - 1], "seed"),
    (["--class-labels", 0, "--device", "gpu"], "gpu"),
    (["--class-labels", 0, 1, "--num-tokens", 4, 5, 6], "one for each"),
    (["--class-labels", 0, 1, "--num-tokens", 4, 17], "17"),
    (["--class-labels", 0, "--sketch-tokens", 4], "keep"),
    (["--class-labels", 0, "--keep", 1], "sketch_tokens"),
    (["--class-labels", 0, "--sketch-tokens", 16, "--keep", 1], "sketch_tokens"),
    (["--class-labels", 0, "--samples-per-class", 3, "--batch-size", 2, "--sketch-tokens", 4, "--keep", 1], "batch"),
    (["--class-labels", 0, "--prefix-image", "none.png", "--prefix-tokens", 8], "none.png"),
    (["--class-labels", 0, "--prefix-image", "bad.txt", "--prefix-tokens", 8], "bad.txt"),
    (["--class-labels", 0, "--prefix-image", "photo.png", "--prefix-tokens", 0], "prefix_tokens"),
    (["--class-labels", 0, "--prefix-image", "photo.png", "--prefix-tokens", 16], "prefix_tokens"),
    (["--class-labels", 0, "--prefix-image", "photo.png", "--prefix-tokens", 8, "--num-tokens", 8], "8"),
    (["--rows", 1], "continue"),
    (["--continue-from", "none.npz"], "none.npz"),
    (["--continue-from", "bad.txt"], "bad.txt"),
    (["--continue-from", "drawn.npz", "--class-labels", 0], "class_labels"),
    (["--continue-from", "drawn.npz", "--seed", 3], "seed"),
    (["--continue-from", "drawn.npz", "--rows", 2], "0..1"),
    (["--continue-from", "drawn.npz", "--rows", -1], "0..1"),
    (["--continue-from", "drawn.npz", "--rows", 1, 1], "twice"),
    (["--continue-from", "drawn.npz", "--num-tokens", 3], "row 0"),
    (["--continue-from", "other.npz"], "model"),
    (["--continue-from", "beyond.npz"], "codebook"),
    (["--continue-from", "long.npz"], "1..16"),
    (["--output-dir", "bad.txt"], "bad.txt"),
]


@pytest.fixture(scope="module")
def mistaken(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are not what a flag names."""
    folder = tmp_path_factory.mktemp("mistaken")
    (folder / "bad.txt").write_text("no image and no tokens")
    Image.new("RGB", (40, 30), "red").save(folder / "photo.png")
    drawn = TokenFile(
        tokens=torch.tensor([[5, 6, 7], [1, 0, 0]]), num_tokens=torch.tensor([3, 1]), class_labels=[0, 1], seeds=[0, 1],
        sampling=SamplingConfig(),
        fingerprint=ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu").tokens_fingerprint,
    )  # fmt: skip
    drawn.save(folder / "drawn.npz")
    replace(drawn, fingerprint="x").save(folder / "other.npz")
    replace(drawn, tokens=drawn.tokens + 60).save(folder / "beyond.npz")
    replace(drawn, num_tokens=torch.tensor([3, 4])).save(folder / "long.npz")
    return folder


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_sample_refuses_in_one_line_and_writes_nothing(
    scripts: ScriptRunner, pipeline_folder: Path, mistaken: Path, words: list[object], named: str
) -> None:
    before = files_below(mistaken)
    assert named in refused(scripts("sample.py", "--model", pipeline_folder, *words, cwd=mistaken))
    assert files_below(mistaken) == before
    assert not (mistaken / "samples").exists()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "generator" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_tokenizer(folder: Path) -> None:
    tokenizer = ChannelTokenizer.from_pretrained(folder / "tokenizer")
    with torch.no_grad():
        next(tokenizer.parameters()).mul_(2)
    tokenizer.save_pretrained(folder / "tokenizer")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deeper config": (lambda folder: edit_config(folder, num_layers=3), "weights do not fit config.json"),
    "earlier version": (lambda folder: edit_config(folder, model_type="llama"), "'llama', needed is 'channel_gpt'"),
    "generator as tokenizer": (
        lambda folder: shutil.copytree(folder / "generator", folder / "tokenizer", dirs_exist_ok=True),
        "'channel_gpt', needed is 'channeltok'",
    ),
    "other tokenizer": (replace_tokenizer, "put the right tokenizer/"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_sample_refuses_a_damaged_model(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    damage, named = DAMAGES[how]
    damage(tmp_path / "model")
    assert named in refused(scripts("sample.py", "--model", "model", "--class-labels", 0, cwd=tmp_path))
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("name", ["missing", "/nowhere/at/all", "no-owner/no-model"])
def test_sample_refuses_a_model_that_does_not_exist(scripts: ScriptRunner, tmp_path: Path, name: str) -> None:
    # HF_HUB_OFFLINE is set, so that a hub name fails without any connection
    assert name in refused(scripts("sample.py", "--model", name, cwd=tmp_path))
    assert files_below(tmp_path) == []


INTERRUPT = """
import os, signal, time, generator.engine
real = generator.engine.draw
calls = []
def draw(logits, uniform, config):
    calls.append(1)
    if len(calls) in {when}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(logits, uniform, config)
generator.engine.draw = draw
"""


@pytest.mark.parametrize(("at", "k", "count"), [(1, 1, 2), (5, 5, 2), (16, 16, 2), (19, 3, 4)])
def test_ctrl_c_at_any_token_writes_what_has_been_drawn(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path, at: int, k: int, count: int
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", *range(5), "--batch-size", 2, "--previews", 2, 4]
    done = scripts("sample.py", *words, before=INTERRUPT.format(when=f"({at},)"), cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"stopped at k = {k} of 16 tokens; {count} of 5 images" in done.err
    drawing = TokenFile.load(tmp_path / "samples" / "tokens.npz")
    assert drawing.num_tokens.tolist() == ([16, 16] if count == 4 else []) + [k, k]
    assert drawing.class_labels == list(range(count))
    whole = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")(range(count)).tokens
    assert torch.equal(drawing.tokens[-2:, :k], whole[-2:, :k])
    reached = [[p for p in (2, 4) if p <= length] for length in drawing.num_tokens.tolist()]
    expected = [f"{i:05d}.png" for i in range(count)] + ["grid.png", "tokens.npz"]
    expected += [f"previews/{i:05d}_k{p:04d}.png" for i in range(count) for p in reached[i]]
    assert files_below(tmp_path / "samples") == sorted(expected)


def test_ctrl_c_to_one_of_two_processes_omits_its_later_batches(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", *range(5), "--batch-size", 1]
    second = INTERRUPT.format(when="((5,) if os.environ['RANK'] == '1' else ())")
    done = scripts("sample.py", *words, before=second, processes=2, cwd=tmp_path)
    assert done.code == 0, done.err
    drawing = TokenFile.load(tmp_path / "samples" / "tokens.npz")
    assert (drawing.class_labels, drawing.num_tokens.tolist()) == ([0, 1, 2, 4], [16, 5, 16, 16])
    names = [f"{i:05d}.png" for i in (0, 1, 2, 4)]
    assert files_below(tmp_path / "samples") == [*names, "grid.png", "tokens.npz"]


def test_a_second_ctrl_c_ends_immediately(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    twice = INTERRUPT.format(when="(3,)").replace(kill, f"{kill}; time.sleep(0.01); {kill}; time.sleep(0.01)")
    done = scripts("sample.py", "--model", pipeline_folder, before=twice, cwd=tmp_path)
    assert done.code == 130, done.err
    assert done.err == "sample.py: interrupted\n"
    assert files_below(tmp_path) == []


# ------------------------------------------------------------------------------------- extract_tokens.py


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pictures, one JPEG of train cut short."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    broken = folder / "train" / "n02" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    return folder


def extraction(pipeline_folder: Path, images: Path, *more: object) -> list[object]:
    words = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", images, "--output-dir", "store"]
    return [*words, "--shard-size", 5, "--batch-size", 2, "--num-workers", 0, "--device", "cpu", *more]


def test_extraction_omits_unreadable_files(
    scripts: ScriptRunner, pipeline_folder: Path, images: Path, tiny_tokenizer: ChannelTokenizer, tmp_path: Path
) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"n01": "goldfish, Carassius auratus", "n03": "hen"}))
    words = extraction(pipeline_folder, images, "--views", "flip", "--class-names", names)
    done = scripts("extract_tokens.py", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("n02/0.jpg") == 1
    assert "1 unreadable files left out" in done.err

    store = TokenStore.open(tmp_path / "store")
    assert store.header.class_names == ["goldfish, Carassius auratus", "n02", "hen"]
    assert store.header.split_files == {"train": 12, "val": 6}
    assert [len(store.read_shard("train", i)[1]) for i in range(3)] == [4, 5, 2]
    assert "n02/0.jpg" in json.loads((tmp_path / "store/train-00000.json").read_text())["left_out"][0]
    dataset = TokenDataset(store, "train", None)
    assert dataset.__getitems__([(i, 0) for i in range(11)]).labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    # the views of the first image, by the tokenizer itself
    from_image = _tokens_of(images / "train" / "n01" / "0.jpg", tiny_tokenizer)
    assert store.read_shard("train", 0)[0][0].tolist() == from_image


def _tokens_of(path: Path, tokenizer: ChannelTokenizer) -> list[list[int]]:
    """Both views of a picture, by PIL and numpy alone."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    small = np.array(picture.resize((32, 32), Image.Resampling.LANCZOS, box=box)).astype(np.float32)
    image = torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None]
    return [tokenizer.tokenize(view)[0].tolist() for view in (image, image.flip(-1))]


def test_extraction_refuses_what_does_not_fit(
    scripts: ScriptRunner, pipeline_folder: Path, images: Path, tmp_path: Path
) -> None:
    def refusal(*words: object) -> str:
        return refused(scripts("extract_tokens.py", *words, cwd=tmp_path))

    assert "n02/0.jpg" in refusal(*extraction(pipeline_folder, images, "--strict", "true"))
    (images / "train" / "n02" / "0.jpg").unlink()
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    done = scripts("extract_tokens.py", *extraction(pipeline_folder, images, "--strict", "true"), cwd=tmp_path)
    assert done.code == 0, done.err
    assert "0 unreadable" in done.err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*-*")}

    shutil.copytree(pipeline_folder / "tokenizer", tmp_path / "other" / "tokenizer")
    replace_tokenizer(tmp_path / "other")
    assert "tokenizer_fingerprint" in refusal(*extraction(tmp_path / "other", images))
    assert "views" in refusal(*extraction(pipeline_folder, images, "--views", "flip"))
    assert "nothing" in refusal(*extraction(pipeline_folder, tmp_path / "nothing"))
    assert "none.json" in refusal(*extraction(pipeline_folder, images, "--class-names", "none.json"))
    # another picture in the folder: the shards no longer cover the same files
    shutil.copy(images / "val" / "n01" / "0.jpg", images / "val" / "n01" / "9.jpg")
    assert "split_files" in refusal(*extraction(pipeline_folder, images))
    shutil.rmtree(images / "val" / "n01")
    assert "have different classes" in refusal(*extraction(pipeline_folder, images))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*-*")} == before
