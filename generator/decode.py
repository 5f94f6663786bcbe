"""The cached step: the bits of one channel in, the odds of the next channel's bits out.

Few, large products and a cache allocated once; nothing waits for the device. Activations and everything that depends
on the channel are float32 whatever the dtype of the blocks: both are a small part of the bytes, and rounding them would
be most of the error.

Two kinds of arithmetic, `LIBRARY` and `SUMS`. Drawing one image multiplies matrices by single rows, so that reading the
matrix takes all the time. On most CPUs library kernels, made for many rows, read at half the bandwidth of the memory; a
sum over inputs, written out and compiled, reads at nearly all of it (docs/performance.md). It also adds the numbers of
a row in an order that does not depend on the other rows, so that an image is the same, bit for bit, in any batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from generator.config import ChannelGPTConfig
from generator.model import NORM_EPS, Block, ChannelGPT, lower_triangle, rotary_tables

MAX_COLUMNS = 48  # up to so many rows, CPU libraries multiply a matrix by columns faster than rows by a matrix
STREAMS = 4  # parts of a matrix that are read at the same time, which hides the latency of memory


class Products(NamedTuple):
    """One kind of arithmetic; all results are float32, and masks (l,) are added to scores."""

    linear: Callable[[Tensor, Tensor], Tensor]  # rows (b i) float32, weight (o i) -> (b o)
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # query (b n d), keys, values (b n l d), mask -> (b n d)


def materialize(x: Tensor) -> Tensor:
    """The same tensor; keeps a compiler from computing it again inside each sum that reads it."""
    return torch.as_strided(x, x.shape, x.stride()) if torch.compiler.is_compiling() else x


@cache
def _least_columns() -> int:
    """Return the least number of rows to multiply as columns; with 1 or 2 rows F.linear is fast on Intel CPUs only."""
    return 3 if "Intel" in str(torch.cpu.get_capabilities().get("cpu_name")) else 1


def _library_linear(rows: Tensor, weight: Tensor) -> Tensor:
    if rows.device.type == "cpu" and weight.dtype == torch.float32 and _least_columns() <= len(rows) <= MAX_COLUMNS:
        # a matrix times two columns is faster than times one
        columns = torch.cat([rows, rows]).t() if len(rows) == 1 else rows.t()
        return (weight @ columns).t()[: len(rows)].contiguous()
    return F.linear(rows.to(weight.dtype), weight).float()


def _library_attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    query, mask = query[:, :, None].to(keys.dtype), mask[None].to(keys.dtype)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)[:, :, 0].float()


def _summed_linear(rows: Tensor, weight: Tensor) -> Tensor:
    rows = materialize(rows)
    parts = [torch.stack([(row * block.float()).sum(-1) for row in rows.unbind()]) for block in weight.chunk(STREAMS)]
    return torch.cat(parts, dim=1)


def _summed_attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    query = materialize(query * query.shape[-1] ** -0.5)
    scores = (query[:, :, None] * keys.float()).sum(-1)
    weights = (scores + mask).softmax(-1)
    return (weights[..., None] * values.float()).sum(2)


LIBRARY = Products(linear=_library_linear, attend=_library_attend)
SUMS = Products(linear=_summed_linear, attend=_summed_attend)


class Layer(NamedTuple):
    """Weights of one block; its norms, and the factor sqrt(d) of each, are in the products that follow."""

    query_key_value: Tensor
    attention_out: Tensor
    gate_up: Tensor
    down: Tensor


class ChannelTables(NamedTuple):
    """Weights of each channel, float32; a step reads entry p of each to predict channel p.

    Bits are kept as (b C+1 n): row 0 is zeros, row c + 1 has the bits of channel c. So row p is the input of step p.

    read_bits: (C d n). vectors: (C d). bit_head: (C n d). pair_head: (n*n d), the same for all channels; both include
    the weight of the last norm and sqrt(d).
    pairs: (C n*n). prior: (C n (C+1)*n), 0 for bits that are not in an earlier channel. prior_bias: (C n).
    class_vectors: (num_classes+1 d). class_odds: (num_classes+1 C n).
    """

    read_bits: Tensor
    vectors: Tensor
    bit_head: Tensor
    pair_head: Tensor
    pairs: Tensor
    prior: Tensor
    prior_bias: Tensor
    class_vectors: Tensor
    class_odds: Tensor

    @classmethod
    def from_model(cls, model: ChannelGPT) -> Self:
        """Combine shared weights with those of each channel."""
        channels, bits = model.config.num_channels, model.config.num_bits
        read, head, norm = model.read_bits, model.bit_head, model.norm.weight * model.config.hidden_size**0.5
        own = torch.cat([torch.zeros_like(read.own[:1]), read.own[:-1]])  # step p reads the bits of channel p - 1
        prior = F.pad(model.prior.matrix(), (bits, 0))  # (c i) (e+1 j)
        earlier = rearrange(prior, "(c i) (e j) -> c i e j", c=channels, j=bits)
        channel = torch.arange(channels, device=prior.device)
        within = earlier[channel, :, channel + 1]  # c i j
        earlier[channel, :, channel + 1] = 0
        pair_rows = lower_triangle(model.pair_head.weight.float().T, bits)  # d i j
        tables = cls(
            read_bits=read.shared + own,
            vectors=model.channel_vectors,
            bit_head=(head.shared + head.own) * norm,
            pair_head=rearrange(pair_rows, "d i j -> (i j) d") * norm,
            pairs=rearrange(within, "c i j -> c (i j)"),
            prior=rearrange(prior, "(c i) e -> c i e", c=channels),
            prior_bias=rearrange(model.prior.bias, "(c i) -> c i", c=channels),
            class_vectors=model.class_vectors,
            class_odds=rearrange(model.prior.class_bias, "k (c i) -> k c i", c=channels),
        )  # fmt: skip
        return cls(*(table.detach().to(torch.float32, copy=True).contiguous() for table in tables))


LayerCache = tuple[Tensor, Tensor]  # keys and values of a layer, (b heads length head_dim) each


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of all layers, (layers 2 b heads capacity head_dim), 0 where nothing was written yet."""

    entries: Tensor

    def layers(self, rows: slice, length: int) -> list[LayerCache]:
        """Views of the first `length` positions of some rows, a pair for each layer."""
        return [(keys, values) for keys, values in self.entries[:, :, rows, :, :length].unbind()]

    def take_rows(self, source: "Cache", rows: Tensor, length: int) -> None:
        """Copy rows (b,) of another cache into the rows of this one, the first `length` positions."""
        self.entries[..., :length, :] = source.entries[..., :length, :].index_select(2, rows)


