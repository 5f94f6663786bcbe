"""sample.py: drawings that stop, continue, refine sketches, run in several processes or out of memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from PIL import Image

from common.images import load_image, to_float
from generator.pipeline import ChannelTokPipeline
from generator.token_file import TokenFile

C = 16


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> ChannelTokPipeline:
    return ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def test_each_image_may_have_its_own_number(
    scripts: ScriptRunner, pipeline_folder: Path, pipeline: ChannelTokPipeline, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", 0, 1, 2, "--num-tokens", 4, 16, 9, "--previews", 6]
    done = scripts("sample.py", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "3 images of 4 to 16 tokens" in done.err
    drawing = TokenFile.load(tmp_path / "samples" / "tokens.npz")
    assert drawing.num_tokens.tolist() == [4, 16, 9]
    whole = pipeline([0, 1, 2]).tokens
    for row, length in enumerate([4, 16, 9]):
        assert torch.equal(drawing.tokens[row, :length], whole[row, :length])
        assert not drawing.tokens[row, length:].any()
        with Image.open(tmp_path / "samples" / f"{row:05d}.png") as found:
            expected = pipeline([row], num_tokens=length, seed=row).images[0]
            assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1
    previews = {name for name in names_in(tmp_path / "samples") if "previews" in name}
    assert previews == {"previews/00001_k0006.png", "previews/00002_k0006.png"}


def test_continuing_in_place_is_one_run_and_does_not_change_the_other_rows(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    """Sketches of which two are finished, without naming any setting again."""
    sampling = ["--temperature", 0.8, "--cfg-scale", 2, "--cfg-schedule", "cosine"]
    words = ["--model", pipeline_folder, "--class-labels", 0, 3, "--samples-per-class", 4, "--seed", 9, *sampling]
    assert scripts("sample.py", *words, "--output-dir", "whole", cwd=tmp_path).code == 0
    assert scripts("sample.py", *words, "--num-tokens", 5, cwd=tmp_path).code == 0
    before = stamps(tmp_path / "samples")
    continued = ["--model", pipeline_folder, "--continue-from", "samples/tokens.npz", "--rows", 7, 3]
    done = scripts("sample.py", *continued, "--num-tokens", 16, "--previews", 4, 8, cwd=tmp_path)
    assert done.code == 0, done.err
    after = stamps(tmp_path / "samples")
    assert {name for name in after if after[name] != before[name]} == {
        "00003.png", "00007.png", "grid.png", "tokens.npz",
    }  # fmt: skip
    whole = TokenFile.load(tmp_path / "whole" / "tokens.npz")
    found = TokenFile.load(tmp_path / "samples" / "tokens.npz")
    assert found.num_tokens.tolist() == [5, 5, 5, 16, 5, 5, 5, 16]
    assert (found.seeds, found.class_labels) == (whole.seeds, whole.class_labels)
    for row, length in enumerate(found.num_tokens.tolist()):
        assert torch.equal(found.tokens[row, :length], whole.tokens[row, :length])
    for row in (3, 7):
        name = f"{row:05d}.png"
        with Image.open(tmp_path / "samples" / name) as one, Image.open(tmp_path / "whole" / name) as other:
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    # a preview below the prefix comes from the prefix
    assert {"previews/00003_k0004.png", "previews/00007_k0008.png"} <= names_in(tmp_path / "samples")
    # the rest in another folder, from rows of different lengths up to one length
    rest = [*continued[:4], "--rows", 0, 1, 2, 4, 5, 6, "--output-dir", "rest"]
    assert scripts("sample.py", *rest, cwd=tmp_path).code == 0
    last = TokenFile.load(tmp_path / "rest" / "tokens.npz")
    assert torch.equal(last.tokens, whole.tokens)
    assert stamps(tmp_path / "samples") == after


def test_a_photograph_gives_the_first_channels(
    scripts: ScriptRunner, pipeline_folder: Path, pipeline: ChannelTokPipeline, image_folder: Path, tmp_path: Path
) -> None:
    photo = image_folder / "val" / "n01" / "0.jpg"
    words = ["--model", pipeline_folder, "--class-names", "hen", "--samples-per-class", 3]
    done = scripts("sample.py", *words, "--prefix-image", photo, "--prefix-tokens", 6, cwd=tmp_path)
    assert done.code == 0, done.err
    found = TokenFile.load(tmp_path / "samples" / "tokens.npz")
    own = pipeline.tokenizer.tokenize(to_float(load_image(photo, 32)[None]))
    assert torch.equal(found.tokens[:, :6], own[:, :6].expand(3, -1))
    assert torch.equal(found.tokens, pipeline([3] * 3, prefix=own[:, :6].expand(3, -1)).tokens)
    assert len({tuple(row) for row in found.tokens.tolist()}) == 3


def test_sketch_many_refine_few(
    scripts: ScriptRunner, pipeline_folder: Path, pipeline: ChannelTokPipeline, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", 0, 3, "--samples-per-class", 5, "--batch-size", 6]
    done = scripts("sample.py", *words, "--sketch-tokens", 4, "--keep", 2, cwd=tmp_path)
    assert done.code == 0, done.err
    drawing = TokenFile.load(tmp_path / "samples" / "tokens.npz")
    labels = [0] * 5 + [3] * 5
    for step in pipeline.stream(labels, 4, scored=True):
        scores = step.log_likelihood.tolist()
    best = [sorted(range(first, first + 5), key=lambda i: -scores[i])[:2] for first in (0, 5)]
    kept = sorted(best[0] + best[1])
    assert drawing.num_tokens.tolist() == [16 if i in kept else 4 for i in range(10)]
    assert f"kept rows: {' '.join(map(str, kept))}" in done.err
    whole = pipeline(labels).tokens
    for row, length in enumerate(drawing.num_tokens.tolist()):
        assert torch.equal(drawing.tokens[row, :length], whole[row, :length])


def test_a_deadline_is_kept(scripts: ScriptRunner, slow_pipeline_folder: Path, tmp_path: Path) -> None:
    """A long one draws all; one that is too short draws the start of the whole drawing."""
    pipeline = ChannelTokPipeline.from_pretrained(slow_pipeline_folder, "cpu")
    whole = pipeline([1, 2], seed=3)
    assert pipeline([1, 2], seed=3, deadline=600).lengths == (C, C)
    short = pipeline([1, 2], seed=3, deadline=1e-6)
    assert short.lengths == (1, 1)
    assert torch.equal(short.tokens, whole.tokens[:, :1])
    words = ["--model", slow_pipeline_folder, "--class-labels", 1, "--deadline", 0.000001, "--seed", 3]
    done = scripts("sample.py", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "1 images of 1 tokens" in done.err


def test_stable_pictures_stop_from_the_command_line(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", 0, 1, "--stop-when-stable"]
    assert scripts("sample.py", *words, 255, cwd=tmp_path).code == 0
    assert TokenFile.load(tmp_path / "samples" / "tokens.npz").num_tokens.tolist() == [2, 2]
    assert scripts("sample.py", *words, 1e-9, cwd=tmp_path).code == 0
    assert TokenFile.load(tmp_path / "samples" / "tokens.npz").num_tokens.tolist() == [C, C]


# batches of more than 3 rows need more memory than there is
SCARCE = """
import torch, generator.decode
real = generator.decode.CachedDecoder.new_cache
def new_cache(self, num_rows, capacity):
    if num_rows > 3:
        torch.empty(1 << 60, dtype=torch.uint8)  # raises the error of the device
    return real(self, num_rows, capacity)
