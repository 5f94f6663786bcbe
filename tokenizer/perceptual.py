"""LPIPS: distance of two images in the features of a VGG network (Zhang et al., 2018, arXiv 1801.03924).

The measure is torchmetrics'. Its VGG weights come from torchvision, which downloads them once, or from a file. Where
they cannot be had, the small classifier of `tokenizer.classifier` takes VGG's place.
"""

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_foreign_state
from common.errors import InputError
from tokenizer.classifier import PictureClassifier

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
            _load_vgg(network.net, state, weights)
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


class ClassifierDistance(nn.Module):
    """As LPIPS, with the feature maps of a small classifier and no weights for their channels; frozen.

    At each place of each map, both pictures' vectors are scaled to length 1; the distance is their squared difference,
    its mean over places, and of that the mean over maps: 0 for equal pictures, at most 4.

    Args:
        weights: a file that `benchmark.py features` wrote.

    Raises:
        InputError: no such file, or another.
    """

    def __init__(self, weights: str | Path):
        super().__init__()
        self.classifier = PictureClassifier.load(weights)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance of each pair: images (b 3 H W) in [-1, 1], twice -> (b,). In float32, also under autocast."""
        with torch.autocast(images.device.type, enabled=False):
            seen = zip(self.classifier.maps(images.float()), self.classifier.maps(others.float()), strict=True)
            distances = [
                (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean((1, 2))
                for one, other in seen
            ]
        return torch.stack(distances).mean(0)


def _load_vgg(network: nn.Module, state: dict[str, Tensor], path: str | Path | None) -> None:
    found = {name.removeprefix(VGG_FEATURES): value for name, value in state.items() if name.startswith(VGG_FEATURES)}
    # the network is cut into slices, in which every layer keeps its number: "slice2.5.weight" is "5.weight"
    expected = {name.split(".", 1)[1]: value for name, value in network.state_dict().items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys()
        if name not in expected or name not in found or found[name].shape != expected[name].shape
    )  # fmt: skip
    if wrong:
        raise InputError(
            f"{path} holds no VGG-16 of torchvision: {len(wrong)} weights of its features are missing, unknown or "
            f"misshapen, first {VGG_FEATURES}{wrong[0]}; give vgg16-397923af.pth"
        )
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(found[name])
