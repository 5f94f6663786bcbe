"""sample.py's ways to stop, to go on and to choose, as its users run them."""

import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from PIL import Image

from common.images import load_image, to_float
from generator.drawing import Drawing
from generator.pipeline import ChannelTokPipeline, best_of_each_class
from generator.sampling import SamplingConfig

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
    drawing = Drawing.load(tmp_path / "samples" / "tokens.npz")
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


@pytest.mark.parametrize("sampling", [[], ["--temperature", 0.8, "--cfg-scale", 2, "--cfg-schedule", "cosine"]])
def test_continuing_in_place_is_one_run_and_leaves_the_other_rows_alone(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path, sampling: list[object]
) -> None:
    """The issue's own words: sketches, two of them looked at and finished, with no setting said again."""
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
    whole = Drawing.load(tmp_path / "whole" / "tokens.npz")
    found = Drawing.load(tmp_path / "samples" / "tokens.npz")
    assert found.num_tokens.tolist() == [5, 5, 5, 16, 5, 5, 5, 16]
    assert (found.seeds, found.class_labels) == (whole.seeds, whole.class_labels)
    for row, length in enumerate(found.num_tokens.tolist()):
        assert torch.equal(found.tokens[row, :length], whole.tokens[row, :length])
    for row in (3, 7):
        for name in (f"{row:05d}.png",):
            with Image.open(tmp_path / "samples" / name) as one, Image.open(tmp_path / "whole" / name) as other:
                assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    # a preview below the prefix comes from the prefix
    assert {"previews/00003_k0004.png", "previews/00007_k0008.png"} <= names_in(tmp_path / "samples")
    # the rest in another folder, from rows of different lengths up to one length
    rest = [*continued[:4], "--rows", 0, 1, 2, 4, 5, 6, "--output-dir", "rest"]
    assert scripts("sample.py", *rest, cwd=tmp_path).code == 0
    last = Drawing.load(tmp_path / "rest" / "tokens.npz")
    assert torch.equal(last.tokens, whole.tokens)
    assert stamps(tmp_path / "samples") == after


def test_other_settings_may_be_given_for_the_rest(
    scripts: ScriptRunner, pipeline_folder: Path, pipeline: ChannelTokPipeline, tmp_path: Path
) -> None:
    assert (
        scripts("sample.py", "--model", pipeline_folder, "--class-labels", 1, "--num-tokens", 4, cwd=tmp_path).code == 0
    )
    words = ["--model", pipeline_folder, "--continue-from", "samples/tokens.npz", "--temperature", 0]
    assert scripts("sample.py", *words, cwd=tmp_path).code == 0
    found = Drawing.load(tmp_path / "samples" / "tokens.npz")
    prefix = pipeline([1], num_tokens=4).tokens
    assert torch.equal(found.tokens, pipeline([1], prefix=prefix, temperature=0).tokens)
    assert found.sampling == SamplingConfig(temperature=0)


def test_a_photograph_gives_the_first_channels(
    scripts: ScriptRunner, pipeline_folder: Path, pipeline: ChannelTokPipeline, image_folder: Path, tmp_path: Path
) -> None:
    photo = image_folder / "val" / "n01" / "0.jpg"
    words = ["--model", pipeline_folder, "--class-names", "hen", "--samples-per-class", 3]
    done = scripts("sample.py", *words, "--prefix-image", photo, "--prefix-tokens", 6, cwd=tmp_path)
    assert done.code == 0, done.err
    found = Drawing.load(tmp_path / "samples" / "tokens.npz")
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
    drawing = Drawing.load(tmp_path / "samples" / "tokens.npz")
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


def test_a_scorer_is_any_callable_and_may_look_at_the_pictures(pipeline: ChannelTokPipeline) -> None:
    def brightest(step):
        return [np.asarray(picture).mean() for picture in step.preview()]

    sketches = pipeline([1] * 6, num_tokens=3)
    best = max(range(6), key=lambda i: np.asarray(sketches.images[i]).mean())
    *_, last = pipeline.refine([1] * 6, 3, 1, scorer=brightest)
    assert last.lengths == tuple(16 if i == best else 3 for i in range(6))
    with pytest.raises(ValueError, match="scorer"):
        list(pipeline.refine([1] * 6, 3, 1, scorer=lambda step: [1.0]))


