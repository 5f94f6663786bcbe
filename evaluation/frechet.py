"""Fréchet distance between two sets of vectors, of which sums alone are kept (Heusel et al., arXiv 1706.08500)."""

from typing import Self

import torch
from torch import Tensor

from common.errors import InputError


class RunningStatistics:
    """Mean and covariance of vectors that are seen piece by piece and not kept; in float64.

    Pieces may have any size and come in any order, and statistics of parts can be merged: all of it changes the result
    in the last digits only. (Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm, 1979.)

    Args:
        dimensions: d, numbers in a vector.
        device: where to keep and compute them; the CPU for Apple's MPS, which has no float64.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)  # (count - 1) covariance
        self._factor: Tensor | None = None

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Self:
        """Of a mean (d,) and a covariance (d d) that were taken elsewhere, of an unknown number of vectors."""
        found = cls(len(mean), mean.device)
        # with a count of 2 the scatter is the covariance
        found.count, found.mean, found.scatter = 2, mean.double(), covariance.double()
        return found

    def update(self, vectors: Tensor) -> None:
        """Take in vectors (n d), n at least 0, of any real type and on any device."""
        vectors = vectors.to(self.mean.device).double()
        if len(vectors):
            mean = vectors.mean(0)
            centred = vectors - mean
            self._combine(len(vectors), mean, centred.T @ centred)

    def merge(self, other: "RunningStatistics") -> None:
        """Take in what another one has seen, for example in another process."""
        if other.count:
            self._combine(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.mean += shift * (count / total)
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.count = total
        self._factor = None

    @property
    def covariance(self) -> Tensor:
        """(d d) float64, of rank count - 1 at most; divided by count - 1.

        Raises:
            InputError: fewer than 2 vectors have been seen.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 pictures; there is {self.count or 'none'}")
        return self.scatter / (self.count - 1)

    def factor(self) -> Tensor:
        """F (d r) with F F^T the covariance and r its rank; kept until more is seen."""
        if self._factor is None:
            covariance = self.covariance
            values, vectors = torch.linalg.eigh(covariance)
            # what rounding leaves of a zero must not survive the root, which makes 1e-8 of 1e-16
            real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
            self._factor = vectors[:, real] * values[real].sqrt()
        return self._factor


def frechet_distance(first: RunningStatistics, second: RunningStatistics) -> float:
    """Squared Fréchet distance of two normal distributions: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C = F F^T, the trace of the root is the sum of the singular values of F1^T F2. Unlike roots of the eigenvalues
    of C1 C2, that stays exact to rounding where a covariance has less than full rank, as it has for fewer pictures
    than dimensions (docs/reconstruction.md compares the two). Equal sets are 0 but for rounding, to either side.

    Raises:
        InputError: one of them has seen fewer than 2 vectors.
    """
    shift = first.mean - second.mean.to(first.mean.device)
    one, other = first.factor(), second.factor().to(first.mean.device)
    common = torch.linalg.svdvals(one.T @ other).sum()
    return float(shift.square().sum() + one.square().sum() + other.square().sum() - 2 * common)
