"""Random numbers as functions of a key, so that no generator's state is ever kept."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from common.config import InputError


class Stream(IntEnum):
    """Random streams of a training run: the second element of the key of `generator_for`.

    Number 5 is used by `generator.token_data`, with NumPy.
    """

    ORDER = 1
    STEP = 2
    AUGMENTATION = 3
    DROPOUT = 4
    PRIOR_LABELS = 7
    BIT_NOISE = 8
    NUM_TOKENS = 9
    CONTINUED = 10


def generator_for(*key: int) -> torch.Generator:
    """A CPU random generator that is a function of these numbers alone."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def _philox(seed: int, half: int) -> np.random.Generator:
    """Philox (Salmon et al., 2011) with the key (seed, half)."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed} is out of range; allowed are 0 .. 2**63 - 1")
    return np.random.Generator(np.random.Philox(key=[seed, half]))


def uniforms(seeds: Sequence[int], num_channels: int) -> Tensor:
    """One number in [0, 1) for each image and position: (b C) float64, on the CPU.

    Entry (i, j) is a function of seeds[i] and j alone, so an image does not depend on its neighbours, on the number of
    tokens, or on when sampling was stopped.
    """
    return torch.from_numpy(np.stack([_philox(seed, 0).random(num_channels) for seed in seeds]))


def normals(seeds: Sequence[int], *shape: int) -> Tensor:
    """Standard normal numbers, a block for each seed and a function of it alone: (b *shape) float32, on the CPU.

    Independent of `uniforms` of the same seeds.
    """
    return torch.from_numpy(np.stack([_philox(seed, 1).standard_normal(shape, np.float32) for seed in seeds]))
