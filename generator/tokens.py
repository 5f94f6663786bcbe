"""The token store: the one place that knows its files.

    store.json              what it holds: tokenizer fingerprint, sizes, class names, views, splits
    tokenizer/              the tokenizer that made it
    train-00000.tokens.npy  (rows, views, C) uint16
    train-00000.labels.npy  (rows,) int64
    train-00000.json        rows, checksums, files left out; it comes last, so a shard that has it is whole

A shard covers a fixed range of the split's files, so any shard can be written, or written again, alone.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.checkpoint import read_json, write_text, written_whole
from common.errors import InputError

VERSION = 1
VIEWS = ("none", "flip")
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What a token store holds. Every shard of it was made with exactly these settings.

    split_files and listings give, for each split, the number of image files and the fingerprint of
    their listing; shard_size is the number of files that a shard covers.
    """

    tokenizer_fingerprint: str
    num_channels: int
    num_bits: int
    class_names: list[str]
    views: str
    shard_size: int
    split_files: dict[str, int]
    listings: dict[str, str]
    version: int = field(default=VERSION)

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise InputError(f"the token store has version {self.version}; this program reads {VERSION}: extract again")
        if self.views not in VIEWS:
            raise InputError(f"views is {self.views!r}; allowed: {', '.join(VIEWS)}")
        if self.shard_size < 1:
            raise InputError(f"shard_size is {self.shard_size}; it must be at least 1")

    @property
    def num_views(self) -> int:
        """Token sequences stored for each image."""
        return {"none": 1, "flip": 2}[self.views]

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 .. num_classes - 1."""
        return len(self.class_names)

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return int(2**self.num_bits)

    def num_shards(self, split: str) -> int:
        """How many shards the split has when it is complete."""
        return -(-self.split_files[split] // self.shard_size)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenStore:
    """A folder of tokens. `create` starts or continues one, `open` reads a complete one."""

    def __init__(self, folder: str | Path, header: StoreHeader):
        self.folder = Path(folder)
        self.header = header

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer that made the store lies."""
        return self.folder / "tokenizer"

    @classmethod
    def create(cls, folder: str | Path, header: StoreHeader) -> Self:
        """Start a store, or continue one that was begun with the same settings.

        Raises:
            InputError: the folder holds a store of another tokenizer, or of other images or settings.
        """
        folder = Path(folder)
        path = folder / "store.json"
        if path.exists():
            there, wanted = asdict(cls.peek(folder)), asdict(header)
            for name in wanted:
                if there[name] != wanted[name]:
                    raise InputError(
                        f"{folder} holds tokens made with {name} = {str(there[name])[:60]}, asked for is "
                        f"{str(wanted[name])[:60]}; choose another output_dir or remove that one"
                    )
        else:
            write_text(path, json.dumps(asdict(header), indent=1))
        return cls(folder, header)

    @staticmethod
    def peek(folder: str | Path) -> StoreHeader:
        """Read what a store holds, complete or not."""
        content = read_json(Path(folder) / "store.json")
        try:
            return StoreHeader(**content)
        except TypeError as error:
            raise InputError(
                f"{folder}/store.json is not a token store's ({error}); extract the tokens again"
            ) from error

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a complete store.

        Raises:
            InputError: no store, or one that is not complete.
        """
        store = cls(folder, cls.peek(folder))
        for split in SPLITS:
            missing = [i for i in range(store.header.num_shards(split)) if not store.has_shard(split, i)]
            if missing:
                raise InputError(
                    f"{folder} is not complete: {len(missing)} of {store.header.num_shards(split)} {split} shards "
                    "are missing; run extract_tokens.py again, it goes on where it stopped"
                )
        return store

    def _path(self, split: str, shard: int, ending: str) -> Path:
        return self.folder / f"{split}-{shard:05d}.{ending}"

    def left_out(self) -> list[str]:
        """A line for each image file that could not be read, over all shards."""
        shards = [(split, i) for split in SPLITS for i in range(self.header.num_shards(split))]
        return [line for split, i in shards for line in read_json(self._path(split, i, "json"))["left_out"]]

    def has_shard(self, split: str, shard: int) -> bool:
        """Whether a shard is there, whole."""
        return self._path(split, shard, "json").is_file()

    def write_shard(self, split: str, shard: int, tokens: Tensor, labels: Tensor, left_out: Sequence[str]) -> None:
        """Write one shard.

        Args:
            split: "train" or "val".
            shard: its number.
            tokens: (rows, views, C) integers in [0, codebook_size).
            labels: (rows,) integers in [0, num_classes).
            left_out: a line for each file of the shard's range that could not be read.
        """
        header = self.header
        if tokens.shape != (len(labels), header.num_views, header.num_channels):
            raise InputError(f"tokens of a shard are {tuple(tokens.shape)}; (rows, views, C) was expected")
        arrays: dict[str, npt.NDArray[Any]] = {
            "tokens": tokens.cpu().numpy().astype(np.uint16), "labels": labels.cpu().numpy().astype(np.int64)
        }  # fmt: skip
        record: dict[str, Any] = {"rows": len(labels), "left_out": list(left_out)}
        for name, array in arrays.items():
            path = self._path(split, shard, f"{name}.npy")
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.save(file, array)
            record[name] = _checksum(path)
        write_text(self._path(split, shard, "json"), json.dumps(record, indent=1))

    def read_shard(self, split: str, shard: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """Tokens (rows, views, C), memory-mapped, and labels (rows,) of a shard, checked against its checksums.

        Raises:
            InputError: a file is missing, or has changed since it was written, or holds impossible values.
        """
        record = read_json(self._path(split, shard, "json"))
        for name in ("tokens", "labels"):
            path = self._path(split, shard, f"{name}.npy")
            if not path.is_file() or _checksum(path) != record[name]:
                raise InputError(
                    f"{path} is missing or damaged; remove {self._path(split, shard, 'json').name} and run "
                    "extract_tokens.py again to write this shard anew"
                )
        tokens = np.load(self._path(split, shard, "tokens.npy"), mmap_mode="r", allow_pickle=False)
        labels = np.load(self._path(split, shard, "labels.npy"), allow_pickle=False)
        if tokens.size and int(tokens.max()) >= self.header.codebook_size:
            raise InputError(f"{self.folder}: {split} shard {shard} holds tokens beyond the codebook; extract it again")
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < self.header.num_classes:
            raise InputError(f"{self.folder}: {split} shard {shard} holds labels outside the classes; extract it again")
        return tokens, labels


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """tokens (b C) int64 and labels (b,) int64."""

    tokens: Tensor
    labels: Tensor

    def pin_memory(self) -> "TokenBatch":
        """The same in memory that a GPU can fetch from; torch's loader asks for it."""
        return TokenBatch(tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())


