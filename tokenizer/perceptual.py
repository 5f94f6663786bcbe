"""LPIPS: distance of two images in the features of a VGG network (Zhang et al., 2018, arXiv 1801.03924).

The measure is torchmetrics'. Its VGG weights come from torchvision, which downloads them once, or from a file.
"""

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from common.checkpoint import load_foreign_state
from common.config import InputError

VGG_FEATURES = "features."  # what torchvision's VGG calls its convolutions; the classifier after them is not needed


class PerceptualDistance(nn.Module):
    """LPIPS with VGG-16, frozen: gradients pass to the pictures, never to the network.

    Args:
        weights: a file of torchvision's VGG-16 (`vgg16-397923af.pth`, or the same as .safetensors);
            None lets torchvision download it, or find it where it once did.

    Raises:
        InputError: weights that cannot be had, or a file that does not hold them.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        state = None if weights is None else load_foreign_state(weights)
        from torchmetrics.functional.image.lpips import _LPIPS  # takes seconds, and only this class needs it

        try:
            # its dropout never drops (see `train`), but without it torchmetrics' names of the trained layer weights
            # do not fit, and it would silently leave them random
            network = _LPIPS(net="vgg", pnet_rand=weights is not None, use_dropout=True)
        except (URLError, OSError) as error:
            raise InputError(
                f"the VGG weights of LPIPS cannot be downloaded ({error}); give a copy of torchvision's "
                "vgg16-397923af.pth with --perceptual-weights, or --perceptual none"
            ) from error
        if state is not None:
            # the network is cut into slices, in which every layer keeps its number: "slice2.5.weight" is "5.weight"
            ours = {VGG_FEATURES + name.split(".", 1)[1]: name for name in network.net.state_dict()}
            found = {ours.get(name, name): value for name, value in state.items() if name.startswith(VGG_FEATURES)}
            try:
                network.net.load_state_dict(found)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"{weights} holds no VGG-16 of torchvision ({reason}); give vgg16-397923af.pth"
                ) from error
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance of each pair: images (b 3 H W) in [-1, 1], twice -> (b,), 0 for equal ones. H, W at least 16.

        Computes in float32, also under autocast.
        """
        with torch.autocast(images.device.type, enabled=False):
            distances: Tensor = self.network(images.float(), others.float())
        return distances.flatten()
