"""Encoder and decoder: images to latents and back (ChannelTok, section 3; the VQGAN family of networks)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.config import GROUPS, TokenizerConfig


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
        normed = self.norm(x)
        # heads are contiguous groups of channels: channel = head * head_dim + d
        query, key, value = (
            rearrange(project(normed), "b (n d) h w -> b n (h w) d", n=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(rearrange(mixed, "b n (h w) d -> b (n d) h w", h=x.shape[2]))


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


def _middle(width: int, config: TokenizerConfig) -> list[nn.Module]:
    attention = [Attention(width, config.num_heads)] if config.middle_attention else []
    return [ResidualBlock(width, width), *attention, ResidualBlock(width, width)]


def _stage(widths: list[int], attention: bool, num_heads: int) -> list[nn.Module]:
    """Residual blocks from each width to the next, with attention after each or without."""
    layers: list[nn.Module] = []
    for in_width, out_width in pairwise(widths):
        layers += [ResidualBlock(in_width, out_width), *([Attention(out_width, num_heads)] if attention else [])]
    return layers


def _last(width: int, channels: int) -> list[nn.Module]:
    return [group_norm(width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]


def _lapped(config: TokenizerConfig) -> tuple[int, int, int]:
    """Kernel, stride and padding of a linear path: latent entries see twice their own part, so that no seams show.

    GroupNorm takes brightness and contrast out of a picture, and a network must first learn to put them back; a
    linear map has them from the first step (a lapped transform, as Malvar and Staelin's of 1989, but learned).
    """
    side = config.patches_per_latent
    return 2 * side, side, side // 2


class Encoder(nn.Module):
    """Images (b 3 H W) in [-1, 1] -> latents (b c h w)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.patch_size, channels = config.patch_size, 3 * config.patch_size**2
        widths, size = config.encoder_widths, config.image_size // config.patch_size
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for i, width in enumerate(widths[1:], 1):
            layers += _stage([widths[i - 1], width, width], size in config.encoder_attention_sizes, config.num_heads)
            if i < len(widths) - 1:
                layers.append(Downsample(width))
                size //= 2
        self.trunk = nn.Sequential(*layers, *_middle(widths[-1], config), *_last(widths[-1], config.num_channels))
        # the remaining halvings have num_channels channels
        halvings = (size // config.latent_size).bit_length() - 1
        self.shrink = nn.Sequential(*(Downsample(config.num_channels) for _ in range(halvings)))
        self.straight = nn.Conv2d(channels, config.num_channels, *_lapped(config)) if config.linear_paths else None

    def forward(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images, self.patch_size)
        latents: Tensor = self.shrink(self.trunk(patches))
        if self.straight is None:
            return latents
        # oneDNN 3 returns wrong results for this convolution in bfloat16 on CPUs with AMX
        with torch.autocast("cpu", enabled=False):
            return latents + self.straight(patches)


class Decoder(nn.Module):
    """Latents (b c h w) -> images (b 3 H W) in [-1, 1]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.patch_size, channels = config.patch_size, 3 * config.patch_size**2
        width, size = config.decoder_widths[-1], config.latent_size * 2**config.latent_upsamplings
        layers: list[nn.Module] = [nn.Conv2d(config.num_channels, width, 3, padding=1), *_middle(width, config)]
        layers += [Upsample(width) for _ in range(config.latent_upsamplings)]
        for i, out_width in enumerate(reversed(config.decoder_widths)):
            if i > 0:
                layers.append(Upsample(width))
                size *= 2
            attention = size in config.decoder_attention_sizes
            layers += _stage([width, out_width, out_width, out_width], attention, config.num_heads)
            width = out_width
        self.trunk = nn.Sequential(*layers, *_last(width, channels))
        self.straight = (
            nn.ConvTranspose2d(config.num_channels, channels, *_lapped(config)) if config.linear_paths else None
        )

    def forward(self, latents: Tensor) -> Tensor:
        patches: Tensor = self.trunk(latents)
        if self.straight is not None:
            patches = patches + self.straight(latents)
        return F.pixel_shuffle(patches, self.patch_size).tanh()
