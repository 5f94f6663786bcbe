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
    """A generator and its loss, in one module so that both are computed where weights are gathered (FSDP)."""

    def __init__(self, generator: ChannelGPT):
        super().__init__()
        self.generator = generator

    def forward(self, class_labels: Tensor, tokens: Tensor) -> GeneratorLoss:
        """Class labels (b,) in [0, null_label] and tokens (b k) -> loss in float32."""
        bits = token_bits(tokens, self.generator.config.num_bits)
        log_odds = self.generator(class_labels, bits)
        return GeneratorLoss(F.softplus(-bits * log_odds).sum(-1), self.generator.prior.penalty())

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile each block in place; as all blocks are alike, this takes as long as one."""
        for block in self.generator.blocks:
            block.compile(*arguments, **options)


def position_weights(kind: Weighting, num_channels: int) -> Tensor:
    """Weight of each position's loss, mean 1: (C,).

    linear: falling from 2 at the first token to 1 at the last (the paper's size L, arXiv 2606.04461).
    """
    weights = torch.linspace(2 if kind == "linear" else 1, 1, num_channels)
    return weights / weights.mean()
