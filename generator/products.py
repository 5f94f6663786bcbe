"""The two kinds of arithmetic in a step: the library's products for many rows, plain sums for a few.

One image is drawn by products of a matrix and one row, so time is the time to read the matrix. Library
kernels are made for many rows: on CPUs they read at half the speed that memory has. A sum over inputs,
written out and compiled, reads at nearly all of it (docs/performance.md), and adds the numbers of a row
in the same order whatever rows stand beside it, so that an image does not depend on its neighbours, bit
for bit.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """Rows (b i) float32 and a weight (o i) -> (b o) float32."""

    def __call__(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply."""
        ...


class Attend(Protocol):
    """Query (b n d), keys and values (b n l d), mask (l,) bool, true where to look -> (b n d) float32."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Mix values by the similarity of their keys to the query."""
        ...


class Products(NamedTuple):
    """One kind of arithmetic."""

    linear: Linear
    attend: Attend


def settled(x: Tensor) -> Tensor:
    """The same tensor, computed once: a compiler may not work it out anew inside every sum that reads it."""
    return torch.as_strided(x, x.shape, x.stride())


def _library_linear(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows.to(weight.dtype), weight).float()


def _library_attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query[:, :, None].to(keys.dtype), keys, values, attn_mask=mask[None])[
        :, :, 0
    ].float()


# four streams through the matrix side by side hide the latency of memory that one would wait for
STREAMS = 4


def _summed_linear(rows: Tensor, weight: Tensor) -> Tensor:
    rows = settled(rows)
    parts = [torch.stack([(row * block.float()).sum(-1) for row in rows.unbind()]) for block in weight.chunk(STREAMS)]
    return torch.cat(parts, dim=1)


def _summed_attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    query = settled(query * query.shape[-1] ** -0.5)
    scores = (query[:, :, None] * keys.float()).sum(-1)
    weights = torch.where(mask, scores, -torch.inf).softmax(-1)
    return (weights[..., None] * values.float()).sum(2)


LIBRARY = Products(linear=_library_linear, attend=_library_attend)
SUMS = Products(linear=_summed_linear, attend=_summed_attend)
