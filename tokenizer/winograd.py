"""3x3 convolutions with a quarter of the products, for the decoder on CPUs (Winograd's minimal filtering)."""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.autoencoder import Decoder
from tokenizer.layers import ResidualBlock, Upsample

WINOGRAD_SIZE = 32  # smaller maps gain nothing: their weights grow fourfold and are read once
WINOGRAD_WIDTH = 64  # nor do narrow ones: the transforms outweigh the products
WINOGRAD_NUMBERS = 2**16  # of one position of all tiles in a strip; a strip's buffers then stay in the cache

# Winograd's F(4 x 4, 3 x 3) after Lavin and Gray, 2015, arXiv 1509.09308, section 4.3: input, kernel and output
INPUT_TRANSFORM = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
KERNEL_TRANSFORM = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # in 24ths
OUTPUT_TRANSFORM = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
DOUBLING = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1 with a quarter of the products: (b in h w) -> (b out h w).

    For CPUs, in float32; equal to the convolution but for rounding (a relative 1e-5). h and w are multiples of 4.
    With `doubling` the map is first doubled by nearest neighbour, (b out 2h 2w) from even h and w: a 6x6 tile
    of the doubled map holds only 4x4 different numbers, so that the doubling becomes part of the input transform.
    """

    def __init__(self, conv: nn.Conv2d, *, doubling: bool = False):
        super().__init__()
        kernel = torch.tensor(KERNEL_TRANSFORM, dtype=torch.float64) / 24
        weight = torch.einsum("yi,xj,ocij->yxco", kernel, kernel, conv.weight.detach().double())
        self.weight = nn.Buffer(rearrange(weight, "y x c o -> (y x) c o").float().contiguous())
        self.bias = cast(Tensor, conv.bias)  # every convolution of the decoder has one
        before = torch.tensor(INPUT_TRANSFORM, dtype=torch.float32)
        self.before = nn.Buffer(before @ torch.tensor(DOUBLING, dtype=torch.float32) if doubling else before)
        self.after = nn.Buffer(torch.tensor(OUTPUT_TRANSFORM, dtype=torch.float32))
        self.tile, self.step = (4, 2) if doubling else (6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Strip by strip of tiles; see the class for shapes."""
        x = rearrange(x, "b c h w -> b h w c").contiguous()
        batch, height, width, channels = x.shape
        rows, columns, out_channels = height // self.step, width // self.step, self.weight.shape[2]
        output = x.new_empty(batch, rows, 4, columns, 4, out_channels)
        at_once = max(1, WINOGRAD_NUMBERS // (batch * columns * max(channels, out_channels)))
        for top in range(0, rows, at_once):
            end = min(top + at_once, rows)
            above, below = int(top == 0), int(end == rows)  # whether the strip needs a row of zeros there
            strip = x[:, top * self.step - 1 + above : end * self.step + 1 - below]
            strip = F.pad(strip, (0, 0, 1, 1, above, below))
            tiles = strip.unfold(1, self.tile, self.step).unfold(2, self.tile, self.step)
            mixed = self._both_ways(self.before, rearrange(tiles, "b i j c y x -> y (x b i j c)"))
            products = torch.bmm(mixed.view(36, -1, channels), self.weight)
            pixels = self._both_ways(self.after, products.view(6, -1)).view(4, 4, batch, -1, columns, out_channels)
            torch.add(rearrange(pixels, "p q b i j o -> b i p j q o"), self.bias, out=output[:, top:end])
        # height and width are put together before the axes move, or torch no longer recognizes the channels_last layout
        return rearrange(rearrange(output, "b i p j q o -> b (i p) (j q) o"), "b h w o -> b o h w")

    @staticmethod
    def _both_ways(matrix: Tensor, tiles: Tensor) -> Tensor:
        """Apply a matrix (m t) to the rows and to the columns of tiles (t, t * n): (m m n)."""
        size, tile = matrix.shape
        half = torch.mm(matrix, tiles).view(size, tile, -1)
        return torch.bmm(matrix.expand(size, size, tile), half)


class _WinogradBlock(nn.Module):
    """`ResidualBlock` on Winograd's convolutions; in place where possible, because allocation is slow on a CPU."""

    def __init__(self, block: ResidualBlock):
        super().__init__()
        self.norm1, self.norm2, self.shortcut = block.norm1, block.norm2, block.shortcut
        self.conv1, self.conv2 = WinogradConv2d(block.conv1), WinogradConv2d(block.conv2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x), inplace=True))
        hidden = self.conv2(F.silu(self.norm2(hidden), inplace=True))
        return hidden.add_(self.shortcut(x))


def exclude_from_compilation(decoder: nn.Module) -> None:
    """Exclude Winograd's convolutions of a decoder from torch.compile, which makes them slower."""
    # not a decorator of the method: that would import the compiler with this module, which takes seconds
    for layer in decoder.modules():
        if isinstance(layer, WinogradConv2d):
            layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]


def use_winograd(decoder: Decoder, size: int) -> None:
    """Replace, in place, the layers of a decoder of latents (b c size size) that are faster with Winograd's method."""
    for i, layer in enumerate(decoder.trunk):
        size *= 2 if isinstance(layer, Upsample) else 1
        if size < WINOGRAD_SIZE or size % 4:
            continue
        if isinstance(layer, ResidualBlock) and layer.conv1.in_channels >= WINOGRAD_WIDTH <= layer.conv1.out_channels:
            decoder.trunk[i] = _WinogradBlock(layer)
        elif isinstance(layer, Upsample) and layer.conv.in_channels >= WINOGRAD_WIDTH:
            decoder.trunk[i] = nn.Sequential(WinogradConv2d(layer.conv, doubling=True), nn.SiLU(inplace=True))
