"""Reading a token store for training: whole batches, in any order, in bounded memory."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import InputError
from generator.tokens import TokenStore

CHECKED_TOGETHER = 4  # shards, each by a thread
SHARDS_OPEN = 192  # some systems grant a process 256 open files


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

    Rows are read, not mapped: a page of a map counts as the process's memory, and Linux maps up to 2 MB of
    its neighbours along with it, so that a batch of 256 rows of half a kilobyte each took 200 MB.

    Raises:
        InputError: the split is empty; later, a shard that has changed since it was written.
    """

    def __init__(self, store: TokenStore, split: str, seed: int | None):
        self.store, self.split, self.seed = store, split, seed
        rows = [store.record(split, shard).rows for shard in range(store.header.num_shards(split))]
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._labels: dict[int, npt.NDArray[np.int64]] = {}  # of the shards that have been checked
        self._files: dict[int, tuple[FileIO, int]] = {}
        self._process = os.getpid()
        self._views: dict[int, npt.NDArray[np.uint8]] = {}
        if not len(self):
            raise InputError(f"{store.folder} has no {split} tokens; extract tokens of more images")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # an open file cannot be sent to another process

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> TokenBatch:
        """The rows of these (index, epoch), in their order."""
        indices, epochs = np.asarray(keys, dtype=np.int64).T
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[shards]
        labels = np.empty(len(keys), dtype=np.int64)
        touched = np.unique(shards).tolist()
        self._check(touched)
        for shard in touched:
            there = shards == shard
            labels[there] = self._labels[shard][rows[there]]
        header = self.store.header
        places = rows * header.num_views(self.split) + self._views_of(indices, epochs)
        tokens = np.empty((len(keys), header.num_channels), dtype=np.uint16)
        for row, shard, place in zip(tokens, shards.tolist(), places.tolist(), strict=True):
            file, start = self._file(shard)
            file.seek(start + place * row.nbytes)
            if file.readinto(row.data) != row.nbytes:
                raise InputError(f"{file.name!s} was cut short while it was read; copy or extract the store again")
        return TokenBatch(tokens=torch.from_numpy(tokens.astype(np.int64)), labels=torch.from_numpy(labels))

    def _file(self, shard: int) -> tuple[FileIO, int]:
        if self._process != os.getpid():  # a worker that was forked: it would share the place where a file is read
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            if len(self._files) >= SHARDS_OPEN:
                self._files.clear()  # which closes them
            self._files[shard] = self.store.open_tokens(self.split, shard)
        return self._files[shard]

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

    def _check(self, shards: Sequence[int]) -> None:
        """Check those that have not been, and keep their labels; a first batch may touch all there are."""
        new = [shard for shard in shards if shard not in self._labels]
        if not new:
            return
        with ThreadPoolExecutor(CHECKED_TOGETHER) as pool:
            for shard, found in zip(new, pool.map(partial(self.store.problems, self.split), new), strict=True):
                if found:
                    raise InputError(found[0])
                self._labels[shard] = self.store.read_labels(self.split, shard)

    def counts(self) -> Tensor:
        """How often each token stands at each position, over all views: (C, codebook_size) int64."""
        header = self.store.header
        found = np.zeros((header.num_channels, header.codebook_size), dtype=np.int64)
        for shard in tqdm(range(header.num_shards(self.split)), desc="tokens counted", delay=2, leave=False):
            self._check([shard])
            tokens = self.store.read_tokens(self.split, shard)
            for position, column in enumerate(np.ascontiguousarray(rearrange(tokens, "r v c -> c (r v)"))):
                found[position] += np.bincount(column, minlength=header.codebook_size)
        return torch.from_numpy(found)


def whole_batch(batch: Any) -> TokenBatch:
    """The collate_fn of a `TokenDataset`'s loader: there is nothing left to put together."""
    read: TokenBatch = batch
    return read
