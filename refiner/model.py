"""`Refiner`: the velocity of a flow from noise to the detail that an image of k tokens lacks."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.checkpoint import SavedModel
from refiner.config import RefinerConfig

TRUNK_MAPS, PIXEL_MAPS = 16, 48  # feature maps at full resolution, from the transformer and of the pixel head
NORM_EPS = 1e-6  # torch's default depends on the number format
MIN_REMAINING_TIME = 0.05  # lower bound of 1 - t where it divides


def sinusoids(values: Tensor, size: int) -> Tensor:
    """Values (b,) of order 1 -> (b size): cosines and sines at periods from 2 pi to 2 pi / 1,000."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), size // 2, device=values.device))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    """Transformer block with adaLN-single (Chen et al., 2023, arXiv 2310.00426, section 2.3).

    Shift, scale and gate are the sum of vectors that all blocks share, computed from time, k and class, and of learned
    ones of this block. Queries and keys are normalized (Dehghani et al., 2023, arXiv 2302.05442, section 2). A
    depthwise convolution before the MLP mixes neighbouring patches, similar to Guo et al. (2021, arXiv 2107.06263).
    """

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads, eps=NORM_EPS) for _ in range(2))
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, hidden: Tensor, shared: Tensor) -> Tensor:
        # fmt: off
        shift1, scale1, gate1, shift2, scale2, gate2 = (shared + self.modulation)[:, :, None].unbind(1)  # b 1 d
        normed = self.attention_norm(hidden) * (1 + scale1) + shift1                            # b s d
        fused = self.query_key_value(normed)                                                    # b s 3me
        query, key, value = rearrange(fused, "b s (three m e) -> three b m s e", three=3, m=self.heads)
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)  # b m s e
        mixed = F.scaled_dot_product_attention(query, key, value)                               # b m s e
        hidden = hidden + gate1 * self.attention_out(rearrange(mixed, "b m s e -> b s (m e)"))  # b s d
        normed = self.mlp_norm(hidden) * (1 + scale2) + shift2                                  # b s d
        maps = self.mix(rearrange(normed, "b (h w) d -> b d h w", h=self.side))                 # b d h w
        normed = normed + rearrange(maps, "b d h w -> b (h w) d")                               # b s d
        update: Tensor = self.down(F.gelu(self.up(normed), approximate="tanh"))                 # b s d
        return hidden + gate2 * update                                                          # b s d
        # fmt: on


class PixelHead(nn.Module):
    """Convolutions at full resolution.

    They receive the noisy point and the decoded image, so that the transformer need not encode every pixel (as in Ma et
    al., 2025, DeCo, section 3), and they remove seams between patches.
    """

    def __init__(self, inputs: int, embedding_size: int):
        super().__init__()
        self.inward = nn.Conv2d(inputs, PIXEL_MAPS, 3, padding=1)
        self.modulation = nn.Linear(embedding_size, 2 * PIXEL_MAPS)
        self.middle = nn.ModuleList(
            nn.Conv2d(PIXEL_MAPS, PIXEL_MAPS, 3, padding=dilation, dilation=dilation) for dilation in (2, 1)
        )
        self.outward = nn.Conv2d(PIXEL_MAPS, 3, 3, padding=1)

    def forward(self, maps: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)  # b f 1 1
        hidden = self.inward(maps) * (1 + scale) + shift  # b f H W
        for layer in self.middle:
            hidden = hidden + layer(F.silu(hidden))  # b f H W
        pixels: Tensor = self.outward(F.silu(hidden))  # b 3 H W
        return pixels


class Refiner(SavedModel):
    """Transformer over patches that predicts a velocity, from a point of the flow and the decoded image of k tokens.

    The first and last blocks operate on patches of half of patch_size, the others on 2 x 2 merged ones, with a skip
    connection (Crowson et al., 2024, arXiv 2401.11605, section 4). Rectified flow (Liu et al., 2022, arXiv 2209.03003)
    with blocks of Peebles and Xie (2022, arXiv 2212.09748). The network predicts the end of the flow, of which the
    velocity follows (Li and He, 2025, arXiv 2511.13720).
    """

    config_class = RefinerConfig
    model_type = "channeltok-refiner"
    config: RefinerConfig

    def __init__(self, config: RefinerConfig):
        super().__init__(config)
        width, patch = config.width, config.patch_size // 2
        side = config.image_size // patch
        # no nn.Embedding: its normal_ on the meta device, when weights are loaded, would import torch's compiler
        self.class_vectors = nn.Parameter(torch.empty(len(config.class_names) + 1, width))
        self.embed = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = nn.Linear(6 * patch**2, width)
        self.positions = nn.Parameter(torch.zeros(side * side, width))
        self.block_modulation = nn.Linear(width, 6 * width)
        self.before, self.after = (
            nn.ModuleList(Block(width, config.heads, side) for _ in range(config.outer_layers)) for _ in range(2)
        )
        self.merge = nn.Linear(4 * width, width)
        self.blocks = nn.ModuleList(Block(width, config.heads, side // 2) for _ in range(config.layers))
        self.split = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, TRUNK_MAPS * patch**2)
        self.pixels = PixelHead(TRUNK_MAPS + 6, width)
        if self.head.weight.device.type != "meta":
            self._initialize()

    def _initialize(self) -> None:
        """Every block is the identity and the prediction 0 at the start."""
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.class_vectors, std=0.5)
        mixing: list[Any] = [module.mix for module in self.modules() if isinstance(module, Block)]
        for layer in (*mixing, self.block_modulation, self.modulation, self.pixels.modulation, self.pixels.outward):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, point: Tensor, decoded: Tensor, time: Tensor, num_tokens: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the velocity (b 3 H W) float32 at a point of the flow.

        `point` is noise at time 0 and the residual in units of its scale at time 1, `decoded` (b 3 H W) in [-1, 1].
        Times (b,) are in [0, 1], num_tokens (b,) in [1, C], labels (b,) in [0, null_label]; the last is no class.
        """
        config = self.config
        # fmt: off
        share = torch.log(num_tokens.float()) / math.log(max(config.num_channels, 2))           # b
        where = torch.cat([sinusoids(part, config.width) for part in (time, share)], dim=1)     # b 2d
        embedding = F.silu(self.embed(where.to(self.dtype)) + self.class_vectors[class_labels])  # b d
        shared = rearrange(self.block_modulation(embedding), "b (six d) -> b six d", six=6)
        inputs = torch.cat([point, decoded], dim=1).to(self.dtype)                              # b 6 H W
        patches = F.pixel_unshuffle(inputs, config.patch_size // 2)                             # b (6 p p) 2h 2w
        fine = self.stem(rearrange(patches, "b c h w -> b (h w) c")) + self.positions           # b 4s d
        for block in self.before:
            fine = block(fine, shared)
        grid = {"h": patches.shape[2] // 2, "i": 2, "j": 2}
        hidden = self.merge(rearrange(fine, "b (h i w j) d -> b (h w) (i j d)", **grid))        # b s d
        for block in self.blocks:
            hidden = block(hidden, shared)
        fine = fine + rearrange(self.split(hidden), "b (h w) (i j d) -> b (h i w j) d", **grid)  # b 4s d
        for block in self.after:
            fine = block(fine, shared)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=-1)                     # b 1 d
        fine = self.head(self.norm(fine) * (1 + scale) + shift)                                 # b 4s (16 p p)
        maps = rearrange(fine, "b (h w) c -> b c h w", h=patches.shape[2])                      # b (16 p p) 2h 2w
        maps = F.pixel_shuffle(maps, config.patch_size // 2).to(inputs.dtype)                   # b 16 H W
        maps = torch.cat([maps, inputs], dim=1).contiguous(memory_format=torch.channels_last)   # b 22 H W
        end: Tensor = self.pixels(maps, embedding).float()                                      # b 3 H W
        return (end - point) / (1 - time.float()).clamp(min=MIN_REMAINING_TIME)[:, None, None, None]
        # fmt: on
