"""What training minimises: the cross-entropy of every token, computed inside the module that is wrapped and sharded."""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from generator.bit_vectors import BitVectors
from generator.config import TokenLayout
from generator.positions import PositionVectors, with_counting

WEIGHTINGS = ("none", "linear", "exponential")
Weighting = Literal["none", "linear", "exponential"]


def position_weights(kind: Weighting, num_channels: int) -> Tensor:
    """Weight of each position's loss, mean 1: (C,).

    linear: falling from 2 at the first token to 1 at the last (the paper's size L, arXiv 2606.04461);
    exponential: halved four times on the way, from 16 to 1.
    """
    weights = {
        "none": torch.ones(num_channels),
        "linear": torch.linspace(2, 1, num_channels),
        "exponential": 2 ** torch.linspace(4, 0, num_channels),
    }[kind]
    return weights / weights.mean()


def _nats(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (r d), the head's rows (v d), targets (r,) -> cross-entropy over all rows, (r,) float32."""
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")


class NextTokenNats(nn.Module):
    """A Llama with its loss: class labels and tokens in, nats of every token out.

    Logits of a whole batch are the largest thing in training (256 sequences of 256 tokens over 17,385 rows
    take 4.6 GB in float32, and as much again for their gradient). So they are made for `chunk` tokens at
    a time, and made again in the backward pass.

    Args:
        llama: trained in place.
        layout: of its vocabulary.
        chunk: tokens whose logits exist at a time; 0 = all.
        dropout: share of entries zeroed after the embedding and in the output of every attention and MLP.
        gradient_checkpointing: keep only the inputs of blocks, and compute blocks again in the backward pass.
        bit_vectors: codes share a vector for each bit, see `BitVectors`.
        position_vectors: each position has a vector, see `PositionVectors`.
    """

    def __init__(
        self,
        llama: LlamaForCausalLM,
        layout: TokenLayout,
        *,
        chunk: int = 0,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        bit_vectors: bool = False,
        position_vectors: bool = False,
    ):
        super().__init__()
        self.llama, self.layout, self.chunk, self.dropout = llama, layout, chunk, dropout
        self._nats = _nats
        if gradient_checkpointing:
            # the name that transformers gave it in 5.18, and the one it had before
            new = hasattr(llama, "activation_checkpointing_enable")
            enable = llama.activation_checkpointing_enable if new else llama.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        width = llama.config.hidden_size
        self.input_bits = BitVectors(layout, width) if bit_vectors else None
        self.head_bits = BitVectors(layout, width) if bit_vectors else None
        scale = llama.config.initializer_range
        self.positions = PositionVectors(layout.num_channels, width, scale) if position_vectors else None
        if dropout:
            # by hooks, so that what is saved stays a plain Llama
            for block in llama.model.layers:
                for module in (block.self_attn.o_proj, block.mlp.down_proj):
                    module.register_forward_hook(_Dropout(dropout))

    def compile_blocks(self) -> None:
        """Compile each block and the loss, in place; as all blocks are alike, that takes as long as one."""
        for block in self.llama.model.layers:
            block.compile()
        self._nats = torch.compile(_nats)

    def forward(self, class_labels: Tensor, tokens: Tensor) -> Tensor:
        """Class labels (b,) in [0, null_label] and tokens (b k) -> nats of every token (b k), float32."""
        rows = self.layout.inputs(class_labels, tokens)
        embedded, head = self.llama.model.embed_tokens(rows), self.llama.lm_head.weight
        if self.input_bits is not None and self.head_bits is not None:
            embedded, head = embedded + self.input_bits(rows), head + self.head_bits()
        if self.positions is not None:
            embedded = self.positions(embedded)
        embedded = F.dropout(embedded, self.dropout, self.training)
        hidden = self.llama.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden, targets = rearrange(hidden, "b k d -> (b k) d"), rearrange(tokens, "b k -> (b k)")
        if 0 < self.chunk < len(hidden):
            parts = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
            nats = torch.cat([self._again(part, head, target) for part, target in parts])
        else:
            nats = self._nats(hidden, head, targets)
        return rearrange(nats, "(b k) -> b k", b=len(tokens))

    @torch.no_grad()
    def begin_with_bits(self) -> None:
        """Let the codes of a fresh model begin as what their bits say alone, in vectors of the usual size.

        Random rows of their own would first have to be unlearned.
        """
        std = self.llama.config.initializer_range * self.layout.num_bits**-0.5
        for bits, own in ((self.input_bits, self.llama.model.embed_tokens), (self.head_bits, self.llama.lm_head)):
            if bits is not None:
                bits.vectors.normal_(std=std)
                own.weight[: self.layout.codebook_size] = 0

    @torch.no_grad()
    def plain(self) -> LlamaForCausalLM:
        """A Llama that has learned what all of this has: its rows have their bits' vectors in them, and it counts."""
        plain = copy.deepcopy(self.llama)
        if self.input_bits is not None and self.head_bits is not None:
            plain.model.embed_tokens.weight += self.input_bits()
            plain.lm_head.weight += self.head_bits()
        return plain if self.positions is None else with_counting(plain, self.positions.vectors, self.layout)

    def _again(self, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """`_nats` of a chunk, whose logits are not kept for the backward pass."""
        nats: Tensor = checkpoint(self._nats, hidden, head, targets, use_reentrant=False, preserve_rng_state=False)
        return nats


class _Dropout:
    """A forward hook; drops while its module is in training."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, self.share, module.training)


def flops_per_token(llama: LlamaForCausalLM, num_tokens: float) -> float:
    """Operations that training on one token of sequences of `num_tokens` takes, forward and backward.

    Two for each multiplication with its sum: 6 for every weight of the blocks and of the head, and
    6 * layers * width * num_tokens for attention, half of a full square, since it looks back only (Chowdhery et al.,
    2022, appendix B, counts the whole square). What is computed again to save memory does not count.
    """
    config = llama.config
    weights = sum(parameter.numel() for parameter in llama.model.layers.parameters() if parameter.ndim == 2)
    weights += llama.lm_head.weight.numel()
    return 6.0 * weights + 6.0 * config.num_hidden_layers * config.hidden_size * num_tokens
