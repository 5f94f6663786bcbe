"""Settings of `benchmark.py speed`; imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from common.config import Config, Dtype, report_lengths, setting
from common.errors import InputError
from generator.config import ChannelGPTConfig, Size

Sampler = Literal["uncached", "transformers-dynamic", "transformers-static", "eager", "compiled"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
NO_TOKENIZER = "none"
DEFAULT_GENERATOR, DEFAULT_TOKENIZER = "B", "paper-256"


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(Config):
    """Models and settings; every combination of number format, batch size and guidance is measured."""

    generator: Size | None = setting(None, f"size, with random weights; default: {DEFAULT_GENERATOR}")
    tokenizer: Literal["paper-256", "paper-512", "none"] | None = setting(
        None,
        f"architecture, with random weights; none: 256 tokens of 14 bits, no images; default: {DEFAULT_TOKENIZER}",
    )
    model: str | None = setting(None, "instead: a folder with tokenizer/ and generator/", reads=True)
    num_tokens: list[int] | None = setting(
        None, "each k to report; default: 32 64 128 192, as far as below C, and C", ge=1, unique=True
    )
    batch_size: list[int] = setting([1], "images drawn together", ge=1, le=2**16, unique=True)
    dtype: list[Dtype] = setting(["float32", "bfloat16"], "number formats", unique=True)
    cfg_scale: list[float] = setting(
        [1.0], "classifier-free guidance; 1 = off, others cost two passes", ge=0, unique=True
    )
    samplers: list[Sampler] = setting(list(SAMPLERS), "what is compared", unique=True)
    repeats: int = setting(3, "rounds; their median is reported", ge=1, le=1000)
    seed: int = setting(0, "of random weights and of drawing")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    output_dir: str = setting("runs/speed", "folder for speed.json, .md and .png")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and (self.generator is not None or self.tokenizer is not None):
            raise InputError("model is given, and so is generator or tokenizer; give either the one or the others")

    def budgets(self, model: ChannelGPTConfig) -> list[int]:
        """Each k to report, rising.

        Raises:
            InputError: a k or a guidance that the model does not have.
        """
        if self.cfg_scale != [1] and not model.has_null_label:
            raise InputError(f"cfg_scale is {self.cfg_scale}, but this model was trained without null label; use 1")
        return report_lengths(self.num_tokens, model.num_channels, (32, 64, 128, 192))
