"""One shard of a token store: what its record says, and whether its arrays' files are what they must be."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHUNK = 1 << 18  # bytes of a file that are looked at together


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a shard's JSON file says: tokens and labels are the checksums of the two arrays' files."""

    rows: int
    left_out: list[str]
    tokenizer_fingerprint: str
    tokens: str
    labels: str


@dataclass(frozen=True, kw_only=True)
class ShardArray:
    """What a shard's array must be; its values are in [0, limit)."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]
    limit: int
    values: str

    @property
    def nbytes(self) -> int:
        """Bytes of the values alone."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def checksum_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_problem(path: Path, checksum: str, expected: ShardArray) -> str | None:
    """What is wrong with an array's file. It is read once, in pieces, so that it does not stay in memory."""
    offset = path.stat().st_size - expected.nbytes if path.is_file() else -1
    if offset < 0:
        return "is missing or damaged"
    digest, lowest, highest = hashlib.sha256(), 0, 0
    chunk = memoryview(bytearray(CHUNK))
    with path.open("rb") as file:
        digest.update(file.read(offset))
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            values = np.frombuffer(chunk[:size], expected.dtype)
            lowest, highest = min(lowest, int(values.min())), max(highest, int(values.max()))
        if digest.hexdigest() != checksum:
            return "is missing or damaged"
        file.seek(0)
        try:
            np.lib.format.read_magic(file)
            shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            return "is not a NumPy file"
    if columns_first or (shape, dtype) != (expected.shape, np.dtype(expected.dtype)):
        return f"holds {dtype} {shape} in place of {np.dtype(expected.dtype)} {expected.shape}"
    return f"holds {expected.values}" if lowest < 0 or highest >= expected.limit else None