def embed(products: Products, previous: Tensor, classes: Tensor, tables: ChannelTables, position: Tensor) -> Tensor:
    """Bits of the channel before (b n) and class vectors (b d) -> input of the blocks (b d); position (1,) int64."""
    weight = tables.read_bits.index_select(0, position)[0]
    return classes + tables.vectors.index_select(0, position) + products.linear(previous, weight)


def blocks(
    products: Products,
    hidden: Tensor,
    layers: Sequence[Layer],
    caches: Sequence[LayerCache],
    rotation: tuple[Tensor, Tensor],
    position: Tensor,
    mask: Tensor,
) -> Tensor:
    """Apply some blocks to one position of every row (b d), and write its keys and values into the caches.

    `rotation`: cosines and signed sines of all positions, (C head_dim) each. `position`: (1,) int64, a tensor so that
    one compiled or captured program serves all positions. `mask`: (length,) float32, 0 up to it, -inf beyond.
    """
    num_heads = caches[0][0].shape[1]
    cos, sin = (table.index_select(0, position) for table in rotation)
    for layer, (keys, values) in zip(layers, caches, strict=True):
        fused = products.linear(_norm(hidden), layer.query_key_value).unflatten(1, (3, num_heads, -1))
        query, key = _rotate(fused[:, :2], cos, sin).unbind(1)
        value = fused[:, 2]
        keys.index_copy_(2, position, key[:, :, None].to(keys.dtype))
        values.index_copy_(2, position, value[:, :, None].to(values.dtype))
        mixed = products.attend(query, keys, values, mask).flatten(1)
        hidden = materialize(hidden + products.linear(mixed, layer.attention_out))
        gate, up = products.linear(_norm(hidden), layer.gate_up).chunk(2, dim=-1)
        hidden = materialize(hidden + products.linear(F.silu(gate) * up, layer.down))
    return hidden


