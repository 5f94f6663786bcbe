"""Fréchet distance between two sets of vectors, from their means and covariances (Heusel et al., arXiv 1706.08500)."""

from typing import Self

import torch
from torch import Tensor

from common.config import InputError


class RunningStatistics:
    """Accumulate mean (d,) and covariance (d d) of vectors in float64; on the CPU for MPS, which has no float64.

    Size and order of batches change the last digits only (Chan, Golub, LeVeque: Updating formulae and a pairwise
    algorithm, 1979).
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)  # (count - 1) covariance
        self._factor: Tensor | None = None

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Self:
        """Wrap a mean (d,) and a covariance (d d) of an unknown number of vectors."""
        statistics = cls(len(mean), mean.device)
        # with a count of 2 the scatter is the covariance
        statistics.count, statistics.mean, statistics.scatter = 2, mean.double(), covariance.double()
        return statistics

    def update(self, vectors: Tensor) -> None:
        """Add vectors (n d), n at least 0, of any real type and on any device."""
        vectors = vectors.to(self.mean.device).double()
        if not len(vectors):
            return
        total, mean = self.count + len(vectors), vectors.mean(0)
        centred, shift = vectors - mean, mean - self.mean
        self.mean += shift * (len(vectors) / total)
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(vectors) / total)
        self.count, self._factor = total, None

    @property
    def covariance(self) -> Tensor:
        """Covariance (d d) with divisor count - 1.

        Raises:
            InputError: fewer than 2 vectors.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images; there are {self.count}")
        return self.scatter / (self.count - 1)

    def factor(self) -> Tensor:
        """Return F (d r) with F F^T the covariance and r its rank; cached until the next update."""
        if self._factor is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            # zeros that rounding made 1e-16 would have roots of 1e-8
            nonzero = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
            self._factor = vectors[:, nonzero] * values[nonzero].sqrt()
        return self._factor


def frechet_distance(first: RunningStatistics, second: RunningStatistics) -> float:
    """Squared Fréchet distance of two normal distributions: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C = F F^T, the trace of the root is the sum of the singular values of F1^T F2, exact to rounding also for fewer
    vectors than dimensions (docs/reconstruction.md). The distance of equal sets may be negative by rounding.

    Raises:
        InputError: one set has fewer than 2 vectors.
    """
    shift = first.mean - second.mean.to(first.mean.device)
    one, other = first.factor(), second.factor().to(first.mean.device)
    root = torch.linalg.svdvals(one.T @ other).sum()
    return float(shift.square().sum() + one.square().sum() + other.square().sum() - 2 * root)
