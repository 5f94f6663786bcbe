"""`ChannelTokPipeline`, as a program that imports it would use it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import save_pretrained_whole
from common.errors import InputError
from common.images import to_uint8
from common.runtime import has_fast_bfloat16
from generator.engine import Engine
from generator.generate import stream
from generator.pipeline import ChannelTokPipeline
from generator.sampling import SamplingConfig
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
    # some grey levels are others where pictures are decoded in bfloat16, as they are on processors that have it
    assert (drawn.int() - images.int()).abs().float().mean() < (1 if has_fast_bfloat16(torch.device("cpu")) else 0.01)
    assert len(set(pixels(found.images))) == 2


def test_without_a_number_all_tokens_are_drawn(pipeline: ChannelTokPipeline) -> None:
    assert pipeline([0]).tokens.shape == (1, C)
    assert [step.num_tokens for step in pipeline.stream([0])] == list(range(1, C + 1))


def test_every_step_can_be_looked_at(pipeline: ChannelTokPipeline) -> None:
    whole = pipeline([2, 4], seed=5)
    seen = []
    for step in pipeline.stream([2, 4], seed=5):
        assert step.tokens.tolist() == whole.tokens[:, : step.num_tokens].tolist()
        seen.append(pixels(step.preview()))
    assert seen[-1] == pixels(whole.images)
    # the tiny decoder is random, so that every further channel shows
    assert len({tuple(pictures) for pictures in seen}) == C
    for k in (1, 7):
        assert pixels(pipeline([2, 4], num_tokens=k, seed=5).images) == seen[k - 1]


def test_a_stream_stopped_early_is_continued_by_its_tokens(pipeline: ChannelTokPipeline) -> None:
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "cfg_scale": 2.0}
    whole = pipeline([0, 3], seed=[9, 1], **options).tokens
    for step in pipeline.stream([0, 3], seed=[9, 1], **options):
        if step.num_tokens == 5:
            break
    assert torch.equal(pipeline([0, 3], seed=[9, 1], prefix=step.tokens, **options).tokens, whole)


def test_seeds_are_one_number_or_one_for_each(pipeline: ChannelTokPipeline) -> None:
    base = pipeline([1, 1, 1], seed=7).tokens.tolist()
    assert pipeline([1, 1, 1], seed=7).tokens.tolist() == base
    assert pipeline([1, 1, 1], seed=[7, 8, 9]).tokens.tolist() == base
    assert pipeline([1, 1, 1], seed=(9, 7, 7)).tokens.tolist() == [base[2], base[0], base[0]]
    assert pipeline([1], seed=8).tokens.tolist() == [base[1]]
    assert len({tuple(row) for row in base}) == 3


def test_sampling_options_are_passed_on(pipeline: ChannelTokPipeline, tiny_engine: Engine) -> None:
    base = pipeline([1], seed=7).tokens.tolist()
    for options in ({"temperature": 3.0}, {"top_k": 2}, {"top_p": 0.1}, {"cfg_scale": 3.0}):
        *_, last = stream(tiny_engine, [1], [7], C, SamplingConfig(**options))
        assert pipeline([1], seed=7, **options).tokens.tolist() == last.tokens.tolist() != base


def test_classes_are_found_by_name(pipeline: ChannelTokPipeline) -> None:
    names = [
        "goldfish",
        "Carassius auratus",
        "HEN",
        " white shark ",
        "man-eater",
        "tench, tinca TINCA",
        "Struthio camelus",
    ]
    assert pipeline.class_labels(names) == [0, 0, 3, 2, 2, 1, 4]
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


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_labels": []},
        {"class_labels": [7]},
        {"class_labels": [0], "num_tokens": 0},
        {"class_labels": [0], "num_tokens": C + 1},
        {"class_labels": [0], "seed": -1},
        {"class_labels": [0], "seed": [1, 2]},
        {"class_labels": [0], "temperature": -1.0},
        {"class_labels": [0], "top_p": 0.0},
        {"class_labels": [0], "cfg_scale": float("nan")},
        {"class_labels": [0], "prefix": torch.zeros(1, C, dtype=torch.long)},
    ],
)
def test_bad_arguments_are_refused_at_the_call(pipeline: ChannelTokPipeline, arguments: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        pipeline.stream(**arguments)
    assert "\n" not in str(caught.value)


def test_labels_and_seeds_may_be_arrays(pipeline: ChannelTokPipeline) -> None:
    base = pipeline([1, 2], seed=7).tokens.tolist()
    assert pipeline(np.array([1, 2]), seed=np.array([7, 8])).tokens.tolist() == base
    assert pipeline(torch.tensor([1, 2]), seed=range(7, 9)).tokens.tolist() == base


def test_loading_twice_gives_the_same_model(pipeline: ChannelTokPipeline, pipeline_folder: Path) -> None:
    again = ChannelTokPipeline.from_pretrained(str(pipeline_folder), "cpu")
    assert again.fingerprint == pipeline.fingerprint
    assert again.layout == pipeline.layout
    assert again([2], seed=3).tokens.tolist() == pipeline([2], seed=3).tokens.tolist()


def test_bfloat16_draws(pipeline_folder: Path, pipeline: ChannelTokPipeline) -> None:
    half = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu", torch.bfloat16)
    assert half.engine.decoder.dtype == torch.bfloat16
    assert half.tokenizer.dtype == torch.float32
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
    save_pretrained_whole(tokenizer, folder / "tokenizer")
    with pytest.raises(InputError, match="tokenizer") as caught:
        ChannelTokPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_the_files_and_not_of_the_number_format(pipeline, pipeline_folder):
    loaded = ChannelTokPipeline.from_pretrained(pipeline_folder, device="cpu", dtype=torch.bfloat16)
    assert loaded.fingerprint == pipeline.fingerprint
