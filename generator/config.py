"""The generator's configuration: its size, and the layout of its vocabulary."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from transformers import LlamaConfig

from common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Size of the Llama; the defaults are the paper's size B (arXiv 2606.04461, generator table)."""

    num_layers: int = field(default=12, metadata={"help": "transformer blocks"})
    num_heads: int = field(default=12, metadata={"help": "attention heads"})
    hidden_size: int = field(default=768, metadata={"help": "width of the residual stream"})
    intermediate_size: int = field(default=2048, metadata={"help": "width inside the SwiGLU"})
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary position embedding"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout of attention weights in training"})

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise InputError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads = {2 * self.num_heads}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise InputError(f"attention_dropout is {self.attention_dropout}; it must be in [0, 1)")

    @classmethod
    def of(cls, config: LlamaConfig) -> Self:
        """The size of a model that there is."""
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            rope_theta=float(dict(config.rope_parameters or {})["rope_theta"]),
            attention_dropout=float(config.attention_dropout or 0),
        )


# B and L are the paper's; XL and XXL are the next ones of the family that they come from (LlamaGen, arXiv 2406.06525),
# S is for machines without a GPU. Parameters with 14 bits and 1000 classes: 25.7M, 111.6M, 343.9M, 775.9M, 1,412.4M.
GENERATOR_SIZES = {
    "S": GeneratorConfig(num_layers=7, num_heads=6, hidden_size=384, intermediate_size=1024),
    "B": GeneratorConfig(),
    "L": GeneratorConfig(num_layers=24, num_heads=16, hidden_size=1024, intermediate_size=2816),
    "XL": GeneratorConfig(num_layers=36, num_heads=20, hidden_size=1280, intermediate_size=3584),
    "XXL": GeneratorConfig(num_layers=48, num_heads=24, hidden_size=1536, intermediate_size=4096),
}


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """What the rows of the vocabulary mean, and which tokenizer the codes belong to.

    Rows [0, codebook_size) are codes, codebook_size + c is class c, and the last row is the null class.
    A sequence is one class row and then the tokens, coarse to fine. `has_null_label` says whether
    training dropped labels, so that guidance has an unconditional half to push away from; `first_block_counts`, whether
    the first block was written down to make positions (`generator.positions`).
    """

    num_channels: int
    num_bits: int
    class_names: list[str]
    tokenizer_fingerprint: str
    has_null_label: bool
    first_block_counts: bool = False

    @property
    def codebook_size(self) -> int:
        """Number of code rows."""
        return int(2**self.num_bits)

    @property
    def num_classes(self) -> int:
        """Number of classes, the null class not counted."""
        return len(self.class_names)

    @property
    def null_label(self) -> int:
        """The class label that stands for no class."""
        return self.num_classes

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return self.codebook_size + self.num_classes + 1

    def class_rows(self, class_labels: Tensor) -> Tensor:
        """Class labels (b,) in [0, null_label] -> their rows of the vocabulary (b,)."""
        return class_labels + self.codebook_size

    def inputs(self, class_labels: Tensor, tokens: Tensor) -> Tensor:
        """What the network reads to predict `tokens` (b k): the class row and all tokens but the last, (b k)."""
        return torch.cat([self.class_rows(class_labels)[:, None], tokens[:, :-1]], dim=1)

    def check_labels(self, class_labels: Tensor) -> None:
        """Refuse labels outside [0, null_label]."""
        wrong = class_labels[(class_labels < 0) | (class_labels > self.null_label)]
        if len(wrong):
            raise InputError(
                f"class label {int(wrong[0])} is out of range; allowed are 0..{self.num_classes - 1}, "
                f"and {self.null_label} for no class"
            )

    @classmethod
    def from_json(cls, content: dict[str, object], where: str) -> Self:
        """Build from the content of channeltok.json."""
        try:
            return cls(**content)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError(f"{where} does not describe a ChannelTok generator ({error})") from error


def llama_config(config: GeneratorConfig, layout: TokenLayout) -> LlamaConfig:
    """The transformers configuration of this size and vocabulary."""
    return LlamaConfig(
        vocab_size=layout.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=layout.num_channels + 1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_dropout=config.attention_dropout,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