def test_best_of_each_class() -> None:
    assert best_of_each_class([0, 0, 0, 1, 1], [1.0, 3.0, 3.0, -5.0, -6.0], 1) == [1, 3]
    assert best_of_each_class([0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0], 5) == [0, 1, 2, 3]


def test_a_deadline_is_kept(scripts: ScriptRunner, slow_pipeline_folder: Path, tmp_path: Path) -> None:
    """A generous one draws all; one that is too short draws a start, which is that of the whole."""
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


def test_the_clock_of_a_deadline_is_the_wall(pipeline: ChannelTokPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 20 ms and a decoder said to take 100 ms: 300 ms hold at most nine tokens."""
    real = pipeline.engine.advance

    def slow(*arguments, **options):
        time.sleep(0.02)
        return real(*arguments, **options)

    monkeypatch.setattr(pipeline.engine, "advance", slow)
    monkeypatch.setattr(pipeline.pictures, "seconds", lambda batch_size: 0.1)
    (length,) = pipeline([1], deadline=0.3).lengths
    assert 1 <= length <= 9


def test_stable_pictures_stop_from_the_command_line(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", 0, 1, "--stop-when-stable"]
    assert scripts("sample.py", *words, 255, cwd=tmp_path).code == 0
    assert Drawing.load(tmp_path / "samples" / "tokens.npz").num_tokens.tolist() == [2, 2]
    assert scripts("sample.py", *words, 1e-9, cwd=tmp_path).code == 0
    assert Drawing.load(tmp_path / "samples" / "tokens.npz").num_tokens.tolist() == [C, C]


# what a batch of that many rows asks for is more than there is
SCARCE = """
import torch, generator.decode
real = generator.decode.CachedDecoder.new_cache
def new_cache(self, num_rows, capacity):
    if num_rows > 3:
        torch.empty(1 << 60, dtype=torch.uint8)  # a real refusal, worded as the device words it
    return real(self, num_rows, capacity)
generator.decode.CachedDecoder.new_cache = new_cache
"""


def test_out_of_memory_halves_the_batch_and_goes_on(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", *range(5), "--samples-per-class", 2]
    assert scripts("sample.py", *words, "--output-dir", "plenty", cwd=tmp_path).code == 0
    done = scripts("sample.py", *words, before=SCARCE, cwd=tmp_path)
    assert done.code == 0, done.err
    assert re.findall(r"with (\d+) images side by side; going on with (\d+)", done.err) == [("10", "5"), ("5", "2")]
    one, other = (Drawing.load(tmp_path / name / "tokens.npz") for name in ("plenty", "samples"))
    assert torch.equal(one.tokens, other.tokens)


def test_out_of_memory_with_one_image_is_one_line(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    scarce = SCARCE.replace("> 3", "> 0")
    done = scripts("sample.py", "--model", pipeline_folder, "--class-labels", 0, before=scarce, cwd=tmp_path)
    assert done.code == 2, done.err
    assert "out of memory" in done.err
    assert "Traceback" not in done.err
    assert names_in(tmp_path) == set()


def test_compile_draws_the_same(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "samples", ignore_errors=True)
    words = ["--model", pipeline_folder, "--class-labels", 0]
    assert scripts("sample.py", *words, "--output-dir", "eager", cwd=tmp_path).code == 0
    done = scripts("sample.py", *words, "--compile", "true", cwd=tmp_path)
    assert done.code == 0, done.err
    one, other = (Drawing.load(tmp_path / name / "tokens.npz") for name in ("eager", "samples"))
    assert torch.equal(one.tokens, other.tokens)


def test_compile_without_a_compiler_is_one_line(scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path) -> None:
    nowhere = "import os; os.environ['PATH'] = '/nowhere'; os.environ.pop('CXX', None)"
    words = ["--model", pipeline_folder, "--class-labels", 0, "--compile"]
    done = scripts("sample.py", *words, before=nowhere, cwd=tmp_path)
    assert done.code == 2, done.err
    assert "C++ compiler" in done.err
    assert names_in(tmp_path) == set()
