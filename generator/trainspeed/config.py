"""What is measured: the settings, and the models."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import LlamaForCausalLM

from common.errors import InputError, check_list
from common.runtime import DTYPES, has_fast_bfloat16
from generator.config import GENERATOR_SIZES, TokenLayout

EAGER, COMPILED, CHECKPOINTED, UNCHUNKED = VARIANTS = ("eager", "compiled", "checkpointed", "unchunked")
MAX_SECONDS = 20.0
SIZES = ("S", "B", "L")


@dataclass(frozen=True, kw_only=True)
class TrainSpeedConfig:
    """What is measured: every variant in every number format, for each generator and batch size.

    "eager" is what train_ar.py does by default; of the others each differs from it in one setting.

    Raises:
        InputError: a value outside what the line names.
    """

    generator: list[str] | None = field(
        default=None,
        metadata={"help": f"sizes, with random weights: {' '.join(GENERATOR_SIZES)}; default: {' '.join(SIZES)}"},
    )
    model: str | None = field(default=None, metadata={"help": "instead: a folder with generator/"})
    variants: list[str] | None = field(
        default=None,
        metadata={"help": f"what is compared: {' '.join(VARIANTS)}; default: all on CUDA, else eager checkpointed; "
                  "unchunked only where a batch has more tokens than loss_chunk"},
    )  # fmt: skip
    batch_size: list[int] | None = field(
        default=None, metadata={"help": "sequences that a step handles at once; default: 64 on CUDA, else 4"}
    )
    dtype: list[str] | None = field(
        default=None,
        metadata={"help": "number formats: float32, or bfloat16 (autocast over float32 weights); default: bfloat16 "
                  "where the device computes it in hardware"},
    )  # fmt: skip
    loss_chunk: int = field(default=8192, metadata={"help": "tokens whose logits exist at a time, but for unchunked"})
    repeats: int = field(default=3, metadata={"help": "rounds; the median of them is reported, least and most beside"})
    max_seconds: float = field(
        default=MAX_SECONDS, metadata={"help": "a variant is not repeated once its timed steps took this long together"}
    )
    seed: int = field(default=0, metadata={"help": "of random weights and tokens"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    output_dir: str = field(default="runs/speed", metadata={"help": "folder for train.json, .md and .png"})

    def __post_init__(self) -> None:
        if self.model is not None and self.generator is not None:
            raise InputError("model is given, and so is generator; give the one or the other")
        for name, values, allowed in (
            ("generator", self.generator, tuple(GENERATOR_SIZES)),
            ("variants", self.variants, VARIANTS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("batch_size", self.batch_size, None),
        ):
            if values is None:
                continue
            check_list(name, values)
            for value in values:
                if allowed is not None and value not in allowed:
                    raise InputError(f"{name} has {value!r}; allowed: {', '.join(allowed)}")
        if min(self.batch_size or [1]) < 1:
            raise InputError(f"batch_size has {min(self.batch_size or [1])}; it must be at least 1")
        for name, number in (("loss_chunk", self.loss_chunk), ("repeats", self.repeats)):
            if number < 1:
                raise InputError(f"{name} is {number}; it must be at least 1")
        if not (math.isfinite(self.max_seconds) and self.max_seconds > 0):
            raise InputError(f"max_seconds is {self.max_seconds}; it must be above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must be in 0 .. 2**63 - 1")

    def variants_at(self, device: torch.device, num_tokens: int) -> list[str]:
        """What is compared for a batch of so many tokens.

        Raises:
            InputError: unchunked was asked for, but is no other than eager.
        """
        chunked = num_tokens > self.loss_chunk
        if self.variants is None:
            names = VARIANTS if device.type == "cuda" else (EAGER, CHECKPOINTED) + (UNCHUNKED,) * chunked
            return [name for name in names if name != UNCHUNKED or chunked]
        if UNCHUNKED in self.variants and not chunked:
            raise InputError(
                f"unchunked would do what eager does: a batch of {num_tokens} tokens is one chunk of loss_chunk "
                f"{self.loss_chunk}; give a smaller loss_chunk or a larger batch_size"
            )
        return self.variants

    def batch_sizes_on(self, device: torch.device) -> list[int]:
        """Sequences of a step."""
        return self.batch_size or [64 if device.type == "cuda" else 4]

    def dtypes_on(self, device: torch.device) -> list[str]:
        """Number formats."""
        return self.dtype or ["bfloat16" if has_fast_bfloat16(device) else "float32"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A generator to measure; `build` makes it when its turn comes, so that only one exists at a time."""

    name: str
    layout: TokenLayout
    build: Callable[[], LlamaForCausalLM]
