"""Building blocks of the encoder and the decoder."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.config import GROUPS


def group_norm(width: int) -> nn.GroupNorm:
    """GroupNorm as the whole network uses it: 32 groups, eps 1e-6."""
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: (b in h w) -> (b out h w)."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.norm1 = group_norm(in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = group_norm(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden


class Attention(nn.Module):
    """Self-attention over all positions of a map, added to its input: (b d h w) -> (b d h w)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(width)
        self.query = nn.Conv2d(width, width, 1)
        self.key = nn.Conv2d(width, width, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        normed = self.norm(x)
        # heads are contiguous groups of channels: channel = head * head_dim + d
        query, key, value = (
            rearrange(project(normed), "b (n d) h w -> b n (h w) d", n=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(rearrange(mixed, "b n (h w) d -> b (n d) h w", h=height))


class Downsample(nn.Module):
    """Halve a map: zeros to the right and below only, 3x3 convolution of stride 2, Swish."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double a map: nearest neighbour, 3x3 convolution, Swish."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
