"""What bounds a tokenizer: the arithmetic of one image, and how fast a plain matrix product goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.measuring import synchronize
from common.runtime import pick_dtype
from tokenizer.tokenizer import ChannelTokenizer

T = TypeVar("T")
SMALLEST, LARGEST = 256, 8192  # rows of the square matrices
LONG_ENOUGH = 0.1  # seconds; a product that takes longer is large enough
PASSES = 3  # in one probe


def timed(device: torch.device, run: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a run takes, to the end of what it asked of the device, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def count_flops(tokenizer: ChannelTokenizer) -> dict[str, int]:
    """Operations that one image takes, two for each multiplication with its sum: {"encode": n, "decode": n}.

    Of convolutions and matrix products, of the plain network; norms, activations and sums are not counted.
    """
    size, channels = tokenizer.config.image_size, tokenizer.config.num_channels
    images = torch.zeros(1, 3, size, size, device=tokenizer.device)
    tokens = torch.zeros(1, channels, dtype=torch.long, device=tokenizer.device)
    counts = {}
    # attention as two matrix products, which are counted on every device; fused kernels are not
    with sdpa_kernel(SDPBackend.MATH):
        for task, run, given in (("encode", tokenizer.tokenize, images), ("decode", tokenizer.detokenize, tokens)):
            with FlopCounterMode(display=False) as counter:
                run(given)
            counts[task] = int(counter.get_total_flops())
    return counts


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


@dataclass(kw_only=True)
class MatmulProbe:
    """Measures how fast square matrices are multiplied, in operations a second, in each number format.

    Call it before, between and after what is judged by it: a shared machine does not give the same all
    the time. `sizes` holds the number of rows: doubled until a product takes a tenth of a second.
    """

    device: torch.device
    dtypes: list[str]
    found: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._matrices: dict[str, Tensor] = {}
        for dtype in self.dtypes:
            self.found[dtype] = []
            with products_as_in_convolutions(self.device):
                self._matrices[dtype] = self._large_enough(pick_dtype(dtype))
            self.sizes[dtype] = len(self._matrices[dtype])

    def _large_enough(self, dtype: torch.dtype) -> Tensor:
        size = SMALLEST
        while True:
            # not constant: a processor that multiplies zeros, or the same number, needs less power and runs faster
            matrix = torch.randn(size, size, dtype=dtype, device=self.device)
            self._product(matrix)  # the first of a size may set something up
            if size >= LARGEST or self._product(matrix) > LONG_ENOUGH:
                return matrix
            size *= 2

    def _product(self, matrix: Tensor) -> float:
        return timed(self.device, lambda: matrix @ matrix)[0]

    def measure(self) -> None:
        """Multiply a few times in each format; the fastest of them is noted."""
        with products_as_in_convolutions(self.device):
            for dtype, matrix in self._matrices.items():
                seconds = [self._product(matrix) for _ in range(PASSES)]
                self.found[dtype].append(2 * len(matrix) ** 3 / min(seconds))

    @property
    def best(self) -> dict[str, float]:
        """The fastest product of all times, in each format, operations a second."""
        return {dtype: max(values) for dtype, values in self.found.items()}
