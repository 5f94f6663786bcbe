"""What the tokenizer is trained to minimise."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from tokenizer.bsq import quantization_losses
from tokenizer.tokenizer import TrainingOutput


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Weights of the loss terms; the defaults are the paper's. Distances are per pixel and colour, on [-1, 1].

    The quantizer's term is entropy_weight * (token entropy - codebook_entropy_weight * codebook entropy)
    + commitment_weight * commitment (BSQ, arXiv 2406.07548, section 3; values of ChannelTok).
    """

    l1_weight: float = field(default=0.25, metadata={"help": "weight of the absolute error"})
    l2_weight: float = field(default=0.0, metadata={"help": "weight of the squared error"})
    perceptual: Literal["lpips", "features", "none"] = field(
        default="lpips",
        metadata={"help": "perceptual distance: lpips; features (of the classifier that `benchmark.py features` "
                  "trains, where VGG's weights cannot be had); or none"},
    )  # fmt: skip
    perceptual_weights: str | None = field(
        default=None,
        metadata={"help": "file of torchvision's VGG-16 (vgg16-397923af.pth; default: torchvision downloads it), or of "
                  "the classifier"},
    )  # fmt: skip
    lpips_weight: float = field(default=1.0, metadata={"help": "weight of the perceptual distance"})
    entropy_weight: float = field(default=0.1, metadata={"help": "weight of both entropy terms"})
    codebook_entropy_weight: float = field(default=1.0, metadata={"help": "codebook entropy, relative to the token's"})
    commitment_weight: float = field(default=0.25, metadata={"help": "weight of the distance to the code"})
    inverse_temperature: float = field(default=100.0, metadata={"help": "sharpness of the soft code assignment"})
    entropy_group_bits: int = field(
        default=16, metadata={"help": "bits whose joint entropy is taken, in 1..16; num_bits or more is exact"}
    )

    def __post_init__(self) -> None:
        for name in (
            "l1_weight", "l2_weight", "lpips_weight", "entropy_weight", "codebook_entropy_weight", "commitment_weight",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.perceptual not in ("lpips", "features", "none"):
            raise InputError(f"perceptual is {self.perceptual!r}; allowed: lpips, features, none")
        if self.perceptual == "features" and self.perceptual_weights is None:
            raise InputError("perceptual is features, but no classifier is given; give its file as perceptual_weights")
        if self.perceptual == "none" and self.perceptual_weights is not None:
            raise InputError("perceptual is none, and perceptual_weights names a file; give one or the other")
        if self.l1_weight + self.l2_weight <= 0:
            raise InputError("l1_weight and l2_weight are both 0; one of them must be above 0")
        if not self.inverse_temperature > 0:
            raise InputError(f"inverse_temperature is {self.inverse_temperature}; it must be above 0")
        if not 1 <= self.entropy_group_bits <= 16:
            raise InputError(f"entropy_group_bits is {self.entropy_group_bits}; it must be in 1..16")


def tokenizer_loss(
    output: TrainingOutput,
    images: Tensor,
    keep: Tensor,
    config: TokenizerLossConfig,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Named scalars of a training step.

    Args:
        output: of the model's forward pass.
        images: (b 3 H W) in [-1, 1], what it should have given.
        keep: (b c) bool, the channels that it was given.
        config: the weights.
        perceptual: two such batches -> a distance for each pair (b,); None leaves it out.
        sum_over_processes: see `bsq.quantization_losses`.

    Returns:
        "loss" is the weighted sum of all; "reconstruction" that of the distances between pictures alone.
    """
    reconstructed = output.images.float()
    distances = {"l1": F.l1_loss(reconstructed, images), "l2": F.mse_loss(reconstructed, images)}
    reconstruction = config.l1_weight * distances["l1"] + config.l2_weight * distances["l2"]
    if perceptual is not None:
        distances["lpips"] = perceptual(reconstructed, images).mean()
        reconstruction = reconstruction + config.lpips_weight * distances["lpips"]
    terms = quantization_losses(
        output.vectors, keep, config.inverse_temperature, config.entropy_group_bits, sum_over_processes
    )
    entropy = terms.token_entropy - config.codebook_entropy_weight * terms.codebook_entropy
    auxiliary = config.entropy_weight * entropy + config.commitment_weight * terms.commitment
    return {
        "loss": reconstruction + auxiliary,
        "reconstruction": reconstruction,
        **distances,
        "token_entropy": terms.token_entropy,
        "codebook_entropy": terms.codebook_entropy,
        "commitment": terms.commitment,
    }
