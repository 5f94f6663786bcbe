"""The cached step: one token in, logits of the next one out, over the weights of a plain Llama.

Drawing one image is a chain of matrix-vector products, so its time is the time to read the weights.
Hence few, large products (queries, keys and values in one, gate and up in one), only the code rows of
the head, a cache allocated once, and nothing in a step that waits for the device.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import TokenLayout


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Weights of one block; the products are fused along their outputs."""

    attention_norm: Tensor
    query_key_value: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of all layers, (layers b heads length head_dim); position p is written by step p."""

    keys: Tensor
    values: Tensor


class CachedDecoder:
    """A Llama's weights, arranged for drawing. Holds its own copy; the model it came from can go."""

    def __init__(
        self,
        *,
        layers: list[_Layer],
        embedding: Tensor,
        final_norm: Tensor,
        code_head: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        norm_eps: float,
        layout: TokenLayout,
    ):
        self.layers, self.embedding, self.final_norm, self.code_head = layers, embedding, final_norm, code_head
        self.cos, self.sin, self.num_heads, self.norm_eps, self.layout = cos, sin, num_heads, norm_eps, layout

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

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
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            layers.append(
                _Layer(
                    attention_norm=block.input_layernorm.weight.detach().clone(),
                    query_key_value=torch.cat(
                        [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
                    ),
                    attention_out=attention.o_proj.weight.detach().clone(),
                    mlp_norm=block.post_attention_layernorm.weight.detach().clone(),
                    gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    down=mlp.down_proj.weight.detach().clone(),
                )
            )
        embedding = model.model.embed_tokens.weight.detach().clone()
        positions = torch.arange(layout.num_channels, device=embedding.device)
        cos, sin = model.model.rotary_emb(embedding, positions[None])
        return cls(
            layers=layers,
            embedding=embedding,
            final_norm=model.model.norm.weight.detach().clone(),
            code_head=model.lm_head.weight[: layout.codebook_size].detach().clone(),
            cos=cos[0],
            sin=sin[0],
            num_heads=config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            layout=layout,
        )

    def new_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` positions of `batch_size` rows."""
        head_dim = self.embedding.shape[1] // self.num_heads
        shape = (len(self.layers), batch_size, self.num_heads, length, head_dim)
        return Cache(keys=self.embedding.new_empty(shape), values=self.embedding.new_empty(shape))

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        """Rotary embedding of (... head_dim): pairs are entry i of the first half and i of the second."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[position] + torch.cat([-second, first], dim=-1) * self.sin[position]

    @torch.no_grad()
    def step(self, rows: Tensor, position: int, cache: Cache) -> Tensor:
        """Feed one vocabulary row for each sequence: (b,) -> float32 logits of the next token (b codebook_size).

        `position` counts from 0, the class row; positions are fed in order, each once. Row i of the batch
        reads and writes row i of the cache.
        """
        width = self.embedding.shape[1]
        hidden = F.embedding(rows, self.embedding)
        for i, layer in enumerate(self.layers):
            normed = F.rms_norm(hidden, (width,), layer.attention_norm, self.norm_eps)
            fused = F.linear(normed, layer.query_key_value)
            query, key, value = rearrange(fused, "b (three n d) -> three b n 1 d", three=3, n=self.num_heads)
            query, key = self._rotate(query, position), self._rotate(key, position)
            cache.keys[i, :, :, position] = key[:, :, 0]
            cache.values[i, :, :, position] = value[:, :, 0]
            keys, values = cache.keys[i, :, :, : position + 1], cache.values[i, :, :, : position + 1]
            mixed = F.scaled_dot_product_attention(query, keys, values)
            hidden = hidden + F.linear(rearrange(mixed, "b n 1 d -> b (n d)"), layer.attention_out)
            normed = F.rms_norm(hidden, (width,), layer.mlp_norm, self.norm_eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        normed = F.rms_norm(hidden, (width,), self.final_norm, self.norm_eps)
        return F.linear(normed, self.code_head).float()
