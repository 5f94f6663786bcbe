"""Which codes occur, and how evenly."""

import math
from typing import Any

import torch
from torch import Tensor


class CodebookCounts:
    """How often each channel has taken each code: (C, codebook_size) int32, for fewer than 2**31 images."""

    def __init__(self, num_channels: int, codebook_size: int, device: torch.device):
        self.counts = torch.zeros(num_channels, codebook_size, dtype=torch.int32, device=device)
        self.images = 0
        self._first = torch.arange(num_channels, device=device) * codebook_size  # of each channel's row, flat

    def add(self, tokens: Tensor) -> None:
        """Count tokens (b C), integers in [0, codebook_size)."""
        places = (tokens + self._first).flatten()
        self.counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        self.images += len(tokens)

    def use(self, num_tokens: int) -> float:
        """Share of the codes that occur at least once among the first `num_tokens` channels, in (0, 1]."""
        occurs = torch.zeros_like(self.counts[0], dtype=torch.bool)
        for row in self.counts[:num_tokens]:  # row by row: the table may fill a quarter of a GB
            occurs |= row > 0
        return int(occurs.sum()) / len(occurs)

    def summary(self) -> dict[str, Any]:
        """What occurs over all channels, and channel by channel.

        codes: 2**num_bits. tokens_counted: images * C. use: share of the codes that occur anywhere.
        by_channel: `use`, share of the codes that occur in a channel; `entropy_bits`, of a channel's distribution.
        limit_by_channel: what N images can show at most: of `use` min(1, N / codes), of `entropy_bits` its logarithm.
        """
        channels, codes = self.counts.shape
        entropies, shares = [], []
        for row in self.counts.cpu():
            odds = row[row > 0].double() / self.images
            entropies.append(abs(float(-(odds * odds.log2()).sum())))
            shares.append(len(odds) / codes)
        seen = min(self.images, codes)
        return {
            "codes": codes,
            "tokens_counted": self.images * channels,
            "use": self.use(channels),
            "by_channel": {"use": shares, "entropy_bits": entropies},
            "limit_by_channel": {"use": seen / codes, "entropy_bits": math.log2(seen)},
        }
