"""Settings of `benchmark.py speed`; imports no torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from common.errors import InputError, check_list, check_num_tokens
from generator.config import GENERATOR_SIZES, ChannelGPTConfig, SamplingConfig
from tokenizer.published import PUBLISHED_TOKENIZERS

Sampler = Literal["uncached", "transformers-dynamic", "transformers-static", "eager", "compiled"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
NO_TOKENIZER = "none"
DEFAULT_GENERATOR, DEFAULT_TOKENIZER = "B", "paper-256"


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Models and settings; every combination of number format, batch size and guidance is measured."""

    generator: str | None = field(
        default=None,
        metadata={"help": f"size, with random weights: {', '.join(GENERATOR_SIZES)}; default: {DEFAULT_GENERATOR}"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": f"architecture, with random weights: {', '.join(PUBLISHED_TOKENIZERS)}, or {NO_TOKENIZER}: "
                  f"256 tokens of 14 bits, no pictures; default: {DEFAULT_TOKENIZER}"},
    )  # fmt: skip
    model: str | None = field(default=None, metadata={"help": "instead: a folder with tokenizer/ and generator/"})
    num_tokens: list[int] | None = field(
        default=None, metadata={"help": "each k to report; default: 32 64 128 192, as far as below C, and C"}
    )
    batch_size: list[int] = field(default_factory=lambda: [1], metadata={"help": "images drawn together"})
    dtype: list[Literal["float32", "bfloat16"]] = field(
        default_factory=lambda: ["float32", "bfloat16"], metadata={"help": "number formats"}
    )
    cfg_scale: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "classifier-free guidance; 1 = off, others cost two passes"}
    )
    samplers: list[Sampler] = field(default_factory=lambda: list(SAMPLERS), metadata={"help": "what is compared"})
    repeats: int = field(default=3, metadata={"help": "rounds; their median is reported"})
    seed: int = field(default=0, metadata={"help": "of random weights and of drawing"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    output_dir: str = field(default="runs/speed", metadata={"help": "folder for speed.json, .md and .png"})

    def __post_init__(self) -> None:
        if self.model is not None and (self.generator is not None or self.tokenizer is not None):
            raise InputError("model is given, and so is generator or tokenizer; give either the one or the others")
        if self.generator not in (None, *GENERATOR_SIZES):
            raise InputError(f"generator {self.generator!r} is unknown; allowed: {', '.join(GENERATOR_SIZES)}")
        if self.tokenizer not in (None, *PUBLISHED_TOKENIZERS, NO_TOKENIZER):
            allowed = [*PUBLISHED_TOKENIZERS, NO_TOKENIZER]
            raise InputError(f"tokenizer {self.tokenizer!r} is unknown; allowed: {', '.join(allowed)}")
        for name in ("batch_size", "dtype", "cfg_scale", "samplers"):
            check_list(name, getattr(self, name))
        if self.num_tokens is not None:
            check_num_tokens(self.num_tokens)
        for name, least in (("batch_size", min(self.batch_size)), ("repeats", self.repeats)):
            if least < 1:
                raise InputError(f"{name} is {least}; it must be at least 1")
        for scale in self.cfg_scale:
            SamplingConfig(cfg_scale=scale)  # checks the value

    def budgets(self, model: ChannelGPTConfig) -> list[int]:
        """Each k to report, rising.

        Raises:
            InputError: a k or a guidance that the model does not have.
        """
        channels = model.num_channels
        budgets = sorted(self.num_tokens or [*(k for k in (32, 64, 128, 192) if k < channels), channels])
        if budgets[-1] > channels:
            raise InputError(f"num_tokens has {budgets[-1]}; this model draws 1..{channels}")
        if self.cfg_scale != [1] and not model.has_null_label:
            raise InputError(f"cfg_scale is {self.cfg_scale}, but this model was trained without null label; use 1")
        return budgets
