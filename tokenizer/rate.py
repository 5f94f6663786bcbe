"""Rate term of the tokenizer's training: distortion + weight x nats per token, under a jointly trained linear prior.

Unpredictable bits increase the rate, so the encoder keeps them only where they reduce the distortion. This is the
method of learned image compression (Ballé et al., 2018, arXiv 1802.01436, section 2) with binary codes and
straight-through gradients; ChannelTok (arXiv 2606.04461) has no such term.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from common.bit_prior import BitPrior, token_bits
from common.randomness import Stream
from common.runtime import send
from tokenizer.bsq import straight_through
from tokenizer.config import evaluation_lengths
from tokenizer.settings import RateConfig
from training.model_state import call_frozen
from training.schedule import Part


def rate_figures(nats: Tensor) -> dict[str, Tensor]:
    """Mean rates of tokens (b c): nats_per_token, bits_per_image, and nats_1, nats_2_4, ... by range of positions.

    The ranges lie between neighbouring evaluation lengths; positions are 1-based, as k is.
    """
    figures = {"nats_per_token": nats.mean(), "bits_per_image": nats.sum(1).mean() / math.log(2)}
    for start, end in pairwise([0, *evaluation_lengths(nats.shape[1])]):
        name = f"nats_{end}" if end == start + 1 else f"nats_{start + 1}_{end}"
        figures[name] = nats[:, start:end].mean()
    return figures


def rate_weights(config: RateConfig, step: int, num_channels: int) -> Tensor:
    """Weight of each channel's rate at a step: (c,) float32."""
    late = config.rate_weight if config.late_rate_weight is None else config.late_rate_weight
    share = min((step + 1) / max(config.rate_warmup_steps, 1), 1.0)
    return share * torch.linspace(config.rate_weight, late, num_channels)


class RateTerm:
    """Rate of a batch's bits: a loss for the tokenizer, and one for the prior over C channels of n bits each."""

    def __init__(self, config: RateConfig, num_channels: int, num_bits: int, num_classes: int):
        self.config = config
        self.prior = BitPrior(num_channels, num_bits, num_classes)

    def losses(
        self, vectors: Tensor, keep: Tensor, class_labels: Tensor, part: Part
    ) -> tuple[dict[str, Tensor], Callable[[nn.Module], dict[str, Tensor]]]:
        """Both losses of a micro-batch.

        Args:
            vectors: (b c n) on the unit sphere, before quantization.
            keep: (b c) bool; dropped channels are excluded from the rate. The prior is trained on all channels.
            class_labels: (b,), subject to label dropout.
            part: place of the micro-batch in the step.

        Returns:
            Terms: "rate", the weighted loss with gradients for `vectors` only, and `rate_figures`. And a function that
            computes the prior's loss from the prior, wrapped for several processes or not.
        """
        dropped = send(part.drops(self.config.prior_label_dropout, Stream.PRIOR_LABELS), class_labels.device)
        labels = torch.where(dropped, self.prior.null_label, class_labels)
        bits = straight_through(vectors) * vectors.shape[-1] ** 0.5
        nats: Tensor = call_frozen(self.prior, bits, labels)
        weights = send(rate_weights(self.config, part.step, nats.shape[1]), nats.device)
        rate = torch.where(keep, weights * nats, 0.0).sum() / keep.numel()

        def prior_loss(prior: nn.Module) -> dict[str, Tensor]:
            penalty = self.config.prior_l2_weight * self.prior.penalty()
            return {"loss": prior(bits.detach(), labels).mean() + penalty}

        return {"rate": rate, **rate_figures(nats.detach())}, prior_loss

    @torch.no_grad()
    def nats(self, tokens: Tensor, class_labels: Tensor) -> Tensor:
        """Tokens (b c) and labels (b,), none of them dropped -> nats of each token (b c), float32, on the CPU."""
        device = self.prior.weight.device
        nats: Tensor = self.prior(token_bits(tokens.to(device), self.prior.num_bits), class_labels.to(device))
        return nats.cpu()


def bit_flips(num_channels: int, num_bits: int, bit_noise: float, part: Part, device: torch.device) -> Tensor:
    """Signs (b c n), float32, -1 where a bit is flipped; see `RateConfig.bit_noise` for the probabilities."""
    shape = part.batch_size, num_channels, num_bits
    uniform = torch.rand(shape, generator=part.rng(Stream.BIT_NOISE))[list(part.rows)]
    probability = bit_noise * torch.linspace(0, 1, num_channels + 1)[1:, None]
    return send(torch.where(uniform < probability, -1.0, 1.0), device)
