"""Reading a token store for training: whole batches, in any order, from mapped memory."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from common.config import InputError
from generator.tokens import TokenStore

SHARDS_OPEN = 192  # a mapped file stays open, and some systems allow a process 256 open files


class TokenBatch(NamedTuple):
    """tokens (b C) int64 and labels (b,) int64."""

    tokens: Tensor
    labels: Tensor


@lru_cache(maxsize=4)  # a batch may span two epochs
def _drawn_views(seed: int, epoch: int, count: int, rows: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng((seed, 5, epoch)).integers(count, size=rows, dtype=np.uint8)


class TokenDataset(Dataset[TokenBatch]):
    """One split of a store, by (index, epoch); the view of an image is a function of seed, index and epoch.

    torch's loader asks it for whole batches; give it `whole_batch` as collate_fn. All shards are checked
    when it is made. With `seed` None the view is always the first.

    Raises:
        InputError: the split is empty, or a shard has changed since it was written.
    """

    def __init__(self, store: TokenStore, split: str, seed: int | None):
        self.store, self.split, self.seed = store, split, seed
        shards = tqdm(range(store.header.num_shards(split)), desc=f"{split} shards checked", delay=2, leave=False)
        labels = [store.read_shard(split, shard)[1] for shard in shards]
        self._starts = np.cumsum([0, *map(len, labels)])
        if not len(self):
            raise InputError(f"{store.folder} has no {split} tokens; extract tokens of more images")
        self._labels = np.concatenate(labels)
        self._tokens = lru_cache(SHARDS_OPEN)(partial(store.map_tokens, split))

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process that is not forked maps the files itself
        return TokenDataset, (self.store, self.split, self.seed)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> TokenBatch:
        """Read the rows of these (index, epoch), in their order."""
        indices, epochs = np.asarray(keys, dtype=np.int64).T
        header, views = self.store.header, np.zeros_like(indices)
        for epoch in np.unique(epochs).tolist() if self.seed is not None else ():
            there = epochs == epoch
            views[there] = _drawn_views(self.seed, epoch, header.num_views(self.split), len(self))[indices[there]]
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        tokens = np.empty((len(keys), header.num_channels), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            there = shards == shard
            tokens[there] = self._tokens(shard)[indices[there] - self._starts[shard], views[there]]
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(self._labels[indices]))

    def counts(self) -> Tensor:
        """Count each token at each position, over all views: (C, codebook_size) int64."""
        header = self.store.header
        found = np.zeros((header.num_channels, header.codebook_size), dtype=np.int64)
        for shard in tqdm(range(header.num_shards(self.split)), desc="tokens counted", delay=2, leave=False):
            for position, column in enumerate(np.ascontiguousarray(rearrange(self._tokens(shard), "r v c -> c (r v)"))):
                found[position] += np.bincount(column, minlength=header.codebook_size)
        return torch.from_numpy(found)


def whole_batch(batch: TokenBatch) -> TokenBatch:
    """Return the batch: the collate_fn of a `TokenDataset`'s loader, which reads whole batches."""
    return batch
