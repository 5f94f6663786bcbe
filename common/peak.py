"""How fast a device multiplies matrices: what arithmetic is measured against."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from common.measuring import synchronize
from common.runtime import pick_dtype

T = TypeVar("T")
SMALLEST, LARGEST = 256, 8192  # rows of the square matrices
LONG_ENOUGH = 0.1  # seconds; a product that takes longer is large enough
QUICK = 0.02  # where it is only to stand beside another figure, and should not be waited for
PASSES = 3  # in one probe
# makers' data sheets: operations a second in bfloat16, summed in float32, of dense matrices; the longest name that fits
BFLOAT16 = {
    "A100": 312e12,
    "A10": 125e12,
    "A40": 150e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}
OTHERS = {"D", "Laptop", "MIG", "Ti"}  # words that make a slower or faster product, or a part, of one of these names
MEASURED = "fastest square matrix product here"


def timed(device: torch.device, run: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a run takes, to the end of what it asked of the device, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


@contextmanager
def products_as_in_convolutions(device: torch.device) -> Iterator[None]:
    """Let matrix products round float32 as convolutions do: on CUDA those use TF32 unless told otherwise."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Peak(NamedTuple):
    """Operations a second, and where the figure is from."""

    flops: float
    source: str


@dataclass(kw_only=True)
class MatmulProbe:
    """Measures how fast square matrices are multiplied, in operations a second, in each number format.

    Call it before, between and after what is judged by it: a shared machine does not give the same all
    the time. `sizes` holds the number of rows: doubled until a product takes
    `long_enough` seconds. `as_convolutions`: see `products_as_in_convolutions`.
    """

    device: torch.device
    dtypes: list[str]
    long_enough: float = LONG_ENOUGH
    as_convolutions: bool = True
    found: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._matrices: dict[str, Tensor] = {}
        for dtype in self.dtypes:
            self.found[dtype] = []
            with self._rounding():
                self._matrices[dtype] = self._large_enough(pick_dtype(dtype))
            self.sizes[dtype] = len(self._matrices[dtype])

    def _rounding(self) -> AbstractContextManager[None]:
        return products_as_in_convolutions(self.device) if self.as_convolutions else nullcontext()

    def _large_enough(self, dtype: torch.dtype) -> Tensor:
        size = SMALLEST
        while True:
            # not constant: a processor that multiplies zeros, or the same number, needs less power and runs faster
            matrix = torch.randn(size, size, dtype=dtype, device=self.device)
            self._product(matrix)  # the first of a size may set something up
            if size >= LARGEST or self._product(matrix) > self.long_enough:
                return matrix
            size *= 2

    def _product(self, matrix: Tensor) -> float:
        return timed(self.device, lambda: matrix @ matrix)[0]

    def measure(self) -> None:
        """Multiply a few times in each format; the fastest of them is noted."""
        with self._rounding():
            for dtype, matrix in self._matrices.items():
                seconds = [self._product(matrix) for _ in range(PASSES)]
                self.found[dtype].append(2 * len(matrix) ** 3 / min(seconds))

    @property
    def best(self) -> dict[str, float]:
        """The fastest product of all times, in each format, operations a second."""
        return {dtype: max(values) for dtype, values in self.found.items()}

    def peak(self, dtype: str) -> Peak:
        """The most that the device can do: of its data sheet where known, else the best of what was measured."""
        return data_sheet_peak(self.device, dtype) or Peak(self.best[dtype], MEASURED)


def data_sheet_peak(device: torch.device, dtype: str) -> Peak | None:
    """What the maker says that a device can do in a number format; None where that is not known here."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    known = [entry for entry in BFLOAT16 if f" {entry} " in f" {' '.join(words)} "]
    if not known or OTHERS & set(words):
        return None
    return Peak(BFLOAT16[max(known, key=len)], "data sheet")


def peak_of(device: torch.device, dtype: str) -> Peak:
    """The most that a device can do in a number format: of its data sheet where that is known, else measured."""
    if sheet := data_sheet_peak(device, dtype):
        return sheet
    probe = MatmulProbe(device=device, dtypes=[dtype], long_enough=QUICK, as_convolutions=False)
    probe.measure()
    return probe.peak(dtype)
