"""How alike two sets of features are, and how sharp a set of logits: by the papers' formulas, over all at once."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.special

Features = npt.NDArray[np.float64]
SEED = 2020  # of numpy's older generator, with which torch-fidelity draws


def frechet_distance(first: Features, second: Features) -> float:
    """Features (n d), (m d): |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), the root by scipy's sqrtm."""
    shift = first.mean(0) - second.mean(0)
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    product = one @ other
    root = scipy.linalg.sqrtm(product) if product.any() else product  # of zeros, older versions make nan
    return float(shift @ shift + np.trace(one) + np.trace(other) - 2 * np.trace(root).real)


def kernel(one: Features, others: Features) -> Features:
    """Features (d,), (n d) -> (n,): the third power of 1 + x y / d."""
    return ((one * others).sum(1) / len(one) + 1) ** 3


def squared_discrepancy(first: Features, second: Features) -> float:
    """Features (m d) twice: the unbiased squared MMD, in which no vector meets itself, summed row by row."""
    m = len(first)
    own = sum(kernel(rows[i], np.delete(rows, i, 0)).sum() for rows in (first, second) for i in range(m))
    across = sum(kernel(row, second).sum() for row in first)
    return float(own / (m * (m - 1)) - 2 * across / m**2)


def kernel_distance(samples: Features, reference: Features, subset: int, subsets: int = 100) -> float:
    """Features (n d), (m d): mean over subsets without repeats, of the samples first and then of the reference."""
    random = np.random.RandomState(SEED)
    found = []
    for _ in range(subsets):
        one = samples[random.choice(len(samples), subset, replace=False)]
        other = reference[random.choice(len(reference), subset, replace=False)]
        found.append(squared_discrepancy(one, other))
    return float(np.mean(found))


def squared_distances(first: Features, second: Features) -> Features:
    """Features (n d), (m d) -> (n m), by differences, so that copies are at 0."""
    return ((first[:, None] - second[None]) ** 2).sum(-1)


def within_reach(first: Features, second: Features, neighbours: int = 3) -> float:
    """Share of the first in the ball of some one of the second, whose radius is its distance to a neighbour there."""
    among = np.sort(squared_distances(second, second), axis=1)  # the nearest one is the vector itself
    return float((squared_distances(first, second) <= among[:, neighbours]).any(1).mean())


def precision_and_recall(samples: Features, reference: Features) -> tuple[float, float]:
    """Features (n d), (m d)."""
    return within_reach(samples, reference), within_reach(reference, samples)


def entropy(odds: Features) -> Features:
    """Of distributions (... c), in nats."""
    return -scipy.special.xlogy(odds, odds).sum(-1)


def inception_score(logits: Features, splits: int = 10) -> float:
    """Logits (n c): exp of how much less is unknown of a picture's class than of any picture's; mean over splits."""
    order = np.random.RandomState(SEED).permutation(len(logits))
    odds = scipy.special.softmax(logits[order], axis=1)
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    parts = [odds[start:end] for start, end in pairwise(edges)]
    return float(np.mean([np.exp(entropy(part.mean(0)) - entropy(part).mean()) for part in parts]))
