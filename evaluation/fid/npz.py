"""The one owner of .npz files of pictures as the guided-diffusion evaluator reads them: arr_0, uint8 (n H W 3).

Both ways go a batch at a time, so that 50,000 pictures of 256x256, 10 GB, never are in memory together.
"""

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from common.checkpoint import written_whole
from common.errors import InputError

PICTURES, LABELS, DRAWN_BY = "arr_0", "arr_1", "drawn_by"
MOMENTS = ("mu", "sigma")


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_npz(path: Path, count: int, size: int, batches: Iterable[Tensor], labels: list[int], drawn_by: str) -> None:
    """Write `count` pictures, batches (b 3 size size) uint8 in order, with their classes (arr_1) and who drew them.

    The file appears whole or not at all.
    """
    header = io.BytesIO()
    shape = (count, size, size, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for batch in batches:
                file.write(rearrange(batch, "b c h w -> b h w c").contiguous().numpy().tobytes())
        archive.writestr(f"{LABELS}.npy", _npy(np.array(labels, dtype=np.int64)))
        archive.writestr(f"{DRAWN_BY}.npy", _npy(np.array(drawn_by)))


class NpzPictures:
    """Pictures in a .npz, and what else it says.

    Attributes: `count`, `height`, `width`; `moments`, mean (d,) and covariance (d d) float64, or None; `drawn_by`, the
    model that drew them, or None.

    Raises:
        InputError: no such file, or one without pictures.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as file:
                shape, kind = self._header(cast(BinaryIO, file))
            with np.load(path, allow_pickle=False) as content:
                moments = [torch.from_numpy(content[name].astype(np.float64)) for name in MOMENTS if name in content]
                self.drawn_by = str(content[DRAWN_BY]) if DRAWN_BY in content else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path} is no .npz with pictures in {PICTURES} ({error}); give one") from error
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise InputError(f"{path} has {PICTURES} of {kind} {shape}; needed is uint8 (n, height, width, 3)")
        self.count, self.height, self.width, _ = shape
        self.moments = (moments[0], moments[1]) if len(moments) == 2 else None

    @staticmethod
    def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, kind = read(file)
        if fortran:
            raise ValueError("pictures lie in Fortran's order")
        return shape, kind

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Pictures (b 3 H W) uint8, in order.

        Raises:
            InputError: the file ends too early.
        """
        pixels = self.height * self.width * 3
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{PICTURES}.npy") as file:
            self._header(cast(BinaryIO, file))
            for start in range(0, self.count, batch_size):
                rows = min(batch_size, self.count - start)
                try:
                    content = file.read(rows * pixels)
                except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise InputError(f"{self.path} is damaged ({error}); copy it again") from error
                if len(content) < rows * pixels:
                    raise InputError(f"{self.path} ends before its picture {start + rows}; copy it again")
                array = np.frombuffer(bytearray(content), dtype=np.uint8).reshape(rows, self.height, self.width, 3)
                yield rearrange(torch.from_numpy(array), "b h w c -> b c h w").contiguous()
