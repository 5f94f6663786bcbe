"""Reading a token store for training: whole batches, in any order, in bounded memory."""

import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import InputError
from generator.tokens import TokenStore

# A page that has been read counts as this process's memory, and the kernel maps its 15 neighbours along with it:
# after this many rows, 64 MB at most, all are let go. They stay in the page cache.
ROWS_MAPPED = 1024
SHARDS_MAPPED = 192  # each holds a file open, of which some systems grant 256


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """tokens (b C) int64 and labels (b,) int64."""

    tokens: Tensor
    labels: Tensor

    def pin_memory(self) -> "TokenBatch":
        """The same in memory that a GPU can fetch from; torch's loader asks for it."""
        return TokenBatch(tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())


class TokenDataset(Dataset[TokenBatch]):
    """One split of a store, by (index, epoch); the view shown is a function of seed, index and epoch.

    torch's loader asks it for whole batches; give it `whole_batch` as collate_fn. A shard is checked before
    the first of its rows is used, once in each process; one that a process has checked is known to the
    workers that start after that. With `seed` None it is always the first view.

    Raises:
        InputError: the split is empty; later, a shard that has changed since it was written.
    """

    def __init__(self, store: TokenStore, split: str, seed: int | None):
        self.store, self.split, self.seed = store, split, seed
        rows = [store.record(split, shard).rows for shard in range(store.header.num_shards(split))]
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._labels: dict[int, npt.NDArray[np.int64]] = {}  # of the shards that have been checked
        self._mapped: dict[int, tuple[mmap.mmap, npt.NDArray[np.uint16]]] = {}
        self._rows_mapped = 0
        self._views: dict[int, npt.NDArray[np.uint8]] = {}
        if not len(self):
            raise InputError(f"{store.folder} has no {split} tokens; extract tokens of more images")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # a map cannot be sent to another process, which makes its own

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> TokenBatch:
        """The rows of these (index, epoch), in their order."""
        indices, epochs = np.asarray(keys, dtype=np.int64).T
        views = self._views_of(indices, epochs)
        tokens = np.empty((len(keys), self.store.header.num_channels), dtype=np.int64)
        labels = np.empty(len(keys), dtype=np.int64)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(shards, kind="stable")
        for there in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            shard = int(shards[there[0]])
            rows = indices[there] - self._starts[shard]
            labels[there] = self._checked_labels(shard)[rows]
            tokens[there] = self._tokens(shard)[rows, views[there]]
        self._rows_mapped += len(keys)
        if self._rows_mapped >= ROWS_MAPPED:
            self._let_go()
        return TokenBatch(tokens=torch.from_numpy(tokens), labels=torch.from_numpy(labels))

    def _views_of(self, indices: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        views = np.zeros_like(indices)
        count = self.store.header.num_views(self.split)
        if self.seed is None or count == 1:
            return views
        for epoch in np.unique(epochs).tolist():
            if epoch not in self._views:
                while len(self._views) > 1:  # a batch may lie across two epochs
                    self._views.pop(next(iter(self._views)))
                rng = np.random.default_rng((self.seed, 5, epoch))
                self._views[epoch] = rng.integers(count, size=len(self), dtype=np.uint8)
            there = epochs == epoch
            views[there] = self._views[epoch][indices[there]]
        return views

    def _checked_labels(self, shard: int) -> npt.NDArray[np.int64]:
        if shard not in self._labels:
            if found := self.store.problems(self.split, shard):
                raise InputError(found[0])
            self._labels[shard] = self.store.read_labels(self.split, shard)
        return self._labels[shard]

    def _tokens(self, shard: int) -> npt.NDArray[np.uint16]:
        if shard not in self._mapped:
            if len(self._mapped) >= SHARDS_MAPPED:
                self._mapped.clear()
            mapping, tokens = self.store.map_tokens(self.split, shard)
            if sys.platform != "win32":
                mapping.madvise(mmap.MADV_RANDOM)
            self._mapped[shard] = mapping, tokens
        return self._mapped[shard][1]

    def _let_go(self) -> None:
        self._rows_mapped = 0
        if sys.platform == "win32":  # there is no advice to give
            self._mapped.clear()
            return
        for mapping, _ in self._mapped.values():
            mapping.madvise(mmap.MADV_DONTNEED)

    def counts(self) -> Tensor:
        """How often each token stands at each position, over all views: (C, codebook_size) int64."""
        header = self.store.header
        found = np.zeros((header.num_channels, header.codebook_size), dtype=np.int64)
        for shard in range(header.num_shards(self.split)):
            self._checked_labels(shard)
            _, tokens = self.store.map_tokens(self.split, shard)
            for position, column in enumerate(np.ascontiguousarray(rearrange(tokens, "r v c -> c (r v)"))):
                found[position] += np.bincount(column, minlength=header.codebook_size)
        return torch.from_numpy(found)


def whole_batch(batch: Any) -> TokenBatch:
    """The collate_fn of a `TokenDataset`'s loader: there is nothing left to put together."""
    read: TokenBatch = batch
    return read
