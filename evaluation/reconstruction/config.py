"""Settings of `benchmark.py reconstruction`; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from common.config import Config, Dtype, Refinement, report_lengths, setting
from common.errors import InputError
from tokenizer.config import check_ssim_size, evaluation_lengths


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(Config):
    """Flags of `benchmark.py reconstruction` beside those of the data."""

    tokenizer: str = setting(help="tokenizer folder, or its name on the Hugging Face hub", reads=True)
    num_tokens: list[int] | None = setting(
        None, "each k to report; default: 1 4 16 64 ... below C, and C", ge=1, unique=True
    )
    max_images: int | None = setting(None, "number of images, spread evenly over the data; default: all", ge=1)
    strict: bool = setting(False, "stop at an unreadable image instead of skipping it")
    batch_size: int = setting(32, "images a pass; changes no result", ge=1, le=2**16)
    num_workers: int = setting(1, "processes that read images", ge=0, le=256)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: Dtype = setting("float32", "number format of the decoder; encoding is float32")
    perceptual: Literal["lpips", "none"] = setting("lpips", "lpips needs VGG weights")
    perceptual_weights: str | None = setting(
        None, "torchvision's vgg16-397923af.pth; default: torch's cache, or a download"
    )
    inception: Literal["auto", "none"] = setting("auto", "auto: rFID; needs Inception weights")
    inception_weights: str | None = setting(
        None, "weights-inception-2015-12-05-6726825d.pth; default: as for perceptual_weights"
    )
    refiner: str | None = setting(
        None, "refiner folder: measure refined reconstructions, too, in rows of their own", reads=True
    )
    refine: int = setting(Refinement.steps, "with --refiner: its steps", ge=1, le=1000)
    curve_images: int = setting(0, "images decoded at every k from 1 to C, for the gain of each channel; slow", ge=0)
    sheet_images: int = setting(8, "rows of reconstructions.png; 0: no such picture", ge=0, le=1000)
    prior_images: int = setting(
        0, "training images to fit a linear prior to, for the rate of held-out tokens; 0: no rate", ge=0
    )
    features: str | None = setting(
        None, "classifier of `benchmark.py features`, for distances of reconstructions and prior samples"
    )
    output_dir: str = setting("runs/reconstruction", "folder for results and plots")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("perceptual", "inception"):
            if getattr(self, name) == "none" and getattr(self, f"{name}_weights") is not None:
                raise InputError(f"{name} is none, but {name}_weights is given; omit one of them")
        if self.max_images == 1 and (self.inception != "none" or self.features is not None):
            raise InputError("max_images is 1; rFID and features need at least 2 images; omit them (--inception none)")

    def budgets(self, image_size: int, num_channels: int) -> list[int]:
        """Each k to report, rising; images too small for SSIM are refused."""
        check_ssim_size(image_size)
        return report_lengths(self.num_tokens, num_channels, evaluation_lengths(num_channels))
