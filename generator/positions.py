"""Vectors of positions for a Llama, which has none: it learns with them, and is saved with a block that makes them.

Each channel is another thing, so what a token means hangs on where it stands. A Llama is told of distances alone
(RoPE, arXiv 2104.09864), and to find out how far a token is from the class row takes a small model most of its
training. So it learns with a vector for each position, added to the embedding. For use a block is put before the others
that makes those very vectors, so what is saved is an ordinary Llama. Nothing in that block is trained; it is written:

- Rows of the embedding have six entries to spare. In the first classes have a large number, in the second codes.
- Attention: only the class row has a key that says anything. Turned by RoPE, it gets of the attention at position t
  a share that goes up and down with t: two heads with one period, two with another, a quarter apart. No two positions
  have the same four shares, as no two moments look alike on a clock of two hands.
- MLP: functions of the four shares, each of which is 0 but at a position and its nearest, and the one linear map of
  them that gives each position its vector and takes the spare entries out again.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import InputError
from common.runtime import move
from generator.config import TokenLayout

CLASS_FLAG, CODE_FLAG = 0, 1
PERIODS = (7.8, 7.8, 45.0, 45.0)  # of the hands: no two of 256 positions are nearer than 0.17 of their spread
SPARE = 2 + len(PERIODS)
FLAG = 1024.0  # so large that a row's other entries hardly change the norm; exact in bfloat16
SHARE = FLAG / 64  # a whole share in a spare entry
MIDDLE, SWING = 0.5, 0.42  # of a share
MARGIN = 0.3  # of the spread: how far below its position a plane lies at most
STEEPNESS = 100.0  # of the MLP's functions, over the spread of the shares
LARGEST_ERROR = 0.01  # of the vectors' squared size; for all but the spare entries
LARGEST_REST = 0.03  # what stays of FLAG in the spare entries, root mean square


class PositionVectors(nn.Module):
    """Adds a vector for each position to embedded rows (b k d), and keeps their spare entries clear.

    Args:
        length: positions, C.
        width: d.
        scale: standard deviation of a vector's entries at first.
    """

    free: Tensor

    def __init__(self, length: int, width: int, scale: float):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(length, width) * scale)
        self.register_buffer("free", (torch.arange(width) >= SPARE).float(), persistent=False)

    def forward(self, embedded: Tensor) -> Tensor:
        """See the class; k at most `length`."""
        return embedded * self.free + self.vectors[: embedded.shape[1]]


def _flags(length: int, width: int) -> Tensor:
    """What the spare entries of a sequence hold, all others being 0: (1 length width)."""
    flags = torch.zeros(1, length, width)
    flags[:, 0, CLASS_FLAG] = FLAG
    flags[:, 1:, CODE_FLAG] = FLAG
    return flags


@torch.no_grad()
def _write_clock(attention: Any, config: Any, length: int, flag: float) -> None:
    """Let four heads write their shares to the spare entries; `flag` is what is left of FLAG after the norm."""
    width = config.head_dim
    theta = float(dict(config.rope_parameters or {})["rope_theta"])
    turns = theta ** (-torch.arange(width // 2).double() / (width // 2))
    place = torch.arange(1, length).double()
    waves = torch.cat([torch.cos(place[:, None] * turns), torch.sin(place[:, None] * turns)], dim=1)
    for head, period in enumerate(PERIODS):
        share = MIDDLE + SWING * torch.sin(2 * math.pi * place / period + head % 2 * math.pi / 2)
        # the class row's score against `place` others of score 0
        wanted = place.log() + torch.logit(share)
        gram = waves.T @ waves + 1e-3 * length * torch.eye(width, dtype=torch.float64)
        amplitudes = torch.linalg.solve(gram, waves.T @ wanted) * math.sqrt(width) / flag**2
        size = amplitudes.abs().max().sqrt().clamp(min=1e-6)
        rows = slice(head * width, (head + 1) * width)
        key = torch.cat([size.expand(width // 2), torch.zeros(width // 2)])
        # RoPE turns (q1, q2) to (q1 cos - q2 sin, ...)
        query = torch.cat([amplitudes[: width // 2], -amplitudes[width // 2 :]]) / size
        attention.k_proj.weight[rows, CLASS_FLAG] = key.float()
        attention.q_proj.weight[rows, CODE_FLAG] = query.float()
        attention.v_proj.weight[head * width, CLASS_FLAG] = 1 / flag
        attention.o_proj.weight[2 + head, head * width] = SHARE


def _fit(found: Tensor, wanted: Tensor) -> Tensor:
    """The linear map (d u) that takes rows of `found` (C u) nearest to rows of `wanted` (C d), all float64."""
    gram = found.T @ found
    ridge = 1e-8 * gram.diagonal().mean().clamp(min=1e-9) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, found.T @ wanted).T


@torch.no_grad()
def counting_block(config: Any, vectors: Tensor) -> dict[str, Tensor]:
    """Weights of a first block that adds vectors (C d) to its rows, and clears their spare entries of FLAG.

    All are exact in bfloat16, the last map is a least-squares fit. `config` is a LlamaConfig; all is on the CPU.

    Raises:
        InputError: a size in which that cannot be had.
    """
    length, width = vectors.shape
    one = LlamaConfig.from_dict({**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama: Any = LlamaForCausalLM(one).model.float().eval()
        slopes = torch.randn(config.intermediate_size, len(PERIODS)) / 4
        offsets = torch.randn(config.intermediate_size)
        margins = torch.rand(config.intermediate_size)
    block, flags = llama.layers[0], _flags(length, width)
    for weight in block.parameters():
        weight.zero_()
    block.input_layernorm.weight[:2] = 1
    block.post_attention_layernorm.weight[:SPARE] = 1
    _write_clock(block.self_attn, config, length, math.sqrt(width))
    places = torch.arange(length)[None]
    turned = llama.rotary_emb(flags, places)

    def round_all() -> None:
        for weight in block.parameters():
            weight.copy_(weight.bfloat16())

    def after_attention() -> tuple[Tensor, Tensor]:
        seen = block.input_layernorm(flags)
        rows = flags + block.self_attn(hidden_states=seen, position_embeddings=turned, attention_mask=None)[0]
        return rows[0], block.post_attention_layernorm(rows)[0]

    round_all()
    _, seen = after_attention()
    shares = seen[:, 2:SPARE]
    spread = shares.std(correction=0).clamp(min=1e-3)
    # all lie on a torus and about as far from its middle, so a plane cuts off any position with its neighbours
    centres = shares[torch.arange(config.intermediate_size) % length]
    directions = F.normalize(centres - shares.mean(0), dim=1)
    margins = MARGIN * spread * margins
    gate, up, down = block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight
    gate[:, 2:SPARE] = directions * STEEPNESS / spread
    up[:, 2:SPARE] = slopes / spread
    for flag, size in ((CLASS_FLAG, seen[0, CLASS_FLAG]), (CODE_FLAG, seen[-1, CODE_FLAG].clamp(min=1))):
        gate[:, flag] = -(gate[:, 2:SPARE] * (centres - directions * margins[:, None])).sum(1) / size
        up[:, flag] = offsets / size
    # and twice a function for each spare entry that is as large as the entry, to take that out
    gate[: 2 * SPARE], up[: 2 * SPARE] = 0, 0
    gate[: 2 * SPARE, :2] = 1
    up[: 2 * SPARE, :SPARE] = torch.eye(SPARE).repeat(2, 1)
    round_all()
    rows, seen = after_attention()
    found = (F.silu(seen @ gate.T) * (seen @ up.T)).double()
    wanted = vectors.detach().double() - rows
    # what rounding leaves of the first fit is small, and of a second one with other units it leaves as small a part
    cut = max(len(gate) - length, len(gate) // 2, 2 * SPARE)
    for units in (slice(0, SPARE), slice(SPARE, 2 * SPARE), slice(2 * SPARE, cut), slice(cut, None)):
        down[:, units] = _fit(found[:, units], wanted).bfloat16().float()
        wanted = wanted - found[:, units] @ down[:, units].double().T
    error = wanted[:, SPARE:].square().mean() / vectors.detach().double().square().mean().clamp(min=1e-12)
    rest = wanted[:, :SPARE].square().mean().sqrt()
    if not (error < LARGEST_ERROR and rest < LARGEST_REST):
        raise InputError(
            f"position_vectors cannot be made by a block of width {width}, {config.num_attention_heads} heads and "
            f"intermediate_size {config.intermediate_size} for {length} positions (error {error:.2g}, {rest:.2g}); "
            "take a larger intermediate_size or wider heads, or leave position_vectors out"
        )
    return copy.deepcopy(block.state_dict())


def check_can_count(config: Any, length: int) -> None:
    """Refuse sizes for which there is no counting block, before anything is trained.

    Raises:
        InputError: the size, and what to do.
    """
    if config.num_attention_heads < len(PERIODS):
        raise InputError(
            f"num_heads is {config.num_attention_heads}; position_vectors need {len(PERIODS)} or more, "
            "or leave position_vectors out"
        )
    if config.intermediate_size < 4 * SPARE:
        raise InputError(
            f"intermediate_size is {config.intermediate_size}; position_vectors need {4 * SPARE} or more, "
            "or leave position_vectors out"
        )
    rng = torch.Generator().manual_seed(0)
    counting_block(config, torch.randn(length, config.hidden_size, generator=rng))


def _renumbered(llama: LlamaForCausalLM, by: int) -> dict[str, Tensor]:
    """Its weights, with the numbers of its blocks raised; a block that would be below 0 is left out."""
    state = {}
    for name, weight in llama.state_dict().items():
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            if int(number) + by < 0:
                continue
            name = f"model.layers.{int(number) + by}.{rest}"
        state[name] = weight
    return state


@torch.no_grad()
def with_counting(llama: LlamaForCausalLM, vectors: Tensor, layout: TokenLayout) -> LlamaForCausalLM:
    """A Llama of one block more, which is by itself what `llama` is with `PositionVectors`."""
    config = LlamaConfig.from_dict({**llama.config.to_dict(), "num_hidden_layers": llama.config.num_hidden_layers + 1})
    state = _renumbered(llama, 1)
    block = counting_block(llama.config, vectors.float().cpu())
    for name, weight in block.items():
        state[f"model.layers.0.{name}"] = weight.to(vectors)
    rows = state["model.embed_tokens.weight"].clone()
    rows[:, :SPARE] = 0
    rows[: layout.codebook_size, CODE_FLAG] = FLAG
    rows[layout.codebook_size :, CLASS_FLAG] = FLAG
    state["model.embed_tokens.weight"] = rows
    with torch.random.fork_rng(devices=[]):
        longer = move(LlamaForCausalLM(config), vectors.device, vectors.dtype)
    longer.load_state_dict(state)
    return longer.train(llama.training)


def learned_blocks(llama: LlamaForCausalLM, layout: TokenLayout) -> list[Any]:
    """Its blocks without the one that counts, if there is one."""
    return list(llama.model.layers)[1 if layout.first_block_counts else 0 :]


@torch.no_grad()
def counted_vectors(llama: LlamaForCausalLM, length: int) -> Tensor:
    """What the first block of such a model adds at each position: (length d) float32, on the CPU.

    Sums are float64, so that the block has no order of theirs to enlarge; norms round to float32, each entry alone.
    """
    network: Any = llama.model
    block, rotary = (copy.deepcopy(part).to("cpu").eval() for part in (network.layers[0], network.rotary_emb))
    flags, places = _flags(length, llama.config.hidden_size).double(), torch.arange(length)[None]
    earlier = torch.full((1, 1, length, length), -torch.inf, dtype=flags.dtype).triu(1)
    seen: Tensor = block.double()(
        flags, attention_mask=earlier, position_embeddings=rotary(flags, places), position_ids=places
    )
    return seen.reshape(length, -1).float()


def without_flags(embedding: Tensor) -> Tensor:
    """The rows of such a model's embedding (v d) for a model that does not count."""
    rows = embedding.detach().clone()
    rows[:, :SPARE] = 0
    return rows


@torch.no_grad()
def without_counting(llama: LlamaForCausalLM, length: int) -> tuple[LlamaForCausalLM, Tensor]:
    """What `with_counting` was given: a Llama of one block less, and vectors (length d)."""
    vectors = counted_vectors(llama, length)
    config = LlamaConfig.from_dict({**llama.config.to_dict(), "num_hidden_layers": llama.config.num_hidden_layers - 1})
    state = _renumbered(llama, -1)
    state["model.embed_tokens.weight"] = without_flags(state["model.embed_tokens.weight"])
    with torch.random.fork_rng(devices=[]):
        shorter = LlamaForCausalLM(config)
    shorter.load_state_dict(state)
    return shorter, vectors
