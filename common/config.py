"""Settings that several commands share; imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from common.errors import InputError

DTYPES = ("float32", "bfloat16")
GROUPS = 8  # of the classifier's GroupNorms


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings that both training scripts share. A step is one optimizer step over `batch_size` images."""

    output_dir: str = field(metadata={"help": "folder for the model, checkpoints, pictures and log.jsonl"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest checkpoint in output_dir"})
    steps: int = field(default=100_000, metadata={"help": "optimizer steps in all"})
    batch_size: int = field(default=256, metadata={"help": "images a step, over all processes together"})
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "images that a process handles at a time, gradients being added up; default: all of its own"},
    )
    learning_rate: float = field(default=4e-4, metadata={"help": "peak learning rate"})
    min_learning_rate: float = field(default=0.0, metadata={"help": "learning rate at the last step of a cosine"})
    schedule: Literal["cosine", "constant"] = field(
        default="cosine", metadata={"help": "of the learning rate, after the warm-up"}
    )
    warmup_steps: int = field(default=1000, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay, on matrices only"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW beta1"})
    beta2: float = field(default=0.95, metadata={"help": "AdamW beta2"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.9999, metadata={"help": "decay of the averaged weights; 0 = the last ones"})
    mixed_precision: Literal["auto", "no", "bf16"] = field(
        default="auto", metadata={"help": "auto = bf16 where the device computes it in hardware"}
    )
    seed: int = field(default=0, metadata={"help": "decides initial weights, data order and every draw"})
    num_workers: int = field(default=1, metadata={"help": "processes that read data, for each training process"})
    evaluate_every: int = field(default=1000, metadata={"help": "steps between evaluations, each with a picture"})
    checkpoint_every: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of the newest checkpoints stay"})
    trackers: list[str] = field(
        default_factory=list, metadata={"help": "accelerate's trackers to log to, for example tensorboard or wandb"}
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise InputError(f"micro_batch_size is {self.micro_batch_size}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("min_learning_rate", "warmup_steps", "weight_decay", "num_workers", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.schedule not in ("cosine", "constant"):
            raise InputError(f"schedule is {self.schedule!r}; allowed: cosine, constant")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The network: a stem that halves the picture, then a residual block for each width, halving from the second on."""

    classifier_size: int = field(default=64, metadata={"help": "pixels of a side that pictures are resized to"})
    widths: list[int] = field(
        default_factory=lambda: [32, 64, 128, 256], metadata={"help": "channels of each block; the last are features"}
    )

    def __post_init__(self) -> None:
        smallest = 2 ** len(self.widths)
        if not self.widths or any(width < 1 or width % GROUPS for width in self.widths):
            raise InputError(f"widths is {self.widths}; give one or more multiples of {GROUPS}")
        if self.classifier_size < 1 or self.classifier_size % smallest:
            raise InputError(f"classifier_size is {self.classifier_size}; it must be a multiple of {smallest}")
        if self.classifier_size == smallest:  # GroupNorm would have a single place to take its mean over
            raise InputError(f"classifier_size is {smallest}; with {len(self.widths)} widths it must be larger")


@dataclass(frozen=True)
class Refinement:
    """How images are refined.

    Attributes:
        steps: of the integration, at least 1; each but the last costs two passes, the last one.
        cfg_scale: classifier-free guidance; 1 = off and costs half.
        temperature: standard deviation of the noise; below 1 less detail is drawn, and with it fewer errors.
    """

    steps: int = 4
    cfg_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"refine is {self.steps}; it must be a number of steps of at least 1, or 0 for none")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise InputError(f"refine_cfg_scale is {self.cfg_scale}; it must be 0 or above")
        if not 0 <= self.temperature <= 2:
            raise InputError(f"refine_temperature is {self.temperature}; it must be in [0, 2]")
