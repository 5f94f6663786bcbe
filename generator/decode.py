"""The cached step: one token in, logits of the next one out, over the weights of a plain Llama.

Few, large products (queries, keys and values in one, gate and up in one), only the code rows of the
head, a cache allocated once, and nothing that waits for the device. Activations are float32 whatever
the weights are: they are a thousandth of the bytes, and their rounding would be all of the error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import TokenLayout
from generator.positions import counted_vectors, learned_blocks, without_flags
from generator.products import Products, settled


class Layer(NamedTuple):
    """Weights of one block; the products are fused along their outputs, the norms are float32."""

    attention_norm: Tensor
    query_key_value: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Rotation(NamedTuple):
    """Rotary embedding of all positions: (C head_dim) each, float32."""

    cos: Tensor
    sin: Tensor


LayerCache = tuple[Tensor, Tensor]  # keys and values of a layer, (b heads length head_dim) each


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of all layers, (layers 2 b heads capacity head_dim), 0 where nothing was written yet."""

    entries: Tensor

    def layers(self, start: int, end: int, length: int) -> list[LayerCache]:
        """Views of the first `length` positions of rows start..end-1, a pair for each layer."""
        views = self.entries[:, :, start:end, :, :length]
        return [(keys, values) for keys, values in (layer.unbind() for layer in views.unbind())]

    def take_rows(self, source: "Cache", rows: Tensor, length: int) -> None:
        """Copy rows (b,) of another cache into the rows of this one, the first `length` positions."""
        self.entries[..., :length, :] = source.entries[..., :length, :].index_select(2, rows)


def _norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (b n d): pairs are entry i of the first half and i of the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def blocks(
    products: Products,
    hidden: Tensor,
    layers: Sequence[Layer],
    caches: Sequence[LayerCache],
    rotation: Rotation,
    position: Tensor,
    mask: Tensor,
    eps: float,
) -> Tensor:
    """Some blocks of the Llama for one position of every row; writes its keys and values into the caches.

    Args:
        products: the arithmetic.
        hidden: (b d) float32.
        layers: the blocks' weights.
        caches: their caches.
        rotation: of all positions.
        position: (1,) int64, a tensor so that nothing is compiled or captured anew for every position.
        mask: (length,) bool, true up to the position.
        eps: of the norms.
    """
    num_heads = caches[0][0].shape[1]
    cos, sin = rotation.cos.index_select(0, position), rotation.sin.index_select(0, position)
    for layer, (keys, values) in zip(layers, caches, strict=True):
        fused = products.linear(_norm(hidden, layer.attention_norm, eps), layer.query_key_value)
        query, key, value = rearrange(fused, "b (three n d) -> three b n d", three=3, n=num_heads)
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        keys.index_copy_(2, position, key[:, :, None].to(keys.dtype))
        values.index_copy_(2, position, value[:, :, None].to(values.dtype))
        mixed = rearrange(products.attend(query, keys, values, mask), "b n d -> b (n d)")
        hidden = settled(hidden + products.linear(mixed, layer.attention_out))
        gate, up = products.linear(_norm(hidden, layer.mlp_norm, eps), layer.gate_up).chunk(2, dim=-1)
        hidden = settled(hidden + products.linear(F.silu(gate) * up, layer.down))
    return hidden


def head(products: Products, hidden: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The last block's output (b d) -> logits of the codes (b codebook_size), float32."""
    return products.linear(_norm(hidden, norm, eps), weight)


@dataclass(frozen=True, kw_only=True)
class CachedDecoder:
    """A Llama's weights, arranged for drawing. Holds its own copy; the model it came from can go.

    `positions` are the vectors (C d) float32 that the first block of a model that counts makes; they take its place. No
    step need compute them, and the block enlarges rounding a hundredfold, so that the tokens of an image would
    hang on what is drawn beside it.
    """

    layers: list[Layer]
    embedding: Tensor
    positions: Tensor | None
    final_norm: Tensor
    code_head: Tensor
    rotation: Rotation
    num_heads: int
    norm_eps: float
    layout: TokenLayout

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights and of the cache."""
        return self.embedding.dtype

    @classmethod
    @torch.no_grad()
    def from_llama(cls, model: LlamaForCausalLM, layout: TokenLayout) -> Self:
        """Take the weights of a model whose vocabulary is `layout`.

        Raises:
            InputError: biases, or fewer key heads than query heads; such a Llama is not one of ours.
        """
        config = model.config
        if config.attention_bias or config.mlp_bias or config.num_key_value_heads != config.num_attention_heads:
            raise InputError(
                "the generator has biases or grouped key heads; only plain multi-head Llamas are drawn with"
            )
        layers = []
        for block in learned_blocks(model, layout):
            attention, mlp = block.self_attn, block.mlp
            layers.append(
                Layer(
                    attention_norm=block.input_layernorm.weight.detach().float().clone(),
                    query_key_value=torch.cat(
                        [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
                    ),
                    attention_out=attention.o_proj.weight.detach().clone(),
                    mlp_norm=block.post_attention_layernorm.weight.detach().float().clone(),
                    gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    down=mlp.down_proj.weight.detach().clone(),
                )
            )
        embedding, vectors = model.model.embed_tokens.weight.detach().clone(), None
        if layout.first_block_counts:
            embedding = without_flags(embedding)
            vectors = counted_vectors(model, layout.num_channels).to(embedding.device)
        positions = torch.arange(layout.num_channels, device=embedding.device)
        cos, sin = model.model.rotary_emb(embedding.float(), positions[None])
        return cls(
            layers=layers,
            embedding=embedding,
            positions=vectors,
            final_norm=model.model.norm.weight.detach().float().clone(),
            code_head=model.lm_head.weight[: layout.codebook_size].detach().clone(),
            rotation=Rotation(cos=cos[0].float(), sin=sin[0].float()),
            num_heads=config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            layout=layout,
        )

    def new_cache(self, num_rows: int, capacity: int) -> Cache:
        """An empty cache for `capacity` positions of `num_rows` rows."""
        head_dim = self.embedding.shape[1] // self.num_heads
        # zeros, not garbage: positions behind the mask are multiplied by 0, and 0 * NaN is NaN
        shape = (len(self.layers), 2, num_rows, self.num_heads, capacity, head_dim)
        return Cache(entries=self.embedding.new_zeros(shape))
