"""What bounds a sampler: the bytes that a token must read, and how fast memory gives them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.measuring import synchronize
from generator.model import ChannelGPT

PROBE_BYTES = 512 * 2**20  # well beyond any cache
PASSES = 3  # of each way in one probe
STREAMS = 4


# -------------------------------------------------------------------------------------- bytes of a token


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """Bytes that a step must read at least.

    `fixed`: the blocks, the last norm, and what belongs to one channel of the maps of bits and of the linear prior.
    `per_position`: keys and values of one earlier position, all layers and sequences.
    """

    fixed: int
    per_position: int

    def mean(self, num_tokens: int) -> float:
        """Mean over the first `num_tokens` steps; step i, counted from 0, reads i earlier positions."""
        return self.fixed + self.per_position * (num_tokens - 1) / 2


def token_bytes(model: ChannelGPT, images: int, sequences: int) -> TokenBytes:
    """Count for `images` drawn together, `sequences` rows (with guidance two for each image), in the model's dtype.

    Of the triangular prior the mean over all channels is counted.
    """
    config, size = model.config, model.dtype.itemsize
    blocks = sum(parameter.nbytes for part in (*model.blocks, model.norm) for parameter in part.parameters())
    maps = sum(layer.shared.numel() for layer in (model.read_bits, model.bit_head)) + model.pair_head.weight.numel()
    vectors = (1 + sequences) * (config.hidden_size + config.num_bits)
    prior = model.prior.weight.numel() // config.num_channels + images * config.num_bits * config.num_channels
    fixed = blocks + 4 * (maps + vectors + prior)
    return TokenBytes(fixed=fixed, per_position=2 * config.num_layers * sequences * config.hidden_size * size)


# -------------------------------------------------------------------------------------- bandwidth


def _product_and_sum(blocks: Tensor, vector: Tensor) -> Tensor:
    """Blocks (4 rows n), vector (n,) -> (rows,): one loop that reads four places of memory at a time."""
    return (blocks[0] * vector + blocks[1] * vector + blocks[2] * vector + blocks[3] * vector).sum(-1)


@dataclass(kw_only=True)
class BandwidthProbe:
    """Measures how fast this machine reads memory, in GB/s (10**9), by several plain ways.

    Call it before, between and after what is judged by it: a shared machine does not give the same all
    the time. No way is the truth; the best of all is the nearest to what the memory can give.
    """

    device: torch.device
    compiled: bool
    found: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vector = torch.ones(2048, device=self.device)
        values = torch.ones(PROBE_BYTES // 4, device=self.device)
        matrix = values.view(-1, 2048)
        blocks = values.view(STREAMS, -1, 2048)
        self._ways: dict[str, Callable[[], Tensor]] = {"sum": values.sum, "matrix-vector": lambda: matrix @ vector}
        if self.compiled:
            read = torch.compile(_product_and_sum)
            self._ways["compiled product and sum"] = lambda: read(blocks, vector)
        for name, way in self._ways.items():
            way()
            self.found[name] = []

    def measure(self) -> None:
        """Read the whole memory block a few times by each way; the fastest pass of each is noted."""
        for name, way in self._ways.items():
            seconds = []
            for _ in range(PASSES):
                synchronize(self.device)
                start = time.perf_counter()
                way()
                synchronize(self.device)
                seconds.append(time.perf_counter() - start)
            self.found[name].append(PROBE_BYTES / min(seconds) / 1e9)

    @property
    def best(self) -> float:
        """The fastest read of all ways and times, GB/s."""
        return max(max(values) for values in self.found.values())

    @property
    def median(self) -> float:
        """The median over times of the best way of each time, GB/s."""
        return statistics.median(max(values) for values in zip(*self.found.values(), strict=True))
