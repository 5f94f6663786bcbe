"""PatchGAN (Isola et al., 2017, arXiv 1611.07004) with hinge losses: classifies patches as real or reconstructed.

As in the VQGAN family (Esser et al., 2021, arXiv 2012.09841), with GroupNorm, whose statistics are of one image alone:
an output depends neither on the batch nor on the number of processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.layers import group_norm
from tokenizer.settings import GanConfig

MAX_ADAPTIVE_WEIGHT = 1e4


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
