"""The token store: the one place that knows its files.

    store.json              what it holds: tokenizer fingerprint, sizes, class names, views, splits
    tokenizer/              the tokenizer that made it
    train-00000.tokens.npy  (rows, views, C) uint16
    train-00000.labels.npy  (rows,) int64
    train-00000.json        rows, checksums, tokenizer, files left out; it comes last, so a shard that has it is whole

A shard covers a fixed range of the split's files, so any shard can be written, or written again, alone.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from common.checkpoint import read_json, write_text, written_whole
from common.errors import InputError
from generator.shards import ShardArray, ShardRecord, array_problem, checksum_of

VERSION = 2
VIEWS = {"none": 1, "flip": 2, "ten-crop": 10}  # how many token sequences each image of train has
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
MAX_BITS = 16  # tokens are stored as uint16


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
        if not 1 <= self.num_bits <= MAX_BITS:
            raise InputError(f"num_bits is {self.num_bits}; a token store holds tokens of 1 to {MAX_BITS} bits")

    def num_views(self, split: str) -> int:
        """Token sequences stored for each image; val holds the image as it is, and nothing else."""
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
        """How many shards the split has when it is complete."""
        return -(-self.split_files[split] // self.shard_size)

    def shards(self) -> list[tuple[Split, int]]:
        """All shards of a complete store, (split, number), in the order in which they are made."""
        return [(split, shard) for split in SPLITS for shard in range(self.num_shards(split))]

    def shard_files(self, split: str, shard: int) -> range:
        """The files that a shard covers, by their place in the split."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.split_files[split]))


