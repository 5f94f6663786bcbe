"""What is measured: the settings."""

import math
from dataclasses import dataclass, field

from common.errors import InputError, check_list
from common.runtime import DTYPES

BASELINE = ("eager", "float32")
COMPILED = ("compiled", "compiled-channels-last")
PICTURES = "pictures"
VARIANTS = ("eager", "eager-channels-last", *COMPILED, PICTURES)
TASKS = ("encode", "decode")
MAX_SECONDS = 20.0


def layout_of(variant: str) -> str:
    """How a variant lays out its maps: contiguous, channels_last, or "own" where it decides that itself."""
    return "own" if variant == PICTURES else "channels_last" if variant.endswith("channels-last") else "contiguous"


def tasks_of(variant: str) -> tuple[str, ...]:
    """Which of `TASKS` a variant does."""
    return ("decode",) if variant == PICTURES else TASKS


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """What is measured: every variant in every number format, for each batch size.

    Variants are the plain network, eager or compiled, contiguous or channels_last, and "pictures": the
    `PictureDecoder` that the product draws with, which only decodes.

    Raises:
        InputError: a value outside what the line names.
    """

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    batch_size: list[int] = field(default_factory=lambda: [1])
    dtype: list[str] = field(default_factory=lambda: list(DTYPES))
    repeats: int = field(default=3, metadata={"help": "rounds; the median of them is reported, least and most beside"})
    max_seconds: float = field(
        default=MAX_SECONDS, metadata={"help": "a variant is not repeated once its timed runs took this long together"}
    )
    seed: int = field(default=0, metadata={"help": "of the images"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, list[str], tuple[str, ...]], ...] = (
            ("variants", self.variants, VARIANTS),
            ("dtype", self.dtype, tuple(DTYPES)),
        )
        for name, values, allowed in choices:
            for value in values:
                if value not in allowed:
                    raise InputError(f"{name} has {value!r}; allowed: {', '.join(allowed)}")
        for name, given in (("variants", self.variants), ("dtype", self.dtype), ("batch_size", self.batch_size)):
            check_list(name, given)
        if min(self.batch_size) < 1:
            raise InputError(f"batch_size has {min(self.batch_size)}; it must be at least 1")
        if self.repeats < 1:
            raise InputError(f"repeats is {self.repeats}; it must be at least 1")
        if not (math.isfinite(self.max_seconds) and self.max_seconds > 0):
            raise InputError(f"max_seconds is {self.max_seconds}; it must be above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must be in 0 .. 2**63 - 1")
