"""What the tokenizer is trained to minimise."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tokenizer.bsq import quantization_losses
from tokenizer.settings import TokenizerLossConfig
from tokenizer.tokenizer import TrainingOutput


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
        perceptual: two such batches -> a distance for each pair (b,); None omits it.
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
