"""Tail drop: whole tails of channels are dropped at random, which orders channels coarse to fine.

ChannelTok (arXiv 2606.04461), section 3; the idea is nested dropout (Rippel et al., 2014).
"""

import torch
from torch import Tensor

from tokenizer.settings import TailDropConfig


def draw_num_tokens(batch_size: int, num_channels: int, config: TailDropConfig, rng: torch.Generator) -> Tensor:
    """Draw how many channels each image keeps: (b,) int64 in [1, num_channels].

    With probability mask_probability k = 1 + floor(C g(f)) with f uniform in [0, 1) and g(f) = f (uniform), f**2 (low:
    short prefixes more often) or sqrt(f) (high: long ones); otherwise k = C.

    Always consumes two numbers an image, so that one image's draw never depends on another's. `rng`
    is a CPU generator; its state alone decides.
    """
    fraction = torch.rand(batch_size, 2, generator=rng, dtype=torch.float64)
    powers = {"uniform": 1.0, "low": 2.0, "high": 0.5}
    kept = 1 + (fraction[:, 0] ** powers[config.keep_distribution] * num_channels).long()
    dropped = fraction[:, 1] < config.mask_probability
    return torch.where(dropped, kept.clamp(max=num_channels), num_channels)


def prefix_mask(num_tokens: Tensor, num_channels: int) -> Tensor:
    """Lengths (b,) -> (b, c) bool, true for channels below the length."""
    return torch.arange(num_channels, device=num_tokens.device) < num_tokens[:, None]


def drop_tail(latents: Tensor, keep: Tensor) -> Tensor:
    """Set dropped channels of quantized latents (b c h w) to exactly 0; no gradient passes through them.

    A selection and not a product: it stays exact where a dropped channel holds inf or NaN.
    """
    return torch.where(keep[:, :, None, None], latents, torch.zeros((), dtype=latents.dtype, device=latents.device))
