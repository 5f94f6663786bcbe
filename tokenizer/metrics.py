"""How near a reconstruction is to its picture, image by image; on 8-bit pictures, as they are stored and shown."""

import torch
from torch import Tensor

from common.images import to_uint8
from tokenizer.config import check_ssim_size
from tokenizer.tokenizer import ChannelTokenizer

PEAK = 255.0


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB: (b 3 H W) uint8, twice -> (b,). Equal pictures have 148."""
    error = (images.float() - others.float()).square().mean((1, 2, 3))
    ratios: Tensor = 10 * torch.log10(PEAK**2 / error.clamp_min(1e-10))
    return ratios


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, in [-1, 1]: (b 3 H W) uint8, twice -> (b,); 1 for equal ones.

    The mean over pixels and colours, with a Gaussian window of 11 x 11 (standard deviation 1.5), K1 0.01, K2 0.03, and
    pictures mirrored beyond their border, by torchmetrics. (Wang, Bovik, Sheikh, Simoncelli, 2004.)

    Raises:
        InputError: pictures smaller than the window.
    """
    check_ssim_size(min(images.shape[-2:]))
    # takes seconds, and not everything that imports this module needs it
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity = structural_similarity_index_measure(
        images.float(), others.float(), gaussian_kernel=True, sigma=1.5, data_range=PEAK, reduction="none"
    )
    if not isinstance(similarity, Tensor):
        raise TypeError("torchmetrics gave more than the similarity")
    return similarity


@torch.no_grad()
def psnr_by_length(
    tokenizer: ChannelTokenizer, tokens: Tensor, images: Tensor, lengths: list[int]
) -> dict[int, Tensor]:
    """Peak signal-to-noise ratio in dB of 8-bit reconstructions from the first k tokens, for each k: (b,).

    tokens: (b C) of the images; images: (b 3 H W) uint8.
    """
    images = images.to(tokenizer.device)
    return {k: psnr(to_uint8(tokenizer.detokenize(tokens[:, :k])), images) for k in lengths}
