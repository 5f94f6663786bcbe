"""benchmark.py reconstruction --prior-images: rate under a refitted linear prior, and distance of its samples."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import bit_prior as oracle
from oracles import fid as fid_oracle
from torch import Tensor

from common.bit_prior import BitPrior, token_bits
from common.images import load_image, to_float
from evaluation.config import ReconstructionConfig
from evaluation.features import FeatureExtractor
from evaluation.reconstruction import rate
from evaluation.reconstruction.measure import measure_reconstruction
from tokenizer import ChannelTokenizer, PictureDecoder
from tokenizer.bsq import pack_bits
from tokenizer.settings import DataConfig

C, BITS, SIZE = 16, 6, 32


def images_of(folder: Path, split: str) -> Tensor:
    return torch.stack([load_image(path, SIZE) for path in sorted((folder / split).rglob("*.*"))])


def known_prior(prior: BitPrior) -> BitPrior:
    rng = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return prior


@pytest.fixture(scope="module")
def fitted_to() -> list[tuple[Tensor, Tensor]]:
    """Bits and labels that the prior was fitted to, in `found`."""
    return []


@pytest.fixture(scope="module")
def found(
    tiny_tokenizer: ChannelTokenizer, image_folder: Path, classifier: Path, fitted_to: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Results with a prior of known weights in place of the fitted one."""

    def fit(prior: BitPrior, batches: Any, *, steps: int) -> None:
        fitted_to.extend(next(batches) for _ in range(steps))
        known_prior(prior)

    config = ReconstructionConfig(
        tokenizer="tiny", perceptual="none", inception="none", num_workers=0, device="cpu", batch_size=4,
        num_tokens=[1, 5, C], sheet_images=0, prior_images=9, features=str(classifier),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate, "fit_bit_prior", fit)
        patch.setattr(rate, "STEPS", 30)
        patch.setattr(rate, "SAMPLES", 10)
        return measure_reconstruction(tiny_tokenizer, DataConfig(data_dir=str(image_folder)), config)[0]


def test_the_rate_is_the_prior_s_on_held_out_images(
    found: dict[str, Any], tiny_tokenizer: ChannelTokenizer, image_folder: Path
) -> None:
    bits = token_bits(tiny_tokenizer.tokenize(to_float(images_of(image_folder, "val"))), BITS)
    prior, labels = known_prior(BitPrior(C, BITS, 3)), [0, 0, 1, 1, 2, 2]
    nats = [oracle.nats(prior, image.flatten().tolist(), label) for image, label in zip(bits, labels, strict=True)]
    for row in found["rows"]:
        k = row["num_tokens"]
        mean = math.fsum(math.fsum(image[: k * BITS]) for image in nats) / len(nats)
        assert row["nats_per_token"] == pytest.approx(mean / k, rel=1e-5)
        assert row["bits"] == pytest.approx(mean / math.log(2), rel=1e-5)


def test_the_prior_is_fitted_to_training_images_and_their_mirror_images(
    fitted_to: list[tuple[Tensor, Tensor]],
    found: dict[str, Any],
    tiny_tokenizer: ChannelTokenizer,
    image_folder: Path,
) -> None:
    chosen = images_of(image_folder, "train")[[i * 12 // 9 for i in range(9)]]
    labels = [i * 12 // 9 // 4 for i in range(9)]
    expected = set()
    for view in (chosen, chosen.flip(-1)):
        tokens = tiny_tokenizer.tokenize(to_float(view)).tolist()
        expected |= {(*row, label) for row, label in zip(tokens, labels, strict=True)}
    given = {
        (*row, label)
        for bits, classes in fitted_to
        for row, label in zip(pack_bits(bits).tolist(), classes.tolist(), strict=True)
    }
    assert given == expected
    assert found["prior"]["train_images"] == 9


def test_the_distance_is_that_of_the_prior_s_samples_from_the_images(
    found: dict[str, Any], tiny_tokenizer: ChannelTokenizer, image_folder: Path, classifier: Path
) -> None:
    tokens = pack_bits(known_prior(BitPrior(C, BITS, 3)).sample(torch.arange(10) % 3, range(10)))
    features = FeatureExtractor(device="cpu", classifier=classifier)
    real = features(images_of(image_folder, "val")).double().numpy()
    for row in found["rows"]:
        drawn = PictureDecoder(tiny_tokenizer, dtype=torch.float32)(tokens[:, : row["num_tokens"]])
        expected = fid_oracle.frechet_distance(features(drawn).double().numpy(), real)
        assert row["prior_distance"] == pytest.approx(expected, rel=1e-3)
