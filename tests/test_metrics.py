"""tokenizer/metrics.py against formulas in loops."""

import math

import numpy as np
import pytest
import torch
from oracles import pictures as oracle
from torch import Tensor

from common.config import InputError
from common.images import to_float, to_uint8
from tokenizer import ChannelTokenizer
from tokenizer.config import evaluation_lengths
from tokenizer.metrics import psnr, psnr_by_length, ssim


def pair(batch_size: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth pictures and noisy copies, the first pair far apart and the last one near."""
    rng = np.random.default_rng(seed)
    images = np.cumsum(rng.normal(size=(batch_size, 3, height, width)), axis=-1) * 12 + 128
    strength = np.linspace(60, 2, batch_size)[:, None, None, None]
    noisy = images + rng.normal(size=images.shape) * strength
    first, second = (torch.from_numpy(part.clip(0, 255).round().astype(np.uint8)) for part in (images, noisy))
    return first, second


@pytest.mark.parametrize("size", [(16, 16), (11, 20)])
def test_psnr_and_ssim_are_those_of_the_formulas(size: tuple[int, int]) -> None:
    images, others = pair(4, *size)
    both = [(one.numpy(), other.numpy()) for one, other in zip(images, others, strict=True)]
    np.testing.assert_allclose(psnr(others, images), [oracle.psnr(*pictures) for pictures in both], rtol=1e-6)
    expected = [oracle.ssim(*pictures) for pictures in both]
    np.testing.assert_allclose(ssim(others, images), expected, atol=2e-5)
    assert np.ptp(expected) > 0.3


def test_equal_and_opposite_pictures() -> None:
    images, _ = pair(2, 16, 16)
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    assert psnr(images, images).min() > 140
    black, white = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert psnr(black, white).item() == pytest.approx(0, abs=1e-5)
    assert psnr(black, black + 1).item() == pytest.approx(20 * math.log10(255), abs=1e-4)
    assert ssim(black, white).item() == pytest.approx((0.01 * 255) ** 2 / (255**2 + (0.01 * 255) ** 2), rel=1e-3)


def test_pictures_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(InputError, match="10 pixels a side; SSIM needs at least 11"):
        ssim(*pair(1, 10, 20))


def test_psnr_by_length_is_that_of_each_prefix(tiny_tokenizer: ChannelTokenizer) -> None:
    images, _ = pair(3, 32, 32)
    tokens = tiny_tokenizer.tokenize(to_float(images))
    found = psnr_by_length(tiny_tokenizer, tokens, images, [1, 5, 16])
    for k, ratios in found.items():
        decoded = to_uint8(tiny_tokenizer.detokenize(tokens[:, :k]))
        expected = [oracle.psnr(*(part.numpy() for part in both)) for both in zip(decoded, images, strict=True)]
        np.testing.assert_allclose(ratios, expected, rtol=1e-6)
    assert list(found) == [1, 5, 16]


@pytest.mark.parametrize(
    ("num_channels", "lengths"),
    [(1, [1]), (4, [1, 4]), (100, [1, 4, 16, 64, 100])],
)
def test_evaluation_lengths_are_powers_of_four_and_all(num_channels: int, lengths: list[int]) -> None:
    assert evaluation_lengths(num_channels) == lengths
