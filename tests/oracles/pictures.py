"""PSNR, SSIM and LPIPS of one pair of pictures, as their papers write them."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Picture = npt.NDArray[np.uint8]
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the colours, in LPIPS
LAST_LAYERS = (3, 8, 15, 22, 29)  # of VGG-16's features, each the last ReLU before a pooling


def psnr(picture: Picture, other: Picture) -> float:
    """Decibels of two pictures (3 H W)."""
    error = np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / error)


def mirrored(position: int, size: int) -> int:
    """A place beyond the border, mirrored at the middle of the border's pixel."""
    position = abs(position)
    return position if position < size else 2 * (size - 1) - position


def ssim(picture: Picture, other: Picture) -> float:
    """Mean over pixels and colours of pictures (3 H W), window by window in loops."""
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    colours, height, width = picture.shape
    total = 0.0
    for colour in range(colours):
        for row in range(height):
            for column in range(width):
                rows = [mirrored(row + i, height) for i in range(-5, 6)]
                columns = [mirrored(column + i, width) for i in range(-5, 6)]
                one = picture[colour][np.ix_(rows, columns)].astype(np.float64)
                two = other[colour][np.ix_(rows, columns)].astype(np.float64)
                mean_one, mean_two = (window * one).sum(), (window * two).sum()
                variance_one = (window * (one - mean_one) ** 2).sum()
                variance_two = (window * (two - mean_two) ** 2).sum()
                covariance = (window * (one - mean_one) * (two - mean_two)).sum()
                numerator = (2 * mean_one * mean_two + c1) * (2 * covariance + c2)
                total += numerator / ((mean_one**2 + mean_two**2 + c1) * (variance_one + variance_two + c2))
    return total / picture.size


def lpips(features: nn.Module, weights: list[Tensor], image: Tensor, other: Tensor) -> float:
    """Distance of two pictures (3 H W) in [-1, 1].

    features: of torchvision's VGG-16, in float64. weights: (c,) for the channels of each of five layers.
    """
    maps = []
    for picture in (image, other):
        hidden = ((picture.double() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None])[None]
        seen = []
        for number, layer in enumerate(list(features.children())[: LAST_LAYERS[-1] + 1]):
            hidden = layer(hidden)
            if number in LAST_LAYERS:
                seen.append(hidden[0])
        maps.append(seen)
    total = 0.0
    for weight, one, two in zip(weights, *maps, strict=True):
        difference = one / one.norm(dim=0) - two / two.norm(dim=0)  # every place's vector has length 1
        total += float((difference.square() * weight.double()[:, None, None]).sum(0).mean())
    return total
