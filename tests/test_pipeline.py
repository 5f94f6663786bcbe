"""`ChannelTokPipeline`, as a program that imports it would use it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import InputError
from common.images import to_pil, to_uint8
from common.runtime import has_fast_bfloat16
from generator.config import SamplingConfig
from generator.engine import Engine
from generator.generate import stream
from generator.pipeline import ChannelTokPipeline
from generator.stopping import KeepBest
from tokenizer import ChannelTokenizer

C = 16


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> ChannelTokPipeline:
    return ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")


def pixels(pictures: list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


def test_a_call_gives_pictures_and_tokens(
    pipeline: ChannelTokPipeline, tiny_engine: Engine, tiny_tokenizer: ChannelTokenizer
) -> None:
    found = pipeline([3, 1], num_tokens=6, seed=40)
    *_, last = stream(tiny_engine, [3, 1], [40, 41], 6, SamplingConfig())
    assert torch.equal(found.tokens, last.tokens)
    assert [(picture.size, picture.mode) for picture in found.images] == [((32, 32), "RGB")] * 2
    images = to_uint8(tiny_tokenizer.detokenize(last.tokens))
    drawn = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in found.images])
    # some grey levels differ where pictures are decoded in bfloat16, as they are on processors that have it
    assert (drawn.int() - images.int()).abs().float().mean() < (1 if has_fast_bfloat16(torch.device("cpu")) else 0.01)
    assert len(set(pixels(found.images))) == 2
    with pytest.raises(InputError, match="ChannelTokPipeline"):
        last.preview()  # of a stream without a decoder of pictures


def test_every_step_has_a_preview(pipeline: ChannelTokPipeline) -> None:
    whole = pipeline([2, 4], seed=5)
    seen, pending = [], []
    for step in pipeline.stream([2, 4], seed=5):
        assert step.tokens.tolist() == whole.tokens[:, : step.num_tokens].tolist()
        seen.append(pixels(step.preview()))
        pending.append(step.start_preview())
    assert seen[-1] == pixels(whole.images)
    # the tiny decoder is random, so that every further channel changes the pictures
    assert len({tuple(pictures) for pictures in seen}) == len(seen) == C
    assert [pixels(list(map(to_pil, preview.images()))) for preview in pending] == seen
    for k in (1, 7):
        assert pixels(pipeline([2, 4], num_tokens=k, seed=5).images) == seen[k - 1]


def test_seeds_are_one_number_or_one_for_each(pipeline: ChannelTokPipeline) -> None:
    base = pipeline([1, 1, 2], seed=7).tokens.tolist()
    assert pipeline([1, 1, 2], seed=7).tokens.tolist() == base
    assert pipeline([1, 1, 2], seed=(8, 7, 9)).tokens.tolist() == [base[1], base[0], base[2]]
    assert pipeline([1], seed=8).tokens.tolist() == [base[1]]
    assert pipeline(np.array([1, 1, 2]), seed=np.array([7, 8, 9])).tokens.tolist() == base
    assert pipeline(torch.tensor([1, 1, 2]), seed=range(7, 10)).tokens.tolist() == base
    assert len({tuple(row) for row in base}) == 3


def test_classes_are_found_by_name(pipeline: ChannelTokPipeline) -> None:
    names = ["goldfish", "Carassius auratus", "HEN", " white shark ", "man-eater", "tench, tinca TINCA"]
    assert pipeline.class_labels(names) == [0, 0, 3, 2, 2, 1]
    assert pipeline.class_labels([]) == []


@pytest.mark.parametrize(
    ("name", "near"), [("goldfsh", "'goldfish'"), ("shark", "'white shark'"), ("", "'"), ("hen,", "'hen'")]
)
def test_an_unknown_name_gives_the_nearest(pipeline: ChannelTokPipeline, name: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        pipeline.class_labels(["hen", name])
    message = str(caught.value)
    assert repr(name) in message
    assert near in message
    assert "\n" not in message


@pytest.mark.parametrize("argument", [{"num_tokens": C + 1}, {"seed": [1, 2]}, {"temperature": -1.0}], ids=str)
def test_bad_arguments_are_refused_at_the_call(pipeline: ChannelTokPipeline, argument: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        pipeline.stream([0], **argument)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- refining


def test_a_scorer_is_any_callable_and_may_use_the_pictures(pipeline: ChannelTokPipeline) -> None:
    def brightness(step):
        return [np.asarray(picture).mean() for picture in step.preview()]

    sketches = pipeline([1] * 6, num_tokens=3)
    best = max(range(6), key=lambda i: np.asarray(sketches.images[i]).mean())
    *_, last = pipeline.stream_best([1] * 6, 3, 1, scorer=brightness)
    assert last.lengths == tuple(16 if i == best else 3 for i in range(6))
    with pytest.raises(ValueError, match="scorer"):
        list(pipeline.stream_best([1] * 6, 3, 1, scorer=lambda step: [1.0]))


@pytest.mark.parametrize(
    ("labels", "scores", "keep", "kept"),
    [([0, 0, 0, 1, 1], [1.0, 3.0, 3.0, -5.0, -6.0], 1, {1, 3}), ([0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0], 5, {0, 1, 2, 3})],
)
def test_the_best_of_each_class_continue(labels: list[int], scores: list[float], keep: int, kept: set[int]) -> None:
    rule = KeepBest(labels, 4, keep, lambda step: scores)
    assert set(rule(SimpleNamespace(num_tokens=4))) == set(range(len(labels))) - kept
    assert not rule(SimpleNamespace(num_tokens=5))


# ------------------------------------------------------------------------------------- loading


def test_loading_again_gives_the_same_model(pipeline: ChannelTokPipeline, pipeline_folder: Path) -> None:
    again = ChannelTokPipeline.from_pretrained(str(pipeline_folder), "cpu")
    assert again.fingerprint == pipeline.fingerprint
    assert again.config == pipeline.config
    assert again([2], seed=3).tokens.tolist() == pipeline([2], seed=3).tokens.tolist()
    half = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu", torch.bfloat16)
    assert half.fingerprint == pipeline.fingerprint
    assert (half.engine.decoder.dtype, half.tokenizer.dtype) == (torch.bfloat16, torch.float32)
    assert half([0], seed=1).tokens.shape == (1, C)


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_half_a_folder_is_refused(pipeline_folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(pipeline_folder / part, tmp_path / part)
    with pytest.raises(InputError, match="no folder") as caught:
        ChannelTokPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    tokenizer = ChannelTokenizer.from_pretrained(folder / "tokenizer")
    with torch.no_grad():
        next(tokenizer.encoder.parameters()).flatten()[0] += 1e-6
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(InputError, match="tokenizer") as caught:
        ChannelTokPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)
