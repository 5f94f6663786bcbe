"""The Fréchet distance by its formula, over all features at once."""

import numpy as np
import numpy.typing as npt
import scipy.linalg

Features = npt.NDArray[np.float64]


def frechet_distance(first: Features, second: Features) -> float:
    """Features (n d), (m d): |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), the root by scipy's sqrtm."""
    shift = first.mean(0) - second.mean(0)
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(one @ other)
    return float(shift @ shift + np.trace(one) + np.trace(other) - 2 * np.trace(root).real)
