"""Bits and entropies by loops and by the whole table of codes."""

import itertools
import math

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """Codes (t n) -> tokens (t,): the first entry counts most."""
    tokens = []
    for row in codes.tolist():
        token = 0
        for entry in row:
            token = 2 * token + (1 if entry > 0 else 0)
        tokens.append(token)
    return torch.tensor(tokens, dtype=torch.int64)


def unpack(tokens: Tensor, num_bits: int) -> Tensor:
    """Tokens (t,) -> codes (t n), entries +-1/sqrt(n)."""
    rows = []
    for token in tokens.tolist():
        digits = format(token, f"0{num_bits}b")
        rows.append([(1.0 if digit == "1" else -1.0) / math.sqrt(num_bits) for digit in digits])
    return torch.tensor(rows, dtype=torch.float32)


def codebook(num_bits: int) -> Tensor:
    """All codes (2**n n), in the order of their tokens."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=num_bits)), dtype=torch.float64) / num_bits**0.5


def entropy(probabilities: Tensor, clamp: float) -> Tensor:
    """Entropy in nats over the last axis, the logarithm's argument at least `clamp`."""
    return -(probabilities * probabilities.clamp_min(clamp).log()).sum(-1)


def full_table_entropies(vectors: Tensor, inverse_temperature: float, clamp: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Vectors (t n) -> (mean entropy of a token, entropy of the mean), over a softmax of all 2**n codes."""
    similarity = vectors.double() @ codebook(vectors.shape[-1]).T
    probabilities = torch.softmax(2 * inverse_temperature * similarity, dim=-1)
    return entropy(probabilities, clamp).mean(), entropy(probabilities.mean(0), clamp)
