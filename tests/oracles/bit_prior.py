"""The linear prior by its definition: a float64 loop over bits."""

import math
from collections.abc import Sequence
from itertools import product

from common.bit_prior import BitPrior


def weight(prior: BitPrior, i: int, j: int) -> float:
    """Weight of bit j < i in the log-odds of bit i; rows before it have 0, 1, ..., i - 1 entries."""
    return prior.weight[i * (i - 1) // 2 + j].item()


def log_odds(prior: BitPrior, earlier: Sequence[float], class_label: int) -> float:
    """Log-odds of the bit that comes after `earlier`, entries +-1."""
    i = len(earlier)
    total = prior.bias[i].item() + prior.class_bias[class_label, i].item()
    for j, bit in enumerate(earlier):
        total += weight(prior, i, j) * bit
    return total


def nats(prior: BitPrior, bits: Sequence[float], class_label: int) -> list[float]:
    """Negative log-likelihood of each bit."""
    return [math.log1p(math.exp(-bit * log_odds(prior, bits[:i], class_label))) for i, bit in enumerate(bits)]


def probabilities(prior: BitPrior, class_label: int) -> dict[tuple[float, ...], float]:
    """Probabilities of all images; for few bits only."""
    images = product((-1.0, 1.0), repeat=len(prior.bias))
    return {image: math.exp(-math.fsum(nats(prior, image, class_label))) for image in images}
