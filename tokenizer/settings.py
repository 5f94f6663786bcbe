"""Settings of the tokenizer's training, of its data and of extraction; imports no torch."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from common.config import LoopConfig
from common.errors import InputError

KeepDistribution = Literal["uniform", "low", "high"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images: exactly one of `data_dir` and `dataset`."""

    data_dir: str | None = field(default=None, metadata={"help": "folder with train/<class>/* and val/<class>/*"})
    dataset: str | None = field(
        default=None,
        metadata={"help": "in place of data_dir: a data set on the Hugging Face hub, such as ILSVRC/imagenet-1k, "
                  "or a local folder of parquet files or of WebDataset tars"},
    )  # fmt: skip
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of --dataset, where it has several"}
    )
    train_split: str = field(default="train", metadata={"help": "split of --dataset to train on"})
    val_split: str = field(default="validation", metadata={"help": "split of --dataset that is held out"})
    image_column: str | None = field(
        default=None, metadata={"help": "column of --dataset with the images; default: the only one of type Image"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column of --dataset with the classes; default: label, or cls, or one class"}
    )

    def __post_init__(self) -> None:
        if (self.data_dir is None) == (self.dataset is None):
            given = "neither" if self.data_dir is None else "both"
            raise InputError(f"{given} of data_dir and dataset given; give exactly one of --data-dir and --dataset")
        idle = [f.name for f in fields(self)[2:] if self.dataset is None and getattr(self, f.name) != f.default]
        if idle:
            raise InputError(f"{idle[0]} is given, but it describes how to read --dataset; omit it")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What is random about an image in training."""

    random_flip: bool = field(default=True, metadata={"help": "mirror half of the images"})
    min_crop: float = field(
        default=1.0,
        metadata={"help": "smallest share of the shorter side that a random square keeps; 1 = the middle square"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise InputError(f"min_crop is {self.min_crop}; it must be in (0, 1], 1 keeps the middle square")


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Weights of the loss terms; the defaults are the paper's. Distances are per pixel and colour, on [-1, 1].

    The quantizer's term is entropy_weight * (token entropy - codebook_entropy_weight * codebook entropy)
    + commitment_weight * commitment (BSQ, arXiv 2406.07548, section 3; values of ChannelTok).
    """

    l1_weight: float = field(default=0.25, metadata={"help": "weight of the absolute error"})
    l2_weight: float = field(default=0.0, metadata={"help": "weight of the squared error"})
    perceptual: Literal["lpips", "features", "none"] = field(
        default="lpips",
        metadata={"help": "perceptual distance: lpips; features (of the classifier that `benchmark.py features` "
                  "trains, where VGG's weights cannot be had); or none"},
    )  # fmt: skip
    perceptual_weights: str | None = field(
        default=None,
        metadata={"help": "file of torchvision's VGG-16 (vgg16-397923af.pth; default: torchvision downloads it), or of "
                  "the classifier"},
    )  # fmt: skip
    lpips_weight: float = field(default=1.0, metadata={"help": "weight of the perceptual distance"})
    entropy_weight: float = field(default=0.1, metadata={"help": "weight of both entropy terms"})
    codebook_entropy_weight: float = field(default=1.0, metadata={"help": "codebook entropy, relative to the token's"})
    commitment_weight: float = field(default=0.25, metadata={"help": "weight of the distance to the code"})
    inverse_temperature: float = field(default=100.0, metadata={"help": "sharpness of the soft code assignment"})
    entropy_group_bits: int = field(
        default=16, metadata={"help": "bits whose joint entropy is taken, in 1..16; num_bits or more is exact"}
    )

    def __post_init__(self) -> None:
        for name in (
            "l1_weight", "l2_weight", "lpips_weight", "entropy_weight", "codebook_entropy_weight", "commitment_weight",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.perceptual not in ("lpips", "features", "none"):
            raise InputError(f"perceptual is {self.perceptual!r}; allowed: lpips, features, none")
        if self.perceptual == "features" and self.perceptual_weights is None:
            raise InputError("perceptual is features, but no classifier is given; give its file as perceptual_weights")
        if self.perceptual == "none" and self.perceptual_weights is not None:
            raise InputError("perceptual is none, and perceptual_weights names a file; give one or the other")
        if self.l1_weight + self.l2_weight <= 0:
            raise InputError("l1_weight and l2_weight are both 0; one of them must be above 0")
        if not self.inverse_temperature > 0:
            raise InputError(f"inverse_temperature is {self.inverse_temperature}; it must be above 0")
        if not 1 <= self.entropy_group_bits <= 16:
            raise InputError(f"entropy_group_bits is {self.entropy_group_bits}; it must be in 1..16")


@dataclass(frozen=True, kw_only=True)
class TailDropConfig:
    """How many channels an image keeps in training.

    With `mask_probability` an image keeps a random k of C channels, otherwise all of them. With f
    uniform in [0, 1), k = 1 + floor(C g(f)), where g is f (uniform), f**2 (low: short prefixes more
    often) or sqrt(f) (high: long ones more often). Every k from 1 to C can occur.
    """

    mask_probability: float = field(default=0.5, metadata={"help": "share of images that lose a tail, in [0, 1]"})
    keep_distribution: KeepDistribution = field(
        default="uniform", metadata={"help": "which k are drawn more often: uniform, low or high"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.mask_probability <= 1:
            raise InputError(f"mask_probability is {self.mask_probability}; it must be in [0, 1]")
        if self.keep_distribution not in get_args(KeepDistribution):
            raise InputError(
                f"keep_distribution is {self.keep_distribution!r}; allowed: {', '.join(get_args(KeepDistribution))}"
            )


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """The adversarial part of the tokenizer's training; gan_weight 0 leaves it out."""

    gan_weight: float = field(default=0.0, metadata={"help": "weight of the adversarial loss; 0 = no discriminator"})
    gan_weighting: Literal["fixed", "adaptive"] = field(
        default="fixed",
        metadata={"help": "adaptive: times the ratio of the two losses' gradients at the decoder's last layer"},
    )
    gan_start_step: int = field(default=0, metadata={"help": "step from which on the discriminator plays"})
    gan_learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of the discriminator, constant"})
    gan_width: int = field(default=64, metadata={"help": "channels of the discriminator's first layer"})
    gan_layers: int = field(default=3, metadata={"help": "halvings of the picture in the discriminator"})

    def __post_init__(self) -> None:
        if not self.gan_weight >= 0:
            raise InputError(f"gan_weight is {self.gan_weight}; it must not be negative")
        if self.gan_weighting not in ("fixed", "adaptive"):
            raise InputError(f"gan_weighting is {self.gan_weighting!r}; allowed: fixed, adaptive")
        if self.gan_start_step < 0:
            raise InputError(f"gan_start_step is {self.gan_start_step}; it must not be negative")
        if not self.gan_learning_rate > 0:
            raise InputError(f"gan_learning_rate is {self.gan_learning_rate}; it must be above 0")
        if self.gan_width < 32 or self.gan_width % 32:
            raise InputError(f"gan_width is {self.gan_width}; it must be a multiple of 32 (GroupNorm)")
        if not 1 <= self.gan_layers <= 6:
            raise InputError(f"gan_layers is {self.gan_layers}; it must be in 1..6")

    def check_image_size(self, image_size: int) -> None:
        """Refuse pictures that are too small to leave a patch to judge."""
        smallest = 4 * 2**self.gan_layers
        if self.gan_weight > 0 and image_size < smallest:
            raise InputError(
                f"gan_layers {self.gan_layers} needs images of {smallest} pixels or more, image_size is {image_size}; "
                "take fewer gan_layers, or gan_weight 0"
            )


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """Settings of the rate term, its prior, and bit noise.

    The weight of a token's rate changes linearly from the first channel to the last, and rises from 0 over the first
    `rate_warmup_steps`. A weight that rises along the channels gives a lower rate at equal quality than a constant one
    (docs/lab.md).
    """

    rate_weight: float = field(
        default=0.0,
        metadata={"help": "weight of the first channel's rate, per nat and token; 0 without late_rate_weight: no rate "
                  "term"},
    )  # fmt: skip
    late_rate_weight: float | None = field(
        default=None, metadata={"help": "weight of the last channel's rate, linear between; default: rate_weight"}
    )
    rate_warmup_steps: int = field(default=1000, metadata={"help": "steps over which the weights rise from 0"})
    prior_learning_rate: float = field(
        default=1e-3, metadata={"help": "peak learning rate of the prior; follows the tokenizer's schedule"}
    )
    prior_l2_weight: float = field(
        default=1e-5, metadata={"help": "coefficient of the L2 penalty on the prior's weights"}
    )
    prior_label_dropout: float = field(
        default=0.1, metadata={"help": "probability that the prior is given the null label, in [0, 1]"}
    )
    bit_noise: float = field(
        default=0.0,
        metadata={"help": "probability in [0, 0.5] that a bit of the last channel is flipped before the decoder; "
                  "that of channel c of C is c/C of it"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("rate_weight", "late_rate_weight", "rate_warmup_steps", "prior_l2_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; it must be finite and not negative")
        if not 0 < self.prior_learning_rate < math.inf:
            raise InputError(f"prior_learning_rate is {self.prior_learning_rate}; it must be finite and above 0")
        for name, most in (("prior_label_dropout", 1), ("bit_noise", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, {most}]")

    @property
    def has_rate(self) -> bool:
        """Whether a rate weight is above 0."""
        return max(self.rate_weight, self.late_rate_weight or 0) > 0


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(LoopConfig):
    """Settings of train_tokenizer.py beside the model's, the loss's and the tail drop's."""

    init_from: str | None = field(
        default=None, metadata={"help": "begin with the weights of a trained tokenizer; its sizes are taken over, too"}
    )
    frozen_encoder: bool = field(
        default=False, metadata={"help": "train only what draws, so that tokens stay those of --init-from"}
    )
    save_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the exported tokenizer's file; it computes in float32"}
    )
    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of skipping it"})
    validation_images: int = field(default=2000, metadata={"help": "images of val/ that an evaluation uses"})
    compile: bool = field(default=False, metadata={"help": "compile the model with torch.compile"})
    channels_last: bool = field(
        default=False, metadata={"help": "keep feature maps channels last: faster on GPUs, much slower on CPUs"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_images < 1:
            raise InputError(f"validation_images is {self.validation_images}; it must be at least 1")
        if self.frozen_encoder and self.init_from is None:
            raise InputError("frozen_encoder keeps the tokens of a trained tokenizer; give that as init_from")


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """Flags of extract_tokens.py."""

    tokenizer: str = field(metadata={"help": "tokenizer folder, or its name on the Hugging Face hub"})
    output_dir: str = field(metadata={"help": "folder of the token store; one that was begun is continued"})
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "JSON file that gives classes a readable name; default: names of the folders or of --dataset"
        },
    )
    views: Literal["none", "flip", "ten-crop"] = field(
        default="none",
        metadata={"help": "of train; flip: the mirror image as well; ten-crop: corners and middle of a larger image, "
                  "and their mirror images"},
    )  # fmt: skip
    shard_size: int = field(default=10_000, metadata={"help": "images a shard"})
    batch_size: int = field(default=64, metadata={"help": "images a pass"})
    num_workers: int = field(default=1, metadata={"help": "processes that read images"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of leaving it out"})

    verify: str | None = field(
        default=None, metadata={"help": "alone on the command line: a token store to check, in place of making one"}
    )

    def __post_init__(self) -> None:
        if self.verify is not None:
            raise InputError("verify stands alone on the command line: extract_tokens.py --verify STORE")
        if self.batch_size < 1 or self.shard_size < 1 or self.num_workers < 0:
            raise InputError("batch_size and shard_size must be at least 1, num_workers at least 0")


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainingConfig(LoopConfig):
    """Settings of `benchmark.py features` beside the network's and those of the data."""

    label_smoothing: float = field(default=0.1, metadata={"help": "share of a label that is spread over all classes"})
    class_names: str | None = field(
        default=None, metadata={"help": "JSON file: class folder -> name; default: the folder's"}
    )
    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of skipping it"})
    compile: bool = field(default=False, metadata={"help": "compile the network with torch.compile"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
