"""Settings of the tokenizer's training, of its data and of extraction; imports no torch."""

from dataclasses import dataclass, fields
from typing import Literal

from common.config import Config, InputError, LoopConfig, ModelTrainingConfig, setting

CLASSIFIER_GROUPS = 8  # of the classifier's GroupNorms


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Source of images: exactly one of `data_dir` and `dataset`."""

    data_dir: str | None = setting(None, "folder with train/<class>/* and val/<class>/*", reads=True)
    dataset: str | None = setting(
        None,
        "in place of data_dir: a data set on the Hugging Face hub, such as ILSVRC/imagenet-1k, or a local folder of "
        "parquet files or of WebDataset tars",
        reads=True,
    )
    dataset_config: str | None = setting(None, "configuration of --dataset, where it has several")
    train_split: str = setting("train", "split of --dataset to train on")
    val_split: str = setting("validation", "split of --dataset that is held out")
    image_column: str | None = setting(None, "column of --dataset with the images; default: the only one of type Image")
    label_column: str | None = setting(
        None, "column of --dataset with the classes; default: label, or cls, or one class"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data_dir is None) == (self.dataset is None):
            given = "neither" if self.data_dir is None else "both"
            raise InputError(f"{given} of data_dir and dataset given; give exactly one of --data-dir and --dataset")
        idle = [f.name for f in fields(self)[2:] if self.dataset is None and getattr(self, f.name) != f.default]
        if idle:
            raise InputError(f"{idle[0]} is given, but it describes how to read --dataset; omit it")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Config):
    """Random changes of an image in training."""

    random_flip: bool = setting(True, "mirror half of the images")
    min_crop: float = setting(
        1.0, "smallest share of the shorter side that a random square keeps; 1 = the middle square", gt=0, le=1
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig(Config):
    """Weights of the loss terms; the defaults are the paper's. Distances are per pixel and colour, on [-1, 1].

    The quantizer's term is entropy_weight * (token entropy - codebook_entropy_weight * codebook entropy)
    + commitment_weight * commitment (BSQ, arXiv 2406.07548, section 3; values of ChannelTok).
    """

    l1_weight: float = setting(0.25, "weight of the absolute error", ge=0)
    l2_weight: float = setting(0.0, "weight of the squared error", ge=0)
    perceptual: Literal["lpips", "none"] = setting("lpips", "perceptual distance; lpips needs VGG's weights")
    perceptual_weights: str | None = setting(
        None, "file of torchvision's VGG-16 (vgg16-397923af.pth); default: torchvision downloads it"
    )
    lpips_weight: float = setting(1.0, "weight of the perceptual distance", ge=0)
    entropy_weight: float = setting(0.1, "weight of both entropy terms", ge=0)
    codebook_entropy_weight: float = setting(1.0, "codebook entropy, relative to the token's", ge=0)
    commitment_weight: float = setting(0.25, "weight of the distance to the code", ge=0)
    inverse_temperature: float = setting(100.0, "sharpness of the soft code assignment", gt=0)
    entropy_group_bits: int = setting(
        16, "bits whose joint entropy is taken, in 1..16; num_bits or more is exact", ge=1, le=16
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual == "none" and self.perceptual_weights is not None:
            raise InputError("perceptual is none, and perceptual_weights names a file; give one or the other")
        if self.l1_weight + self.l2_weight == 0:
            raise InputError("l1_weight and l2_weight are both 0; one of them must be above 0")


@dataclass(frozen=True, kw_only=True)
class TailDropConfig(Config):
    """Number of channels that an image keeps in training, see `tail_drop.draw_num_tokens`."""

    mask_probability: float = setting(0.5, "share of images that lose a tail, in [0, 1]", ge=0, le=1)
    keep_distribution: Literal["uniform", "low", "high"] = setting(
        "uniform", "which k are drawn more often: all alike, short or long prefixes"
    )


@dataclass(frozen=True, kw_only=True)
class GanConfig(Config):
    """Adversarial part of the tokenizer's training; gan_weight 0 omits it."""

    gan_weight: float = setting(0.0, "weight of the adversarial loss; 0 = no discriminator", ge=0)
    gan_start_step: int = setting(0, "first step with the adversarial loss", ge=0)
    gan_learning_rate: float = setting(1e-4, "learning rate of the discriminator, constant", gt=0)
    gan_width: int = setting(64, "channels of the discriminator's first layer, a multiple of 32", ge=32)
    gan_layers: int = setting(3, "halvings of the image in the discriminator", ge=1, le=6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan_width % 32:
            raise InputError(f"gan_width is {self.gan_width}; it must be a multiple of 32 (GroupNorm)")

    def check_image_size(self, image_size: int) -> None:
        """Refuse images that are smaller than one patch of the discriminator."""
        smallest = 4 * 2**self.gan_layers
        if self.gan_weight > 0 and image_size < smallest:
            raise InputError(
                f"gan_layers {self.gan_layers} needs images of {smallest} pixels or more, image_size is {image_size}; "
                "take fewer gan_layers, or gan_weight 0"
            )


@dataclass(frozen=True, kw_only=True)
class RateConfig(Config):
    """Settings of the rate term, its prior, and bit noise.

    The weight of a token's rate changes linearly from the first channel to the last, and rises from 0 over the first
    `rate_warmup_steps`. A weight that rises along the channels gives a lower rate at equal quality than a constant one
    (docs/lab.md).
    """

    rate_weight: float = setting(
        0.0, "weight of the first channel's rate, per nat and token; 0 without late_rate_weight: no rate term", ge=0
    )
    late_rate_weight: float | None = setting(
        None, "weight of the last channel's rate, linear between; default: rate_weight", ge=0
    )
    rate_warmup_steps: int = setting(1000, "steps over which the weights rise from 0", ge=0)
    prior_learning_rate: float = setting(
        1e-3, "peak learning rate of the prior; follows the tokenizer's schedule", gt=0
    )
    prior_l2_weight: float = setting(1e-5, "coefficient of the L2 penalty on the prior's weights", ge=0)
    prior_label_dropout: float = setting(0.1, "probability that the prior is given the null label", ge=0, le=1)
    bit_noise: float = setting(
        0.0,
        "probability that a bit of the last channel is flipped before the decoder; that of channel c of C is c/C of it",
        ge=0,
        le=0.5,
    )

    @property
    def has_rate(self) -> bool:
        """Return whether a rate weight is above 0."""
        return max(self.rate_weight, self.late_rate_weight or 0) > 0


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(ModelTrainingConfig):
    """Settings of train_tokenizer.py beside the model's, the loss's and the tail drop's."""

    frozen_encoder: bool = setting(False, "train only the decoder, so that tokens stay those of --init-from")
    strict: bool = setting(False, "stop at an unreadable image instead of skipping it")
    channels_last: bool = setting(False, "keep feature maps channels last: faster on GPUs, much slower on CPUs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen_encoder and self.init_from is None:
            raise InputError("frozen_encoder keeps the tokens of a trained tokenizer; give that as init_from")


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig(Config):
    """Flags of extract_tokens.py."""

    tokenizer: str = setting(help="tokenizer folder, or its name on the Hugging Face hub", reads=True)
    output_dir: str = setting(help="folder of the token store; one that was begun is continued")
    class_names: str | None = setting(
        None, "JSON file that gives classes a readable name; default: names of the folders or of --dataset"
    )
    views: Literal["none", "flip", "ten-crop"] = setting(
        "none", "of train; flip adds mirror images; ten-crop: corners and middle of a larger image, and mirrored"
    )
    shard_size: int = setting(10_000, "images a shard", ge=1, le=10**8)
    batch_size: int = setting(64, "images a pass", ge=1, le=2**16)
    num_workers: int = setting(1, "processes that read images", ge=0, le=256)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    strict: bool = setting(False, "stop at an unreadable image instead of omitting it")


@dataclass(frozen=True, kw_only=True)
class VerificationConfig(Config):
    """The flag of extract_tokens.py that takes no others."""

    verify: str = setting(help="without other flags: a token store to check, in place of making one")


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainingConfig(LoopConfig):
    """Settings of `benchmark.py features` beside the network's and those of the data."""

    label_smoothing: float = setting(0.1, "share of a label that is spread over all classes", ge=0, lt=1)
    class_names: str | None = setting(None, "JSON file: class folder -> name; default: the folder's")
    strict: bool = setting(False, "stop at an unreadable image instead of skipping it")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Config):
    """The network: a stem that halves the picture, then a residual block for each width, halving from the second on."""

    classifier_size: int = setting(64, "pixels of a side that images are resized to", ge=1, le=2**13)
    widths: list[int] = setting([32, 64, 128, 256], "channels of each block; the last are features", ge=1, le=2**14)

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest = 2 ** len(self.widths)
        if not self.widths or any(width % CLASSIFIER_GROUPS for width in self.widths):
            raise InputError(f"widths is {self.widths}; give one or more multiples of {CLASSIFIER_GROUPS}")
        # GroupNorm needs more than a single place to take its mean over
        if self.classifier_size % smallest or self.classifier_size == smallest:
            raise InputError(
                f"classifier_size is {self.classifier_size}; with {len(self.widths)} widths it must be a multiple of "
                f"{smallest}, and larger"
            )
