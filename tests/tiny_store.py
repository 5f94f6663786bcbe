"""A store of a dozen rows, and what it holds, for the tests of the token store and of its readers."""

import numpy as np
import torch

from generator.tokens import StoreHeader, TokenStore

C, CODES, CLASSES = 4, 8, 3
TRAIN_ROWS, VAL_ROWS = [5, 4, 2], [3]  # files 5 + 5 + 2, one of the second shard could not be read


def header(**changes: object) -> StoreHeader:
    values = {
        "tokenizer_fingerprint": "0123456789abcdef",
        "num_channels": C,
        "num_bits": 3,
        "class_names": ["a", "b", "c"],
        "views": "flip",
        "shard_size": 5,
        "split_files": {"train": 12, "val": 3},
        "listings": {"train": "x", "val": "y"},
    }
    return StoreHeader(**(values | changes))


def content(split: str, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, 2 or 1, C) and labels (rows,) of a shard."""
    rows, views = {"train": (TRAIN_ROWS, 2), "val": (VAL_ROWS, 1)}[split]
    rng, shape = np.random.default_rng([len(split), shard]), (rows[shard], views, C)
    return torch.from_numpy(rng.integers(0, CODES, shape)), torch.from_numpy(rng.integers(0, CLASSES, shape[0]))


def fill(store: TokenStore, leave: tuple[tuple[str, int], ...] = ()) -> TokenStore:
    for split, rows in (("train", TRAIN_ROWS), ("val", VAL_ROWS)):
        for shard in range(len(rows)):
            if (split, shard) not in leave:
                store.write_shard(split, shard, *content(split, shard), ["n/x.jpg: cut"] if rows[shard] == 4 else [])
    return store


def everything() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of all of train."""
    tokens, labels = (torch.cat(part) for part in zip(*(content("train", i) for i in range(3)), strict=True))
    return tokens, labels
