"""What the tokenizer is trained to minimise."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from tokenizer.tokenizer import TrainingOutput


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Weights of the loss terms. Distances are per pixel and colour, on values in [-1, 1].

    The quantizer's term is entropy_weight * (token entropy - codebook_entropy_weight * codebook entropy)
    + commitment_weight * commitment (BSQ, arXiv 2406.07548, section 3; values of ChannelTok).
    """

    l1_weight: float = field(default=1.0, metadata={"help": "weight of the absolute error"})
    l2_weight: float = field(default=0.0, metadata={"help": "weight of the squared error"})
    entropy_weight: float = field(default=0.1, metadata={"help": "weight of both entropy terms"})
    codebook_entropy_weight: float = field(default=1.0, metadata={"help": "codebook entropy, relative to the token's"})
    commitment_weight: float = field(default=0.25, metadata={"help": "weight of the distance to the code"})
    inverse_temperature: float = field(default=100.0, metadata={"help": "sharpness of the soft code assignment"})
    entropy_group_bits: int = field(default=8, metadata={"help": "bits whose joint entropy is taken, in 1..16"})

    def __post_init__(self) -> None:
        for name in ("l1_weight", "l2_weight", "entropy_weight", "codebook_entropy_weight", "commitment_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.l1_weight + self.l2_weight <= 0:
            raise InputError("l1_weight and l2_weight are both 0; one of them must be above 0")
        if not self.inverse_temperature > 0:
            raise InputError(f"inverse_temperature is {self.inverse_temperature}; it must be above 0")
        if not 1 <= self.entropy_group_bits <= 16:
            raise InputError(f"entropy_group_bits is {self.entropy_group_bits}; it must be in 1..16")


def tokenizer_loss(output: TrainingOutput, images: Tensor, config: TokenizerLossConfig) -> dict[str, Tensor]:
    """Named scalars of a training step; "loss" is the weighted sum. images: (b 3 H W) in [-1, 1]."""
    reconstructed, terms = output.images.float(), output.quantization
    l1 = F.l1_loss(reconstructed, images)
    l2 = F.mse_loss(reconstructed, images)
    entropy = terms.token_entropy - config.codebook_entropy_weight * terms.codebook_entropy
    auxiliary = config.entropy_weight * entropy + config.commitment_weight * terms.commitment
    return {
        "loss": config.l1_weight * l1 + config.l2_weight * l2 + auxiliary,
        "l1": l1,
        "l2": l2,
        "token_entropy": terms.token_entropy,
        "codebook_entropy": terms.codebook_entropy,
        "commitment": terms.commitment,
    }
