"""Settings of the speed benchmark; imports no torch."""

import math
from dataclasses import dataclass, field

from common.config import DTYPES
from common.errors import InputError, check_list
from generator.config import ChannelGPTConfig

OURS = ("eager", "compiled")
SAMPLERS = ("uncached", "transformers-dynamic", "transformers-static", *OURS)


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What is measured. Every combination of number format, batch size and guidance is one setting."""

    num_tokens: list[int] | None = field(
        default=None, metadata={"help": "each k to report; default: 32 64 128 192, as far as below C, and C"}
    )
    batch_size: list[int] = field(default_factory=lambda: [1], metadata={"help": "images drawn side by side"})
    dtype: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16"], metadata={"help": "number formats: float32, bfloat16"}
    )
    cfg_scale: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "classifier-free guidance; 1 = off, others cost two passes"}
    )
    samplers: list[str] = field(
        default_factory=lambda: list(SAMPLERS), metadata={"help": f"what is compared: {' '.join(SAMPLERS)}"}
    )
    full_uncached: bool = field(
        default=False, metadata={"help": "uncached: measure every prefix length, not a few to interpolate between"}
    )
    repeats: int = field(default=3, metadata={"help": "rounds; the median of them is reported, the least beside it"})
    seed: int = field(default=0, metadata={"help": "of random weights and of drawing"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})

    def __post_init__(self) -> None:
        for name in ("batch_size", "dtype", "cfg_scale", "samplers"):
            values = getattr(self, name)
            check_list(name, values)
        for name, allowed in (("dtype", DTYPES), ("samplers", SAMPLERS)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise InputError(f"{name} has {value!r}; allowed: {', '.join(allowed)}")
        counts = {"num_tokens": self.num_tokens or [], "batch_size": self.batch_size, "repeats": [self.repeats]}
        for name, numbers in counts.items():
            if min(numbers, default=1) < 1:
                raise InputError(f"{name} has {min(numbers)}; it must be at least 1")
        for scale in self.cfg_scale:
            if not (math.isfinite(scale) and scale >= 0):
                raise InputError(f"cfg_scale has {scale}; it must be 0 or above")
        if not 0 <= self.seed < 2**63 - max(self.batch_size):
            raise InputError(f"seed is {self.seed}; it must be in 0 .. 2**63 - 1 for every image")

    def budgets(self, model: ChannelGPTConfig) -> list[int]:
        """Each k to report, rising; refuses what the model cannot draw."""
        channels = model.num_channels
        budgets = self.num_tokens or [*(k for k in (32, 64, 128, 192) if k < channels), channels]
        if max(budgets) > channels:
            raise InputError(f"num_tokens has {max(budgets)}; this model draws 1..{channels}")
        if self.cfg_scale != [1] and not model.has_null_label:
            raise InputError(f"cfg_scale is {self.cfg_scale}, but this model was trained without null label; use 1")
        return sorted(set(budgets))
