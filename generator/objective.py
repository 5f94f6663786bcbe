"""Training objective of the generator: cross-entropy of every token, and a penalty on the linear prior."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.bit_prior import token_bits
from generator.config import Weighting
from generator.model import ChannelGPT


class GeneratorLoss(NamedTuple):
    """nats: negative log-likelihood of every token (b k). penalty: sum of squares of the prior's weights, a scalar."""

    nats: Tensor
    penalty: Tensor


class GeneratorObjective(nn.Module):
    """A generator with its loss, in one module so that both are computed where weights are gathered (FSDP).

    Args:
        generator: trained in place.
    """

    def __init__(self, generator: ChannelGPT):
        super().__init__()
        self.generator = generator

    def forward(self, class_labels: Tensor, tokens: Tensor, flips: Tensor | None = None) -> GeneratorLoss:
        """Class labels (b,) in [0, null_label] and tokens (b k) -> loss in float32.

        `flips` (b k n), entries +-1, is multiplied with the bits that the transformer reads, not with its targets: it
        learns to continue from errors (Han et al., 2024, arXiv 2412.04431, section 3.4).
        """
        bits = token_bits(tokens, self.generator.config.num_bits)
        log_odds = self.generator(class_labels, bits, None if flips is None else bits * flips)
        return GeneratorLoss(F.softplus(-bits * log_odds).sum(-1), self.generator.prior.penalty())

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile each block in place; as all blocks are alike, this takes as long as one."""
        for block in self.generator.blocks:
            block.compile(*arguments, **options)


def position_weights(kind: Weighting, num_channels: int) -> Tensor:
    """Weight of each position's loss, mean 1: (C,).

    linear: falling from 2 at the first token to 1 at the last (the paper's size L, arXiv 2606.04461);
    exponential: from 16 to 1, halved four times.
    """
    weights = {
        "none": torch.ones(num_channels),
        "linear": torch.linspace(2, 1, num_channels),
        "exponential": 2 ** torch.linspace(4, 0, num_channels),
    }[kind]
    return weights / weights.mean()


def draw_flips(images: int, num_channels: int, num_bits: int, largest: float, rng: torch.Generator) -> Tensor:
    """Random signs (images num_channels num_bits): -1 with a probability that is drawn evenly from [0, largest]."""
    share = torch.rand(images, 1, 1, generator=rng) * largest
    return torch.where(torch.rand(images, num_channels, num_bits, generator=rng) < share, -1.0, 1.0)
