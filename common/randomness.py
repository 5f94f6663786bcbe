"""Random numbers as functions of a key, so that no generator's state is ever kept."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError


class Stream(IntEnum):
    """Random streams of a training run: the second element of the key of `generator_for`.

    Number 5 belongs to `generator.token_data`, which draws views with NumPy.
    """

    ORDER = 1
    STEP = 2
    AUGMENTATION = 3
    DROPOUT = 4
    PREFIX_LENGTH = 6
    PRIOR_LABELS = 7
    BIT_NOISE = 8
    NUM_TOKENS = 9
    CONTINUED = 10


def generator_for(*key: int) -> torch.Generator:
    """A CPU random generator that is a function of these numbers alone."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def uniforms(seeds: Sequence[int], num_channels: int) -> Tensor:
    """One number in [0, 1) for each image and position: (b C) float64, on the CPU.

    Entry (i, j) is a function of seeds[i] and j alone (Philox, Salmon et al., 2011), so a picture does
    not depend on its neighbours, on the number of tokens asked for, or on when drawing was stopped.

    Raises:
        InputError: a seed outside [0, 2**63).
    """
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise InputError(f"seed {seed} is out of range; allowed are 0 .. 2**63 - 1")
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(num_channels) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def normals(seeds: Sequence[int], *shape: int) -> Tensor:
    """Standard normal numbers, a block for each seed and a function of it alone: (b *shape) float32, on the CPU.

    Independent of `uniforms` of the same seeds.

    Raises:
        InputError: a seed outside [0, 2**63).
    """
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise InputError(f"seed {seed} is out of range; allowed are 0 .. 2**63 - 1")
    # the upper half of Philox's key is 0 in `uniforms`
    rows = [np.random.Generator(np.random.Philox(key=[seed, 1])).standard_normal(shape, np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))
