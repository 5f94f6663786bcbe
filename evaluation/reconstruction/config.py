"""Settings of `benchmark.py reconstruction`; imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from common.config import Refinement
from common.errors import InputError, check_num_tokens
from tokenizer.config import check_ssim_size, evaluation_lengths

LEAST = {"max_images": 1, "batch_size": 1, "num_workers": 0, "curve_images": 0, "sheet_images": 0, "prior_images": 0}


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Flags of `benchmark.py reconstruction` beside those of the data."""

    tokenizer: str = field(metadata={"help": "tokenizer folder, or its name on the Hugging Face hub"})
    num_tokens: list[int] | None = field(
        default=None, metadata={"help": "each k to report; default: 1 4 16 64 ... below C, and C"}
    )
    max_images: int | None = field(
        default=None, metadata={"help": "number of images, spread evenly over the data; default: all"}
    )
    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of skipping it"})
    batch_size: int = field(default=32, metadata={"help": "images a pass; changes no result"})
    num_workers: int = field(default=1, metadata={"help": "processes that read images"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the decoder; encoding is float32"}
    )
    perceptual: Literal["lpips", "none"] = field(default="lpips", metadata={"help": "lpips needs VGG weights"})
    perceptual_weights: str | None = field(
        default=None, metadata={"help": "torchvision's vgg16-397923af.pth; default: torch's cache, or a download"}
    )
    inception: Literal["auto", "none"] = field(default="auto", metadata={"help": "auto: rFID; needs Inception weights"})
    inception_weights: str | None = field(
        default=None, metadata={"help": "weights-inception-2015-12-05-6726825d.pth; default: as for perceptual_weights"}
    )
    refiner: str | None = field(
        default=None, metadata={"help": "refiner folder: measure refined reconstructions, too, in rows of their own"}
    )
    refine: int = field(default=Refinement.steps, metadata={"help": "with --refiner: its steps"})
    curve_images: int = field(
        default=0, metadata={"help": "images decoded at every k from 1 to C, for the gain of each channel; slow"}
    )
    sheet_images: int = field(default=8, metadata={"help": "rows of reconstructions.png; 0: no such picture"})
    prior_images: int = field(
        default=0,
        metadata={"help": "training images to fit a linear prior to, for the rate of held-out tokens; 0: no rate"},
    )
    features: str | None = field(
        default=None,
        metadata={"help": "classifier of `benchmark.py features`, for distances of reconstructions and prior samples"},
    )
    output_dir: str = field(default="runs/reconstruction", metadata={"help": "folder for results and plots"})

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_num_tokens(self.num_tokens)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")
        for name in ("perceptual", "inception"):
            if getattr(self, name) == "none" and getattr(self, f"{name}_weights") is not None:
                raise InputError(f"{name} is none, but {name}_weights is given; omit one of them")
        Refinement(self.refine)
        if self.max_images == 1 and (self.inception != "none" or self.features is not None):
            raise InputError("max_images is 1; rFID and features need at least 2 images; omit them (--inception none)")

    def budgets(self, image_size: int, num_channels: int) -> list[int]:
        """Each k to report, rising, for a model of this size.

        Raises:
            InputError: a k that the model does not have, or images too small for SSIM.
        """
        check_ssim_size(image_size)
        budgets = sorted(self.num_tokens or evaluation_lengths(num_channels))
        if budgets[-1] > num_channels:
            raise InputError(f"num_tokens has {budgets[-1]}; this model has 1..{num_channels}")
        return budgets
