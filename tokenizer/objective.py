"""One micro-batch of the tokenizer's training: tail drop, losses, and the game against a discriminator."""

from functools import partial

import torch
from torch import Tensor, nn

from common.players import Opponent
from common.runtime import send
from common.steps import Part
from common.training import Loop, StepLoss
from tokenizer.discriminator import (
    GanConfig,
    PatchDiscriminator,
    discriminator_loss,
    gradient_ratio,
    judge_without_learning,
    last_layer_gradients,
)
from tokenizer.losses import TokenizerLossConfig, tokenizer_loss
from tokenizer.perceptual import ClassifierDistance, PerceptualDistance
from tokenizer.tail_drop import TailDropConfig, draw_num_tokens, prefix_mask
from tokenizer.tokenizer import ChannelTokenizer


class TokenizerObjective:
    """What `Loop.run` minimises: images in, `StepLoss` out.

    Args:
        loss: weights of the terms.
        tail_drop: which channels are dropped.
        gan: the adversarial part.
        device: where to compute the perceptual distance.

    Raises:
        InputError: weights of the perceptual distance that cannot be had.
    """

    def __init__(self, loss: TokenizerLossConfig, tail_drop: TailDropConfig, gan: GanConfig, device: torch.device):
        self.loss, self.tail_drop, self.gan = loss, tail_drop, gan
        self.perceptual: PerceptualDistance | ClassifierDistance | None = None
        if loss.perceptual == "features" and loss.perceptual_weights is not None:
            self.perceptual = ClassifierDistance(loss.perceptual_weights).to(device)
        elif loss.perceptual == "lpips":
            self.perceptual = PerceptualDistance(loss.perceptual_weights).to(device)

    def opponent(self, memory_format: torch.memory_format) -> Opponent | None:
        """A fresh discriminator; None where the adversarial loss has no weight."""
        if self.gan.gan_weight == 0:
            return None
        discriminator = PatchDiscriminator(self.gan).to(memory_format=memory_format)
        return Opponent(model=discriminator, learning_rate=self.gan.gan_learning_rate)

    def __call__(self, loop: Loop, model: nn.Module, images: Tensor, part: Part) -> StepLoss:
        """Images (b 3 H W) in [-1, 1], rows `part.rows` of the step's batch, through the loop's model."""
        bare: ChannelTokenizer = loop.player.bare
        lengths = draw_num_tokens(part.batch_size, bare.config.num_channels, self.tail_drop, part.rng())
        keep = send(prefix_mask(lengths[list(part.rows)], bare.config.num_channels), images.device)
        output = model(images, keep)
        terms = tokenizer_loss(output, images, keep, self.loss, self.perceptual, loop.sum_over_processes)
        if loop.opponent is None or part.step < self.gan.gan_start_step:
            return StepLoss(terms=terms)
        adversarial = -judge_without_learning(loop.opponent.bare, output.images).float().mean()
        weight = torch.full((), self.gan.gan_weight, device=images.device)
        if self.gan.gan_weighting == "adaptive":
            last_layer = bare.decoder.last_layer.weight
            gradients = last_layer_gradients(terms["reconstruction"], adversarial, last_layer)
            weight = weight * gradient_ratio(*map(loop.mean_over_processes, gradients))
        terms |= {"loss": terms["loss"] + weight * adversarial, "adversarial": adversarial, "gan_weight": weight}
        return StepLoss(terms=terms, opponent=partial(discriminator_loss, images=images, reconstructed=output.images))