class TokenStore:
    """A folder of tokens. `create` starts or continues one, `open` reads a complete one."""

    def __init__(self, folder: str | Path, header: StoreHeader):
        self.folder = Path(folder)
        self.header = header
        self._records: dict[tuple[str, int], ShardRecord] = {}

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer that made the store lies."""
        return self.folder / "tokenizer"

    @classmethod
    def create(cls, folder: str | Path, header: StoreHeader, write: bool = True) -> Self:
        """Start a store, or continue one that was begun with the same settings.

        Args:
            folder: the store's.
            header: the settings.
            write: whether this process may write; of several that work together only one does.

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
        if write:
            for abandoned in folder.glob(".*.partial"):  # by processes that were killed while they wrote
                shutil.rmtree(abandoned) if abandoned.is_dir() else abandoned.unlink()
        if write and not path.exists():
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
            InputError: no store, one that is not complete, or a shard of another tokenizer or of other files.
        """
        store = cls(folder, cls.peek(folder))
        for split in SPLITS:
            if missing := store.missing(split):
                raise InputError(
                    f"{folder} is not complete: {len(missing)} of {store.header.num_shards(split)} {split} shards "
                    "are missing; run extract_tokens.py again, it goes on where it stopped"
                )
        for split, shard in store.header.shards():
            store.record(split, shard)
        return store

    def _path(self, split: str, shard: int, ending: str) -> Path:
        return self.folder / f"{split}-{shard:05d}.{ending}"

    def missing(self, split: str) -> list[int]:
        """The shards of a split that are not there."""
        return [shard for shard in range(self.header.num_shards(split)) if not self.has_shard(split, shard)]

    def has_shard(self, split: str, shard: int) -> bool:
        """Whether a shard is there, whole."""
        return self._path(split, shard, "json").is_file()

    def left_out(self) -> list[str]:
        """A line for each image file that could not be read, over all shards."""
        return [line for split, shard in self.header.shards() for line in self.record(split, shard).left_out]

    def record(self, split: str, shard: int) -> ShardRecord:
        """What a shard's JSON file says; read once.

        Raises:
            InputError: it is missing or damaged, is of another tokenizer, or does not account for the shard's files.
        """
        if (split, shard) not in self._records:
            self._records[split, shard] = self._read_record(split, shard)
        return self._records[split, shard]

    def _read_record(self, split: str, shard: int) -> ShardRecord:
        path = self._path(split, shard, "json")
        try:
            record = ShardRecord(**read_json(path))
            files, found = len(self.header.shard_files(split, shard)), record.rows + len(record.left_out)
        except TypeError as error:
            raise InputError(f"{path} is not a shard's ({error}); {self._remedy(split, shard)}") from error
        if record.tokenizer_fingerprint != self.header.tokenizer_fingerprint:
            raise InputError(
                f"{path} is of the tokenizer {record.tokenizer_fingerprint}, the store is of "
                f"{self.header.tokenizer_fingerprint}; {self._remedy(split, shard)}"
            )
        if found != files or type(record.rows) is not int or record.rows < 0:
            raise InputError(
                f"{path} tells of {record.rows} rows and {len(record.left_out)} files left out, but the shard covers "
                f"{files} files; {self._remedy(split, shard)}"
            )
        return record

    def _remedy(self, split: str, shard: int) -> str:
        name = self._path(split, shard, "json").name
        return f"remove {name} and run extract_tokens.py again to write this shard anew"

    def _arrays(self, split: str, rows: int) -> tuple[ShardArray, ShardArray]:
        header = self.header
        shape = (rows, header.num_views(split), header.num_channels)
        tokens = ShardArray(
            name="tokens", shape=shape, dtype=np.uint16, limit=header.codebook_size, values="tokens beyond the codebook"
        )
        labels = ShardArray(
            name="labels", shape=(rows,), dtype=np.int64, limit=header.num_classes, values="labels outside the classes"
        )
        return tokens, labels

    def write_shard(self, split: str, shard: int, tokens: Tensor, labels: Tensor, left_out: Sequence[str]) -> None:
        """Write one shard.

        Args:
            split: "train" or "val".
            shard: its number.
            tokens: (rows, views, C) integers in [0, codebook_size).
            labels: (rows,) integers in [0, num_classes).
            left_out: a line for each file of the shard's range that could not be read.

        Raises:
            InputError: shapes or values other than these.
        """
        record: dict[str, Any] = {
            "rows": len(labels),
            "left_out": list(left_out),
            "tokenizer_fingerprint": self.header.tokenizer_fingerprint,
        }
        arrays = list(zip(self._arrays(split, len(labels)), (tokens, labels), strict=True))
        for expected, array in arrays:
            if array.shape != expected.shape:
                raise InputError(f"{expected.name} of a shard are {tuple(array.shape)}; {expected.shape} was expected")
            if array.numel() and not 0 <= int(array.min()) <= int(array.max()) < expected.limit:
                raise InputError(f"{split} shard {shard} was to hold {expected.values}, 0 to {expected.limit - 1}")
        for expected, array in arrays:
            path = self._path(split, shard, f"{expected.name}.npy")
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.save(file, array.cpu().numpy().astype(expected.dtype, order="C"))
            record[expected.name] = checksum_of(path)
        self._records.pop((split, shard), None)
        write_text(self._path(split, shard, "json"), json.dumps(record, indent=1))

    def problems(self, split: str, shard: int) -> list[str]:
        """A line for each thing that is wrong with a shard; reads all of it, and keeps none of it in memory."""
        try:
            record = self.record(split, shard)
        except InputError as error:
            return [str(error)]
        found = []
        for expected in self._arrays(split, record.rows):
            path = self._path(split, shard, f"{expected.name}.npy")
            checksum = record.tokens if expected.name == "tokens" else record.labels
            if problem := array_problem(path, checksum, expected):
                found.append(f"{path} {problem}; {self._remedy(split, shard)}")
        return found

    def read_tokens(self, split: str, shard: int) -> npt.NDArray[np.uint16]:
        """Tokens (rows, views, C) of a shard, not checked."""
        tokens: npt.NDArray[np.uint16] = np.load(self._path(split, shard, "tokens.npy"), allow_pickle=False)
        return tokens

    def read_labels(self, split: str, shard: int) -> npt.NDArray[np.int64]:
        """Labels (rows,) of a shard, not checked."""
        labels: npt.NDArray[np.int64] = np.load(self._path(split, shard, "labels.npy"), allow_pickle=False)
        return labels

    def open_tokens(self, split: str, shard: int) -> tuple[FileIO, int]:
        """The file of a shard's tokens, unbuffered, and the place in it where they begin; not checked."""
        expected, _ = self._arrays(split, self.record(split, shard).rows)
        path = self._path(split, shard, "tokens.npy")
        return FileIO(path), path.stat().st_size - expected.nbytes

    def read_shard(self, split: str, shard: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """Tokens (rows, views, C) and labels (rows,) of a shard, checked as `problems` does.

        Raises:
            InputError: a file is missing, or has changed since it was written, or holds impossible values.
        """
        if found := self.problems(split, shard):
            raise InputError(found[0])
        return self.read_tokens(split, shard), self.read_labels(split, shard)
