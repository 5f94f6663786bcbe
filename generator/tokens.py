"""The token store: the one module that reads and writes its files.

    store.json              header: fingerprint of the tokenizer, sizes, class names, views, splits
    tokenizer/              the tokenizer that made it
    train-00000.tokens.npy  (rows, views, C) uint16
    train-00000.labels.npy  (rows,) int64
    train-00000.json        rows, checksums, fingerprint, unreadable files; written last, so a shard with it is complete

A shard covers a fixed range of the split's files, so each shard can be written, or written again, alone.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from common.config import Config, InputError, setting
from common.files import read_json, write_text, written_whole

VERSION = 2
VIEWS = {"none": 1, "flip": 2, "ten-crop": 10}  # token sequences of each image of train
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
FORMATS = {"tokens": np.uint16, "labels": np.int64}  # of the arrays of a shard


@dataclass(frozen=True, kw_only=True)
class StoreHeader(Config):
    """Settings that all shards of a token store share.

    split_files, listings: for each split the number of image files and the fingerprint of their listing.
    shard_size: number of files that a shard covers.
    """

    tokenizer_fingerprint: str
    num_channels: int = setting(ge=1, le=2**16)
    num_bits: int = setting(ge=1, le=16)
    class_names: list[str]
    views: Literal["none", "flip", "ten-crop"]
    shard_size: int = setting(ge=1, le=10**8)
    split_files: dict[str, int]
    listings: dict[str, str]
    version: int = VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version != VERSION:
            raise InputError(f"the token store has version {self.version}; this program reads {VERSION}: extract again")
        if not set(SPLITS) == set(self.split_files) == set(self.listings) or min(self.split_files.values()) < 0:
            raise InputError(f"split_files and listings must have an entry for each of {', '.join(SPLITS)}")

    def num_views(self, split: str) -> int:
        """Token sequences of each image; val has one, of the unchanged image."""
        return VIEWS[self.views] if split == "train" else 1

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 .. num_classes - 1."""
        return len(self.class_names)

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return int(2**self.num_bits)

    def num_shards(self, split: str) -> int:
        """Shards of the complete split."""
        return -(-self.split_files[split] // self.shard_size)

    def shards(self) -> list[tuple[Split, int]]:
        """All shards of a complete store, (split, number), in the order in which they are made."""
        return [(split, shard) for split in SPLITS for shard in range(self.num_shards(split))]

    def shard_files(self, split: str, shard: int) -> range:
        """Files that a shard covers, by their place in the split."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.split_files[split]))


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Config):
    """Content of a shard's JSON file; tokens and labels are the sha256 of the two arrays' files."""

    rows: int
    left_out: list[str]
    tokenizer_fingerprint: str
    tokens: str
    labels: str


class TokenStore:
    """A folder of tokens. `create` starts or continues one, `open` reads a complete one."""

    def __init__(self, folder: str | Path, header: StoreHeader):
        self.folder = Path(folder)
        self.header = header

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer that made the store."""
        return self.folder / "tokenizer"

    @classmethod
    def create(cls, folder: str | Path, header: StoreHeader, write: bool = True) -> Self:
        """Start a store, or continue one with the same settings; of several processes only one gives `write`.

        Raises:
            InputError: the folder holds a store of another tokenizer, or of other images or settings.
        """
        folder, path = Path(folder), Path(folder) / "store.json"
        if path.exists():
            there, wanted = asdict(cls.peek(folder)), asdict(header)
            for name in wanted:
                if there[name] != wanted[name]:
                    raise InputError(
                        f"{folder} holds tokens made with {name} = {str(there[name])[:60]}, requested is "
                        f"{str(wanted[name])[:60]}; choose another output_dir or remove that one"
                    )
        if write:
            for abandoned in folder.glob(".*.partial"):  # by processes that were killed while they wrote
                shutil.rmtree(abandoned) if abandoned.is_dir() else abandoned.unlink()
            if not path.exists():
                write_text(path, json.dumps(asdict(header), indent=1))
        return cls(folder, header)

    @staticmethod
    def peek(folder: str | Path) -> StoreHeader:
        """Read the header of a store, complete or not; an InputError where there is none or a damaged one."""
        path = Path(folder) / "store.json"
        return StoreHeader.from_file(read_json(path), path)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a complete store.

        Raises:
            InputError: no store, an incomplete one, or a shard of another tokenizer or of other files.
        """
        store = cls(folder, cls.peek(folder))
        shards = store.header.shards()
        if missing := sum(not store.has_shard(split, shard) for split, shard in shards):
            raise InputError(
                f"{folder} is not complete: {missing} of {len(shards)} shards are missing; "
                "run extract_tokens.py again to continue"
            )
        for split, shard in shards:
            store.record(split, shard)
        return store

    def _path(self, split: str, shard: int, ending: str) -> Path:
        return self.folder / f"{split}-{shard:05d}.{ending}"

    def has_shard(self, split: str, shard: int) -> bool:
        """Return whether a shard was written completely."""
        return self._path(split, shard, "json").is_file()

    def left_out(self) -> list[str]:
        """A line for each image file that could not be read, over all shards."""
        return [line for split, shard in self.header.shards() for line in self.record(split, shard).left_out]

    def record(self, split: str, shard: int) -> ShardRecord:
        """Read a shard's JSON file.

        Raises:
            InputError: it is missing or damaged, is of another tokenizer, or does not account for the shard's files.
        """
        files, expected = len(self.header.shard_files(split, shard)), self.header.tokenizer_fingerprint
        path = self._path(split, shard, "json")
        record = ShardRecord.from_file(read_json(path), path)
        if record.tokenizer_fingerprint != expected:
            problem = f"is of the tokenizer {record.tokenizer_fingerprint}, the store is of {expected}"
            raise self._refusal(split, shard, "json", problem)
        if record.rows + len(record.left_out) != files:
            problem = f"has {record.rows} rows and {len(record.left_out)} files left out, but covers {files} files"
            raise self._refusal(split, shard, "json", problem)
        return record

    def _refusal(self, split: str, shard: int, ending: str, problem: str) -> InputError:
        remedy = f"remove {split}-{shard:05d}.json and run extract_tokens.py again to write this shard again"
        return InputError(f"{self._path(split, shard, ending)} {problem}; {remedy}")

    def _problem(self, split: str, name: str, array: npt.NDArray[Any], rows: int) -> str | None:
        """What is wrong with the tokens (rows, views, C) or labels (rows,) of a shard."""
        header = self.header
        shape: tuple[int, ...] = (rows,)
        limit = header.num_classes
        if name == "tokens":
            shape, limit = (rows, header.num_views(split), header.num_channels), header.codebook_size
        if array.shape != shape:
            return f"have the shape {array.shape}; {shape} was expected"
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < limit:
            return f"lie outside of 0 to {limit - 1}"
        return None

    def write_shard(self, split: str, shard: int, tokens: Tensor, labels: Tensor, left_out: Sequence[str]) -> None:
        """Write tokens (rows, views, C) and labels (rows,); `left_out` has a line for each file that was not read.

        Raises:
            InputError: shapes or values other than these.
        """
        fingerprint = self.header.tokenizer_fingerprint
        record = {"rows": len(labels), "left_out": list(left_out), "tokenizer_fingerprint": fingerprint}
        arrays = {"tokens": tokens.cpu().numpy(), "labels": labels.cpu().numpy()}
        for name, array in arrays.items():
            if problem := self._problem(split, name, array, len(labels)):
                raise InputError(f"{split} shard {shard} was to hold {name} that {problem}")
        for name, array in arrays.items():
            path = self._path(split, shard, f"{name}.npy")
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.save(file, array.astype(FORMATS[name], order="C"))
            record[name] = _sha256(path)
        write_text(self._path(split, shard, "json"), json.dumps(record, indent=1))

    def map_tokens(self, split: str, shard: int) -> npt.NDArray[np.uint16]:
        """Map the tokens (rows, views, C) of a shard into memory, read-only and not checked."""
        tokens: npt.NDArray[np.uint16] = np.load(self._path(split, shard, "tokens.npy"), mmap_mode="r")
        return tokens

    def read_shard(self, split: str, shard: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """Read and check a shard: tokens (rows, views, C), mapped into memory, and labels (rows,).

        Raises:
            InputError: a file is missing, has changed since it was written, or holds impossible values.
        """
        record = self.record(split, shard)
        found: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in FORMATS.items():
            path = self._path(split, shard, f"{name}.npy")
            if not path.is_file() or _sha256(path) != getattr(record, name):
                raise self._refusal(split, shard, f"{name}.npy", "is missing or damaged")
            found[name] = self.map_tokens(split, shard) if name == "tokens" else np.load(path)
            problem = self._problem(split, name, found[name], record.rows)
            if found[name].dtype != dtype:
                problem = f"are {found[name].dtype}, not {np.dtype(dtype)}"
            if problem:
                raise self._refusal(split, shard, f"{name}.npy", f"holds {name} that {problem}")
        return found["tokens"], found["labels"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(store: TokenStore) -> tuple[list[str], list[str]]:
    """Check all shards of a store, complete or not: a line for each split on its sound shards, and one per problem."""
    header, content, problems = store.header, [], []
    for split in SPLITS:
        images, left_out = np.zeros(header.num_classes, dtype=np.int64), 0
        for shard in tqdm(range(header.num_shards(split)), desc=split, unit="shard", leave=False):
            try:
                _, labels = store.read_shard(split, shard)
            except InputError as error:
                problems.append(str(error))
                continue
            images += np.bincount(labels, minlength=header.num_classes)
            left_out += len(store.record(split, shard).left_out)
        content.append(
            f"{split}: {images.sum():,} images, {images.min():,} to {images.max():,} a class, each of "
            f"{header.num_views(split)} x {header.num_channels} tokens; {left_out:,} unreadable files left out"
        )
    return content, problems
