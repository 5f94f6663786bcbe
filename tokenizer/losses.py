"""What the tokenizer is trained to minimise besides the rate, and the PatchGAN (Isola et al., 2017, arXiv 1611.07004).

The discriminator is that of the VQGAN family (Esser et al., 2021, arXiv 2012.09841), with GroupNorm, whose statistics
are of one image alone: an output depends neither on the batch nor on the number of processes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.autoencoder import group_norm
from tokenizer.bsq import quantization_losses
from tokenizer.settings import GanConfig, TokenizerLossConfig


def tokenizer_loss(
    reconstructed: Tensor,
    images: Tensor,
    vectors: Tensor,
    keep: Tensor,
    config: TokenizerLossConfig,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Named scalars of a training step.

    Args:
        reconstructed: (b 3 H W) in [-1, 1].
        images: (b 3 H W) in [-1, 1], what it should be.
        vectors: (b c n) on the unit sphere, before quantization.
        keep: (b c) bool, the channels that the decoder was given.
        config: the weights.
        perceptual: two such batches -> a distance for each pair (b,); None omits it.
        sum_over_processes: see `bsq.quantization_losses`.

    Returns:
        "loss" is the weighted sum of all; "reconstruction" that of the distances between pictures alone.
    """
    reconstructed = reconstructed.float()
    distances = {"l1": F.l1_loss(reconstructed, images), "l2": F.mse_loss(reconstructed, images)}
    reconstruction = config.l1_weight * distances["l1"] + config.l2_weight * distances["l2"]
    if perceptual is not None:
        distances["lpips"] = perceptual(reconstructed, images).mean()
        reconstruction = reconstruction + config.lpips_weight * distances["lpips"]
    terms = quantization_losses(
        vectors, keep, config.inverse_temperature, config.entropy_group_bits, sum_over_processes
    )
    entropy = terms["token_entropy"] - config.codebook_entropy_weight * terms["codebook_entropy"]
    auxiliary = config.entropy_weight * entropy + config.commitment_weight * terms["commitment"]
    return {"loss": reconstruction + auxiliary, "reconstruction": reconstruction, **distances, **terms}


class PatchDiscriminator(nn.Module):
    """Classify patches: images (b 3 H W) in [-1, 1] -> a logit for each patch (b 1 h w), high for real ones.

    Convolutions of 4x4: `layers` of stride 2 with widths doubling up to 8 times the first, then two of stride 1.
    """

    def __init__(self, config: GanConfig):
        super().__init__()
        widths = [config.gan_width * min(2**i, 8) for i in range(config.gan_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(config.gan_layers):
            stride = 2 if i < config.gan_layers - 1 else 1
            layers += [nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1)]
            layers += [group_norm(widths[i + 1]), nn.LeakyReLU(0.2)]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.trunk(images)
        return logits


def discriminator_loss(discriminator: nn.Module, images: Tensor, reconstructed: Tensor) -> dict[str, Tensor]:
    """Hinge loss (Lim and Ye, 2017, arXiv 1705.02894) and the mean logits; pictures (b 3 H W) get no gradient."""
    # one pass over both: two would be two forward passes of DistributedDataParallel before one backward pass
    real, fake = discriminator(torch.cat([images, reconstructed.detach()])).float().chunk(2)
    loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return {"loss": loss, "real": real.mean(), "fake": fake.mean()}