class TokenDataset(Dataset[tuple[Tensor, int]]):
    """One split of a store, by (index, epoch); the view shown is a function of seed, index and epoch.

    With `seed` None it is always the first view, the image as it is.
    """

    def __init__(self, store: TokenStore, split: str, seed: int | None):
        self.store, self.split, self.seed = store, split, seed
        shards = range(store.header.num_shards(split))
        rows = [read_json(store.folder / f"{split}-{shard:05d}.json")["rows"] for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        if not len(self):
            raise InputError(f"{store.folder} has no {split} tokens; extract tokens of more images")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _shards(self) -> dict[int, tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]]:
        return {}

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, epoch = key
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if shard not in self._shards:
            self._shards[shard] = self.store.read_shard(self.split, shard)
        tokens, labels = self._shards[shard]
        row = index - int(self._starts[shard])
        view = 0
        if self.seed is not None and self.store.header.num_views > 1:
            state = np.random.SeedSequence((self.seed, index, epoch)).generate_state(1)
            view = int(state[0]) % self.store.header.num_views
        return torch.from_numpy(tokens[row, view].astype(np.int64)), int(labels[row])

    def counts(self) -> Tensor:
        """How often each token stands at each position, over all views: (C, codebook_size) int64."""
        header = self.store.header
        found = np.zeros((header.num_channels, header.codebook_size), dtype=np.int64)
        for shard in range(header.num_shards(self.split)):
            tokens, _ = self.store.read_shard(self.split, shard)
            for position in range(header.num_channels):
                found[position] += np.bincount(tokens[:, :, position].ravel(), minlength=header.codebook_size)
        return torch.from_numpy(found)


def collate_tokens(samples: Sequence[tuple[Tensor, int]]) -> TokenBatch:
    """Stack entries of a `TokenDataset`."""
    return TokenBatch(
        tokens=torch.stack([tokens for tokens, _ in samples]), labels=torch.tensor([label for _, label in samples])
    )