def _norm(hidden: Tensor) -> Tensor:
    """RMSNorm over (b d) without its weight and without the factor sqrt(d), which is in the products that follow."""
    return hidden * torch.rsqrt(hidden.square().sum(-1, keepdim=True) + NORM_EPS * hidden.shape[-1])


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """As `generator.model.rotate`; the first half of `signed_sin` is negated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * signed_sin


def head(products: Products, hidden: Tensor, tables: ChannelTables, position: Tensor) -> Tensor:
    """Output of the blocks (b d) -> the transformer's log-odds and pairs of bits, (b n+n*n)."""
    hidden = materialize(_norm(hidden))
    log_odds = products.linear(hidden, tables.bit_head.index_select(0, position)[0])
    pairs = products.linear(hidden, tables.pair_head)
    return torch.cat([log_odds, pairs], dim=1)


def prior(products: Products, bits: Tensor, tables: ChannelTables, position: Tensor) -> Tensor:
    """Bits (b C+1 n) -> the linear prior's log-odds (b n), without what the class and the code's own bits add."""
    weight = tables.prior.index_select(0, position)[0]
    return products.linear(bits.flatten(1), weight) + tables.prior_bias.index_select(0, position)


def _with_norm(layer: nn.Linear, norm: nn.RMSNorm) -> Tensor:
    """Weight of a layer (o i), multiplied by that of the norm before it and by sqrt(i), in the layer's dtype."""
    scale = norm.weight.detach().float() * layer.in_features**0.5
    return (layer.weight.detach().float() * scale).to(layer.weight.dtype)


@dataclass(frozen=True, kw_only=True)
class CachedDecoder:
    """Weights of a `ChannelGPT`, arranged for drawing."""

    layers: list[Layer]
    tables: ChannelTables
    rotation: tuple[Tensor, Tensor]
    config: ChannelGPTConfig
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.tables.vectors.device

    @classmethod
    @torch.no_grad()
    def from_model(cls, model: ChannelGPT) -> Self:
        """Copy a model's weights; its blocks keep their dtype, which is also that of the cache."""
        config, model_blocks = model.config, cast("Sequence[Block]", model.blocks)
        layers = [
            Layer(
                query_key_value=_with_norm(block.query_key_value, block.attention_norm),
                attention_out=block.attention_out.weight.detach().clone(),
                gate_up=_with_norm(block.gate_up, block.mlp_norm),
                down=block.down.weight.detach().clone(),
            )
            for block in model_blocks
        ]
        cos, sin = rotary_tables(config.num_channels, config.head_dim, config.rope_theta, model.device)
        return cls(
            layers=layers,
            tables=ChannelTables.from_model(model),
            rotation=(cos, torch.cat([-sin[:, : config.head_dim // 2], sin[:, config.head_dim // 2 :]], dim=1)),
            config=config,
            dtype=model.dtype,
        )

    def new_cache(self, num_rows: int, capacity: int) -> Cache:
        """An empty cache for `capacity` positions of `num_rows` rows."""
        # zeros, not garbage: positions behind the mask are multiplied by 0, and 0 * NaN is NaN
        shape = (len(self.layers), 2, num_rows, self.config.num_heads, capacity, self.config.head_dim)
        return Cache(entries=torch.zeros(shape, dtype=self.dtype, device=self.device))