generator.decode.CachedDecoder.new_cache = new_cache
"""


def test_out_of_memory_is_one_line(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    words = ["--model", pipeline_folder, "--class-labels", *range(5)]
    done = scripts("sample.py", *words, before=SCARCE, cwd=tmp_path)
    assert done.code == 2, done.err
    assert "out of memory with 5 images; use" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert scripts("sample.py", *words, "--batch-size", 3, before=SCARCE, cwd=tmp_path).code == 0


# ------------------------------------------------------------------------------------- several processes


def same_drawing(found: Path, expected: Path) -> None:
    """Equal file names, pictures and tokens."""
    assert names_in(found) == names_in(expected)
    for name in names_in(expected):
        if name.endswith(".png"):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    one, other = (TokenFile.load(folder / "tokens.npz") for folder in (found, expected))
    assert torch.equal(one.tokens, other.tokens)
    assert one.num_tokens.tolist() == other.num_tokens.tolist()
    assert (one.class_labels, one.seeds) == (other.class_labels, other.seeds)


def test_several_processes_write_what_one_does(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    """Four processes, of which the fourth has no batch."""
    words = ["--model", pipeline_folder, "--class-labels", *range(5), "--batch-size", 2, "--previews", 3]
    for folder, count in (("one", 1), ("many", 4)):
        lengths = ["--num-tokens", 8, 4, 16, 9, 5]
        done = scripts("sample.py", *words, *lengths, "--output-dir", folder, cwd=tmp_path, processes=count)
        assert done.code == 0, done.err
        assert done.err.count("5 images of 4 to 16 tokens written") == 1
    same_drawing(tmp_path / "many", tmp_path / "one")
    for folder, count in (("one", 1), ("many", 4)):
        rows = ["--rows", 4, 1, 3, "--continue-from", f"{folder}/tokens.npz"]
        continued = ["--model", pipeline_folder, "--batch-size", 2, *rows, "--output-dir", folder]
        done = scripts("sample.py", *continued, cwd=tmp_path, processes=count)
        assert done.code == 0, done.err
    same_drawing(tmp_path / "many", tmp_path / "one")
    assert TokenFile.load(tmp_path / "many" / "tokens.npz").num_tokens.tolist() == [8, 16, 16, 16, 16]


# ------------------------------------------------------------------------------------- compiled


def test_compile_without_a_compiler_is_one_line(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    nowhere = "import os; os.environ['PATH'] = '/nowhere'; os.environ.pop('CXX', None)"
    words = ["--model", pipeline_folder, "--class-labels", 0, "--compile"]
    done = scripts("sample.py", *words, before=nowhere, cwd=tmp_path)
    assert done.code == 2, done.err
    assert "C++ compiler" in done.err
    assert names_in(tmp_path) == set()


def test_compile_draws_the_same(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    words = ["--model", pipeline_folder, "--class-labels", 0]
    assert scripts("sample.py", *words, "--output-dir", "eager", cwd=tmp_path).code == 0
    done = scripts("sample.py", *words, "--compile", "true", cwd=tmp_path)
    assert done.code == 0, done.err
    one, other = (TokenFile.load(tmp_path / name / "tokens.npz") for name in ("eager", "samples"))
    assert torch.equal(one.tokens, other.tokens)
