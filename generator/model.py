"""ChannelGPT: a transformer over channel tokens that predicts the bits of the next channel's code."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.bit_prior import BitPrior
from common.checkpoint import SavedModel, resolve_folder
from common.config import InputError
from generator.config import ChannelGPTConfig, GeneratorConfig, size_of

INIT_STD = 0.02
NORM_EPS = 1e-5


class ChannelMap(nn.Module):
    """A linear map for each channel: a weight shared by all channels plus one of each channel, all initially 0."""

    def __init__(self, num_channels: int, inputs: int, outputs: int):
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(outputs, inputs))
        self.own = nn.Parameter(torch.zeros(num_channels, outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of channels 0..k-1, (b k i) -> (b k o)."""
        own = torch.einsum("bki,koi->bko", x, self.own[: x.shape[1]])
        return F.linear(x, self.shared) + own


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings, (length head_dim) float32 each (Su et al., 2021, arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to (... d); pairs are entry i of the first half and entry i of the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Block(nn.Module):
    """Pre-norm transformer block of Llama (Touvron et al., 2023, arXiv 2302.13971): causal attention and SwiGLU."""

    def __init__(self, config: ChannelGPTConfig, dropout: float, attention_dropout: float):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_heads, self.attention_dropout = config.num_heads, attention_dropout
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b k d) -> (b k d); cos and sin (k head_dim)."""
        # fmt: off
        fused = self.query_key_value(self.attention_norm(x))                                    # b k 3nd
        q, k, v = rearrange(fused, "b k (three n d) -> three b n k d", three=3, n=self.num_heads)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)                 # b n k d
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)      # b n k d
        x = x + self.dropout(self.attention_out(rearrange(mixed, "b n k d -> b k (n d)")))      # b k d
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)                              # b k inner
        return x + self.dropout(self.down(F.silu(gate) * up))                                   # b k d
        # fmt: on


class ChannelGPT(SavedModel):
    """Class-conditional autoregressive model of channel tokens.

    Tokens are predicted bit by bit. The log-odds of a bit are the sum of a linear prior over all earlier bits
    (`BitPrior`), of the transformer's output for its channel, and of a weight, also from the transformer, for each
    earlier bit of the same token. So the probabilities of the 2**n codes of a token sum to 1 by construction, and no
    weight has a row for each code. `dropout` is the probability of dropping entries after the embedding and in each
    residual branch, `attention_dropout` that of attention weights.
    """

    config_class = ChannelGPTConfig
    model_type = "channel_gpt"
    config: ChannelGPTConfig

    def __init__(self, config: ChannelGPTConfig, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__(config)
        channels, bits, width = config.num_channels, config.num_bits, config.hidden_size
        self.prior = BitPrior(channels, bits, config.num_classes)
        self.read_bits = ChannelMap(channels, bits, width)
        self.channel_vectors = nn.Parameter(torch.zeros(channels, width))
        self.class_vectors = nn.Parameter(torch.zeros(config.num_classes + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(config, dropout, attention_dropout) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.bit_head = ChannelMap(channels, width, bits)
        self.pair_head = nn.Linear(width, bits * (bits - 1) // 2, bias=False)
        self.checkpoints_blocks = False
        # weights that are about to be loaded need no values, and normal_ of the meta device imports the compiler
        if self.device.type != "meta":
            self._initialize()

    def _initialize(self) -> None:
        layers = [layer for block in self.blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
        vectors = [self.read_bits.shared, self.channel_vectors, self.class_vectors]
        for weight in [*vectors, *(layer.weight for layer in layers)]:
            nn.init.normal_(weight, std=INIT_STD)
        # small, so that training starts from the prior
        nn.init.normal_(self.bit_head.shared, std=INIT_STD / 10)
        nn.init.zeros_(self.pair_head.weight)

    def forward(self, class_labels: Tensor, bits: Tensor) -> Tensor:
        """Log-odds of each bit given the class, the tokens before it and the bits before it in its own token.

        Args:
            class_labels: (b,) in [0, null_label].
            bits: (b k n), entries +-1, k <= C.

        Returns:
            (b k n) float32. The negative log-likelihood of token t is softplus(-bits[:, t] * result[:, t]).sum(-1).
        """
        length, config = bits.shape[1], self.config
        # fmt: off
        x = self.read_bits(bits)                                                                # b k d
        x = F.pad(x[:, :-1], (0, 0, 1, 0))                                                      # b k d, shifted by one
        x = x + self.channel_vectors[:length] + self.class_vectors[class_labels, None]          # b k d
        x = self.dropout(x)
        cos, sin = rotary_tables(length, config.head_dim, config.rope_theta, x.device)          # k head_dim
        # with checkpoints, activations are computed again in the backward pass
        call = partial(checkpoint, use_reentrant=False) if self.checkpoints_blocks else nn.Module.__call__
        for block in self.blocks:
            x = call(block, x, cos, sin)                                                        # b k d
        x = self.norm(x)
        pairs = lower_triangle(self.pair_head(x).float(), config.num_bits)                      # b k n n
        log_odds = self.bit_head(x).float() + (pairs * bits[:, :, None]).sum(-1)                # b k n
        return log_odds + self.prior.log_odds(bits, class_labels)                               # b k n
        # fmt: on


def lower_triangle(entries: Tensor, size: int) -> Tensor:
    """(... size (size - 1) / 2) -> (... size size), the strictly lower triangle row by row, zeros elsewhere."""
    rows, columns = torch.tril_indices(size, size, -1, device=entries.device)
    matrix = entries.new_zeros(*entries.shape[:-1], size, size)
    matrix[..., rows, columns] = entries
    return matrix


def start_from(name_or_path: str | Path, config: ChannelGPTConfig, **dropouts: float) -> ChannelGPT:
    """Load a trained generator for further training, possibly on other classes.

    If the classes differ, each new one starts as the null class, or as the mean of the old classes if the model was
    trained without a null class; all other weights are kept.

    `name_or_path` is a folder that `train_ar.py` wrote, its generator/, or a name on the Hugging Face hub; the size in
    `config` must be the default or that of the model.

    Raises:
        InputError: a model of another tokenizer, or of another size than requested.
    """
    folder = resolve_folder(name_or_path)
    old = ChannelGPT.from_pretrained(folder / "generator" if (folder / "generator").is_dir() else folder)
    for name in ("tokenizer_fingerprint", "num_channels", "num_bits"):
        there, wanted = getattr(old.config, name), getattr(config, name)
        if there != wanted:
            raise InputError(
                f"init_from {name_or_path} was trained with {name} {there}, these tokens have {wanted}; "
                "extract them with the tokenizer of that model"
            )
    given, found, default = (vars(size_of(part)) for part in (config, old.config, GeneratorConfig()))
    wrong = [name for name in found if given[name] != found[name]]
    if wrong and given != default:
        raise InputError(
            f"{wrong[0]} is {given[wrong[0]]}, but init_from {name_or_path} has {found[wrong[0]]}; omit the size"
        )
    model = ChannelGPT(replace(config, **found), **dropouts)
    state = old.state_dict()
    if config.class_names != old.config.class_names:
        for name in ("class_vectors", "prior.class_bias"):
            classes, null = state[name][:-1], state[name][-1:]
            start = null if old.config.has_null_label else classes.mean(0, keepdim=True)
            state[name] = start.repeat(config.num_classes + 1, 1)
    model.load_state_dict(state)
    return model
