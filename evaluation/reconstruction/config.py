"""What is measured, and with what."""

from dataclasses import dataclass, field

from common.config import DTYPES
from common.errors import InputError, check_num_tokens
from tokenizer.config import check_ssim_size, evaluation_lengths

PERCEPTUAL = ("lpips", "none")
INCEPTION = ("auto", "none")
VGG_HALVINGS = 16  # the last features of LPIPS are at a sixteenth of the size


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Flags of `benchmark.py reconstruction` beside those of the data."""

    tokenizer: str = field(metadata={"help": "tokenizer folder, or its name on the Hugging Face hub"})
    num_tokens: list[int] | None = field(
        default=None, metadata={"help": "each k to report; default: 1 4 16 64 ... as far as below C, and C"}
    )
    max_images: int | None = field(
        default=None, metadata={"help": "use this many, spread evenly over the data; default: all"}
    )
    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of skipping it"})
    batch_size: int = field(default=32, metadata={"help": "images a pass; changes no result"})
    num_workers: int = field(default=1, metadata={"help": "processes that read images"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    dtype: str = field(
        default="float32", metadata={"help": "number format of the decoder: float32 or bfloat16; encoding is float32"}
    )
    perceptual: str = field(default="lpips", metadata={"help": "lpips (needs VGG weights) or none"})
    perceptual_weights: str | None = field(
        default=None, metadata={"help": "torchvision's vgg16-397923af.pth; default: torch's cache, or a download"}
    )
    inception: str = field(default="auto", metadata={"help": "auto (rFID; needs Inception weights) or none"})
    inception_weights: str | None = field(
        default=None,
        metadata={"help": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth; default: torch's cache, "
                  "or a download"},
    )  # fmt: skip
    curve_images: int = field(
        default=64,
        metadata={"help": "images decoded at every k from 1 to C, for the gain by channel; 0: none"},
    )
    sheet_images: int = field(default=8, metadata={"help": "rows of reconstructions.png; 0: no such picture"})
    prior_images: int = field(
        default=0,
        metadata={"help": "training images, and their mirror images, to fit a linear prior to; measures the rate of "
                  "held-out tokens under it; 0: no rate"},
    )  # fmt: skip
    prior_steps: int = field(default=1200, metadata={"help": "steps of that fit, of 512 images each"})
    prior_samples: int = field(default=2000, metadata={"help": "samples of that prior for --features"})
    features: str | None = field(
        default=None,
        metadata={"help": "classifier of `benchmark.py features`: measure the Fréchet distance of the prior's samples "
                  "in its feature space"},
    )  # fmt: skip
    compare: list[str] = field(
        default_factory=list, metadata={"help": "results.json of other tokenizers, for rate_distortion.png"}
    )
    output_dir: str = field(
        default="runs/reconstruction", metadata={"help": "folder for results.json, results.md and the plots"}
    )

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_num_tokens(self.num_tokens)
        least = {
            "max_images": 1, "batch_size": 1, "num_workers": 0, "curve_images": 0, "sheet_images": 0,
            "prior_images": 0, "prior_steps": 1, "prior_samples": 2,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} is {value}; it must be at least {smallest}")
        for name, allowed in (("dtype", DTYPES), ("perceptual", PERCEPTUAL), ("inception", INCEPTION)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for name in ("perceptual", "inception"):
            if getattr(self, name) == "none" and getattr(self, f"{name}_weights") is not None:
                raise InputError(f"{name} is none, but {name}_weights is given; leave one of them out")
        for name in ("features", "compare"):
            if getattr(self, name) and not self.prior_images:
                raise InputError(f"{name} needs a rate; give --prior-images too, or leave it out")
        if self.inception != "none" and self.max_images == 1:
            raise InputError("max_images is 1; rFID needs at least 2 images, or --inception none")
        if self.features is not None and self.max_images == 1:
            raise InputError("max_images is 1; a distance needs at least 2 images; leave features out")

    def budgets(self, image_size: int, num_channels: int) -> list[int]:
        """Each k to report, rising, for a model of this size.

        Raises:
            InputError: a k that the model does not have, or images too small for what is measured.
        """
        check_ssim_size(image_size)
        if self.perceptual != "none" and image_size < VGG_HALVINGS:
            raise InputError(
                f"pictures have {image_size} pixels a side; LPIPS needs at least {VGG_HALVINGS}, or --perceptual none"
            )
        budgets = sorted(self.num_tokens or evaluation_lengths(num_channels))
        if budgets[-1] > num_channels:
            raise InputError(f"num_tokens has {budgets[-1]}; this model has 1..{num_channels}")
        return budgets
