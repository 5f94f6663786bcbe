"""What bounds a sampler: the bytes that a token must read, and the bandwidth of the memory."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.measuring import synchronize
from generator.model import ChannelGPT

PROBE_BYTES = 512 * 2**20  # well beyond any cache
PASSES = 3


def bytes_per_token(model: ChannelGPT, sequences: int, num_tokens: int) -> float:
    """Bytes that a step must read at least, mean over the first `num_tokens` steps with `sequences` rows in each.

    Counted are the weights of the blocks, once, and in step i, from 0, the keys and values of i earlier positions.
    """
    weights = sum(parameter.nbytes for parameter in model.blocks.parameters())
    position = 2 * model.config.num_layers * sequences * model.config.hidden_size * model.dtype.itemsize
    return weights + position * (num_tokens - 1) / 2


def read_bandwidth(device: torch.device) -> float:
    """Measure how fast this device reads its memory, in GB/s (10**9): the fastest pass of two plain ways."""
    values = torch.ones(PROBE_BYTES // 4, device=device)
    matrix, vector = values.view(-1, 2048), torch.ones(2048, device=device)
    ways: list[Callable[[], Tensor]] = [values.sum, lambda: matrix @ vector]
    seconds = []
    for way in ways:
        for _ in range(1 + PASSES):
            synchronize(device)
            start = time.perf_counter()
            way()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return PROBE_BYTES / min(seconds) / 1e9
