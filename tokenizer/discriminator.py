"""PatchGAN: a small network that judges patches of pictures (Isola et al., 2017, arXiv 1611.07004), with hinge losses.

As in the VQGAN family (Esser et al., 2021, arXiv 2012.09841), with GroupNorm, whose statistics are of one picture
alone: so a judgement depends neither on the batch nor on the number of processes.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from tokenizer.layers import group_norm

MAX_ADAPTIVE_WEIGHT = 1e4


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """The adversarial part of the tokenizer's training; gan_weight 0 leaves it out."""

    gan_weight: float = field(default=0.0, metadata={"help": "weight of the adversarial loss; 0 = no discriminator"})
    gan_weighting: Literal["fixed", "adaptive"] = field(
        default="fixed",
        metadata={"help": "adaptive: times the ratio of the two losses' gradients at the decoder's last layer"},
    )
    gan_start_step: int = field(default=0, metadata={"help": "step from which on the discriminator plays"})
    gan_learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of the discriminator, constant"})
    gan_width: int = field(default=64, metadata={"help": "channels of the discriminator's first layer"})
    gan_layers: int = field(default=3, metadata={"help": "halvings of the picture in the discriminator"})

    def __post_init__(self) -> None:
        if not self.gan_weight >= 0:
            raise InputError(f"gan_weight is {self.gan_weight}; it must not be negative")
        if self.gan_weighting not in ("fixed", "adaptive"):
            raise InputError(f"gan_weighting is {self.gan_weighting!r}; allowed: fixed, adaptive")
        if self.gan_start_step < 0:
            raise InputError(f"gan_start_step is {self.gan_start_step}; it must not be negative")
        if not self.gan_learning_rate > 0:
            raise InputError(f"gan_learning_rate is {self.gan_learning_rate}; it must be above 0")
        if self.gan_width < 32 or self.gan_width % 32:
            raise InputError(f"gan_width is {self.gan_width}; it must be a multiple of 32 (GroupNorm)")
        if not 1 <= self.gan_layers <= 6:
            raise InputError(f"gan_layers is {self.gan_layers}; it must be in 1..6")

    def check_image_size(self, image_size: int) -> None:
        """Refuse pictures that are too small to leave a patch to judge."""
        smallest = 4 * 2**self.gan_layers
        if self.gan_weight > 0 and image_size < smallest:
            raise InputError(
                f"gan_layers {self.gan_layers} needs images of {smallest} pixels or more, image_size is {image_size}; "
                "take fewer gan_layers, or gan_weight 0"
            )


class PatchDiscriminator(nn.Module):
    """Pictures (b 3 H W) in [-1, 1] -> a logit for each patch (b 1 h w), high for real ones.

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


def last_layer_gradients(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of two scalar losses with respect to the decoder's last weight; the graph stays."""
    (first,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return first, second


def gradient_ratio(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """|reconstruction| / |adversarial| of two gradients, at most 1e4 (Esser et al., 2021, equation 7): a scalar."""
    ratio = reconstruction.norm() / (adversarial.norm() + 1e-4)
    return ratio.clamp(max=MAX_ADAPTIVE_WEIGHT).detach()
