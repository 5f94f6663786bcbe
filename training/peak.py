"""Peak arithmetic throughput of a device: from its data sheet, or measured with square matrix products."""

import time
from typing import NamedTuple

import torch

from common.measuring import synchronize
from common.runtime import pick_dtype

SMALLEST, LARGEST = 256, 8192  # rows of the square matrices
LONG_ENOUGH = 0.02  # seconds; a product that takes longer is large enough
REPEATS = 3
# data sheets: 10**12 operations per second in bfloat16 with float32 sums, dense; the longest matching name applies
BFLOAT16 = {
    "A10": 125, "A40": 150, "A100": 312, "B200": 2250, "GH200": 989, "H100": 989, "H100 NVL": 835, "H100 PCIe": 756,
    "H200": 989, "H200 NVL": 835, "L4": 121, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165,
}  # fmt: skip
OTHERS = {"D", "Laptop", "MIG", "Ti"}  # words that make a slower or faster product, or a part, of one of these names


class Peak(NamedTuple):
    """Operations per second, and the source of the figure."""

    flops: float
    source: str


def measured_flops(device: torch.device, dtype: str) -> float:
    """Operations per second of the fastest square matrix product in `dtype`; the size is doubled until it is slow."""

    def seconds(matrix: torch.Tensor) -> float:
        synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        return time.perf_counter() - start

    size = SMALLEST
    while True:
        # random numbers: multiplying constants needs less power, so that some processors run faster
        matrix = torch.randn(size, size, dtype=pick_dtype(dtype), device=device)
        seconds(matrix)  # the first product of a size may include some set-up
        if size >= LARGEST or seconds(matrix) > LONG_ENOUGH:
            return 2 * size**3 / min(seconds(matrix) for _ in range(REPEATS))
        size *= 2


def peak_of(device: torch.device, dtype: str) -> Peak:
    """Peak of a device in `dtype` (float32 or bfloat16): in bfloat16 from its data sheet if listed, else measured."""
    if device.type == "cuda" and dtype == "bfloat16":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        known = [entry for entry in BFLOAT16 if f" {entry} " in f" {' '.join(words)} "]
        if known and not OTHERS & set(words):
            return Peak(BFLOAT16[max(known, key=len)] * 1e12, "data sheet")
    return Peak(measured_flops(device, dtype), "fastest square matrix product here")
