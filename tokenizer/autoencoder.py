"""Encoder and decoder: images to latents and back (ChannelTok, section 3; the VQGAN family of networks)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import TokenizerConfig
from tokenizer.layers import Attention, Downsample, ResidualBlock, Upsample, group_norm


def _middle(width: int, config: TokenizerConfig) -> list[nn.Module]:
    attention = [Attention(width, config.num_heads)] if config.middle_attention else []
    return [ResidualBlock(width, width), *attention, ResidualBlock(width, width)]


def _stage(in_width: int, out_width: int, num_blocks: int, attention: bool, num_heads: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for block in range(num_blocks):
        layers.append(ResidualBlock(in_width if block == 0 else out_width, out_width))
        if attention:
            layers.append(Attention(out_width, num_heads))
    return layers


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
        self.patch_size = config.patch_size
        widths = config.encoder_widths
        size = config.image_size // config.patch_size
        layers: list[nn.Module] = [nn.Conv2d(3 * config.patch_size**2, widths[0], 3, padding=1)]
        for i in range(len(widths) - 1):
            attention = size in config.encoder_attention_sizes
            layers += _stage(widths[i], widths[i + 1], 2, attention, config.num_heads)
            if i < len(widths) - 2:
                layers.append(Downsample(widths[i + 1]))
                size //= 2
        layers += _middle(widths[-1], config)
        layers += [group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], config.num_channels, 3, padding=1)]
        self.trunk = nn.Sequential(*layers)
        # what is left of the way down is walked at latent width
        halvings = (size // config.latent_size).bit_length() - 1
        self.shrink = nn.Sequential(*(Downsample(config.num_channels) for _ in range(halvings)))
        self.straight = (
            nn.Conv2d(3 * config.patch_size**2, config.num_channels, *_lapped(config)) if config.linear_paths else None
        )

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
        self.patch_size = config.patch_size
        widths = config.decoder_widths
        layers: list[nn.Module] = [nn.Conv2d(config.num_channels, widths[-1], 3, padding=1)]
        layers += _middle(widths[-1], config)
        layers += [Upsample(widths[-1]) for _ in range(config.latent_upsamplings)]
        size = config.latent_size * 2**config.latent_upsamplings
        width = widths[-1]
        for i in reversed(range(len(widths))):
            attention = size in config.decoder_attention_sizes
            layers += _stage(width, widths[i], 3, attention, config.num_heads)
            width = widths[i]
            if i > 0:
                layers.append(Upsample(width))
                size *= 2
        layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, 3 * config.patch_size**2, 3, padding=1)]
        self.trunk = nn.Sequential(*layers)
        self.straight = (
            nn.ConvTranspose2d(config.num_channels, 3 * config.patch_size**2, *_lapped(config))
            if config.linear_paths
            else None
        )

    def forward(self, latents: Tensor) -> Tensor:
        patches: Tensor = self.trunk(latents)
        if self.straight is not None:
            patches = patches + self.straight(latents)
        return F.pixel_shuffle(patches, self.patch_size).tanh()

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution that gives the pixels."""
        layer = self.trunk[-1]
        if not isinstance(layer, nn.Conv2d):
            raise TypeError("the decoder ends in another layer")
        return layer
