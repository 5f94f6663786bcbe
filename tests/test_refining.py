"""Further training of a decoder: the same tokens, other pictures, and a generator of these tokens still fits."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, ScriptRunner

from common.checkpoint import fingerprint
from generator.pipeline import ChannelTokPipeline
from tokenizer import ChannelTokenizer

FLAGS = (
    *("--steps", 4, "--batch-size", 4, "--warmup-steps", 0, "--learning-rate", 0.003, "--weight-decay", 0.1),
    *("--ema-decay", 0.5, "--checkpoint-every", 2, "--evaluate-every", 4, "--validation-images", 4),
    *("--num-workers", 0, "--mixed-precision", "no", "--perceptual", "none", "--entropy-group-bits", 4),
)
SIZES = (
    *("--image-size", 32, "--num-channels", 16, "--patch-size", 2, "--encoder-widths", 32, 32, "--decoder-widths", 32),
    *("--num-heads", 4),
)


@pytest.fixture(scope="module")
def refine(scripts: ScriptRunner, image_folder: Path, pipeline_folder: Path) -> Any:
    def run(output_dir: Path, *more: Any) -> Finished:
        flags = ("--data-dir", image_folder, "--output-dir", output_dir, *FLAGS, *more)
        return scripts("train_tokenizer.py", "--init-from", pipeline_folder / "tokenizer", *flags)

    return run


@pytest.fixture(scope="module")
def refined(refine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refined") / "run"
    done = refine(folder, "--frozen-encoder")
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ChannelTokenizer.from_pretrained(folder).state_dict()


def test_the_encoder_is_kept_and_all_other_weights_change(refined: Path, tiny_tokenizer: ChannelTokenizer) -> None:
    old, new = tiny_tokenizer.state_dict(), weights(refined)
    reads = {name for name in old if name.startswith(("encoder.", "quantizer.project_in."))}
    assert 0 < len(reads) < len(old)
    assert {name for name in old if torch.equal(old[name], new[name])} == reads


def test_tokens_and_their_fingerprint_do_not_change(refined: Path, tiny_tokenizer: ChannelTokenizer) -> None:
    images = (
        torch.rand(8, 3, *[tiny_tokenizer.config.image_size] * 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    new = ChannelTokenizer.from_pretrained(refined)
    assert torch.equal(new.tokenize(images), tiny_tokenizer.tokenize(images))
    assert new.token_fingerprint() == tiny_tokenizer.token_fingerprint()
    assert fingerprint(new) != fingerprint(tiny_tokenizer)


@pytest.mark.parametrize("name", ["encoder.trunk.0.weight", "quantizer.project_in.bias"])
def test_another_encoder_has_another_fingerprint(tiny_tokenizer: ChannelTokenizer, name: str) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    assert other.token_fingerprint() == tiny_tokenizer.token_fingerprint()
    with torch.no_grad():
        dict(other.named_parameters())[name].flatten()[-1].add_(1e-3)
    assert other.token_fingerprint() != tiny_tokenizer.token_fingerprint()


def test_a_generator_draws_the_same_tokens_with_the_refined_decoder_and_another_picture(
    refined: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder / "generator", folder / "generator")
    shutil.copytree(refined, folder / "tokenizer", ignore=shutil.ignore_patterns("checkpoints", "reconstructions"))
    old, new = ChannelTokPipeline.from_pretrained(pipeline_folder), ChannelTokPipeline.from_pretrained(folder)
    first, second = old([0, 2], seed=5), new([0, 2], seed=5)
    assert torch.equal(first.tokens, second.tokens)
    assert first.images[0].tobytes() != second.images[0].tobytes()
    assert old.fingerprint != new.fingerprint  # they do not share measurements
    assert old.tokens_fingerprint == new.tokens_fingerprint  # but one can continue drawings of the other


def test_without_a_frozen_encoder_the_whole_tokenizer_is_trained_further(
    refine: Any, tmp_path: Path, tiny_tokenizer: ChannelTokenizer
) -> None:
    assert refine(tmp_path / "run", "--learning-rate", 1e-6).code == 0
    old, new = tiny_tokenizer.state_dict(), weights(tmp_path / "run")
    drift = max((new[name] - old[name]).abs().max().item() for name in old)
    assert 0 < drift < 1e-4
    assert not torch.equal(old["encoder.trunk.0.weight"], new["encoder.trunk.0.weight"])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--num-bits", 5), "num_bits is 5, but init_from"),
        # the default of another size is another size, too
        ((*SIZES, "--num-bits", 14), "num_bits is 14, but init_from"),
        (("--init-from", "nowhere/at/all"), "nowhere/at/all"),
        (("--frozen-encoder", "--rate-weight", 0.1), "frozen_encoder keeps the tokens, so a rate term"),
        (("--frozen-encoder", "--save-dtype", "bfloat16"), "save_dtype bfloat16 would round its encoder; take float32"),
    ],
)
def test_mistakes_are_one_line(refine: Any, tmp_path: Path, flags: tuple[Any, ...], line: str) -> None:
    done = refine(tmp_path / "run", *flags)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert line in done.err
    assert not (tmp_path / "run").exists()


def test_a_frozen_encoder_needs_a_tokenizer(scripts: ScriptRunner, image_folder: Path, tmp_path: Path) -> None:
    flags = ("--data-dir", image_folder, "--output-dir", tmp_path / "run", "--perceptual", "none", "--frozen-encoder")
    done = scripts("train_tokenizer.py", *flags)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "give that as init_from" in done.err


def test_a_tokenizer_saved_in_bfloat16_is_half_as_large_and_computes_in_float32(refine: Any, tmp_path: Path) -> None:
    done = refine(tmp_path / "run", "--save-dtype", "bfloat16")
    assert done.code == 0, done.err
    assert refine(tmp_path / "exact").code == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("run", "exact")]
    assert sizes[0] < 0.6 * sizes[1]
    model, exact = ChannelTokenizer.from_pretrained(tmp_path / "run"), weights(tmp_path / "exact")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact[name].bfloat16().float())
    # the rounded weights are the tokenizer now, and its decoder can be trained further in that format
    again = refine(tmp_path / "again", "--frozen-encoder", "--save-dtype", "bfloat16", "--init-from", tmp_path / "run")
    assert again.code == 0, again.err
    assert ChannelTokenizer.from_pretrained(tmp_path / "again").token_fingerprint() == model.token_fingerprint()
