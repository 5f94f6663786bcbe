"""One micro-batch of the tokenizer's training: tail drop, losses, a discriminator, and a prior for the rate."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from common.runtime import send
from tokenizer.discriminator import PatchDiscriminator, discriminator_loss, gradient_ratio, last_layer_gradients
from tokenizer.losses import tokenizer_loss
from tokenizer.perceptual import ClassifierDistance, PerceptualDistance
from tokenizer.rate import RateTerm, bit_flips
from tokenizer.settings import GanConfig, TailDropConfig, TokenizerLossConfig
from tokenizer.tail_drop import draw_num_tokens, prefix_mask
from tokenizer.tokenizer import ChannelTokenizer
from training.model_state import AuxiliaryModel, StepLoss, call_frozen
from training.schedule import Part
from training.trainer import Trainer

DISCRIMINATOR, PRIOR = "discriminator", "prior"  # names of the auxiliary models in checkpoints and logs
DISCRIMINATOR_BETAS = (0.5, 0.9)  # as Esser et al. (arXiv 2012.09841)


class TokenizerObjective:
    """Losses of the tokenizer's training: images in, `StepLoss` out.

    Args:
        loss: weights of the terms.
        tail_drop: which channels are dropped.
        gan: the adversarial part.
        bit_noise: see `RateConfig.bit_noise`.
        rate_term: rate term, or None.
        device: where to compute the perceptual distance.

    Raises:
        InputError: weights of the perceptual distance that cannot be had.
    """

    def __init__(
        self,
        loss: TokenizerLossConfig,
        tail_drop: TailDropConfig,
        gan: GanConfig,
        bit_noise: float,
        rate_term: RateTerm | None,
        device: torch.device,
    ):
        self.loss, self.tail_drop, self.gan = loss, tail_drop, gan
        self.bit_noise, self.rate_term = bit_noise, rate_term
        self.perceptual: PerceptualDistance | ClassifierDistance | None = None
        if loss.perceptual == "features" and loss.perceptual_weights is not None:
            self.perceptual = ClassifierDistance(loss.perceptual_weights).to(device)
        elif loss.perceptual == "lpips":
            self.perceptual = PerceptualDistance(loss.perceptual_weights).to(device)

    def auxiliary_models(self, memory_format: torch.memory_format) -> dict[str, AuxiliaryModel]:
        """A new discriminator if gan_weight is above 0, and the prior if there is a rate term."""
        models: dict[str, AuxiliaryModel] = {}
        if self.gan.gan_weight > 0:
            discriminator = PatchDiscriminator(self.gan).to(memory_format=memory_format)
            models[DISCRIMINATOR] = AuxiliaryModel(
                model=discriminator, learning_rate=self.gan.gan_learning_rate, betas=DISCRIMINATOR_BETAS
            )
        if self.rate_term is not None:
            models[PRIOR] = self.rate_term.auxiliary_model()
        return models

    def __call__(
        self, trainer: Trainer, model: nn.Module, images: Tensor, class_labels: Tensor, part: Part
    ) -> StepLoss:
        """Losses of images (b 3 H W) in [-1, 1] with labels (b,), rows `part.rows` of the step's batch."""
        bare: ChannelTokenizer = trainer.main.bare
        channels, bits = bare.config.num_channels, bare.config.num_bits
        lengths = draw_num_tokens(part.batch_size, channels, self.tail_drop, part.rng())
        keep = send(prefix_mask(lengths[list(part.rows)], channels), images.device)
        flips = None
        if self.bit_noise > 0:
            flips = bit_flips(channels, bits, self.bit_noise, part, images.device)
        output = model(images, keep, flips)
        terms = tokenizer_loss(output, images, keep, self.loss, self.perceptual, trainer.sum_over_processes)
        losses: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {}
        if DISCRIMINATOR in trainer.auxiliary and part.step >= self.gan.gan_start_step:
            terms |= self._adversarial(trainer, terms, output.images)
            losses[DISCRIMINATOR] = partial(discriminator_loss, images=images, reconstructed=output.images)
        if self.rate_term is not None:
            rate, losses[PRIOR] = self.rate_term.losses(output.vectors, keep, class_labels, part)
            terms |= rate
            terms["loss"] = terms["loss"] + rate["rate"]
        return StepLoss(terms=terms, auxiliary=losses)

    def _adversarial(self, trainer: Trainer, terms: dict[str, Tensor], reconstructed: Tensor) -> dict[str, Tensor]:
        """Terms with the adversarial loss added; reconstructed images (b 3 H W)."""
        adversarial = -call_frozen(trainer.auxiliary[DISCRIMINATOR].bare, reconstructed).float().mean()
        weight = torch.full((), self.gan.gan_weight, device=reconstructed.device)
        if self.gan.gan_weighting == "adaptive":
            last_layer = trainer.main.bare.decoder.last_layer.weight
            gradients = last_layer_gradients(terms["reconstruction"], adversarial, last_layer)
            weight = weight * gradient_ratio(*map(trainer.mean_over_processes, gradients))
        return {"loss": terms["loss"] + weight * adversarial, "adversarial": adversarial, "gan_weight": weight}
