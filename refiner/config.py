"""Configuration of the refiner, of its training and of its integration; imports no torch."""

import math
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Literal

from common.config import LoopConfig
from common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RefinerSize:
    """Size of the network, a transformer over patches; the defaults are for images of 64 x 64."""

    layers: int = field(default=6, metadata={"help": "transformer blocks"})
    heads: int = field(default=8, metadata={"help": "attention heads"})
    width: int = field(default=256, metadata={"help": "width of the residual stream"})
    patch_size: int = field(default=8, metadata={"help": "pixels of a patch's side"})

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "patch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % (2 * self.heads):
            raise InputError(f"width {self.width} must be a multiple of 2 * heads = {2 * self.heads}")


@dataclass(frozen=True, kw_only=True)
class RefinerConfig(RefinerSize):
    """A refiner: the size of its network, and the tokenizer and classes it was trained on.

    Attributes:
        image_size: pixels of a side.
        num_channels: C of the tokenizer.
        class_names: a name for each class; their number is also the null label.
        tokenizer_fingerprint: of all weights of the tokenizer.
        scale_lengths, scales: root mean square of photograph - decoded image in [-1, 1] units at some k, rising.
        has_null_label: whether training dropped labels, which guidance needs.
    """

    image_size: int
    num_channels: int
    class_names: list[str]
    tokenizer_fingerprint: str
    scale_lengths: list[int]
    scales: list[float]
    has_null_label: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise InputError(f"image_size is {self.image_size}; it must be a multiple of patch_size {self.patch_size}")
        if self.num_channels < 1 or not self.class_names:
            raise InputError("num_channels must be at least 1, and class_names must not be empty")
        rising = all(first < second for first, second in pairwise(self.scale_lengths))
        if not self.scales or len(self.scales) != len(self.scale_lengths) or not rising or self.scale_lengths[0] < 1:
            raise InputError("scale_lengths must rise from 1 or more, with one of scales for each")
        if not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise InputError(f"scales are {self.scales}; each must be above 0")

    @property
    def null_label(self) -> int:
        """Label of no class."""
        return len(self.class_names)


def size_of(config: RefinerSize) -> RefinerSize:
    """The size alone of a configuration that has more."""
    return RefinerSize(**{entry.name: getattr(config, entry.name) for entry in fields(RefinerSize)})


@dataclass(frozen=True, kw_only=True)
class RefinerTrainingConfig(LoopConfig):
    """Settings of train_refiner.py beside those of data, augmentation and size."""

    tokenizer: str = field(metadata={"help": "tokenizer folder, or its name on the Hugging Face hub"})
    class_names: str | None = field(
        default=None,
        metadata={"help": "JSON file that gives classes a readable name, the one given to extract_tokens.py; default: "
                  "names of the folders or of --dataset"},
    )  # fmt: skip
    label_dropout: float = field(
        default=0.1, metadata={"help": "share of images without class, for guidance; 0 = no guidance later"}
    )
    bit_flips: float = field(
        default=0.05,
        metadata={"help": "an image's bits are flipped with a probability drawn evenly from 0 to this, as errors of a "
                  "generator"},
    )  # fmt: skip
    generator: str | None = field(
        default=None,
        metadata={"help": "model folder with tokenizer/ and generator/: continues the tokens of some images, so that "
                  "the refiner is trained on its errors"},
    )  # fmt: skip
    continued_share: float = field(
        default=0.5, metadata={"help": "with --generator: share of images whose last tokens it draws, at most half"}
    )
    init_from: str | None = field(default=None, metadata={"help": "refiner folder to start from"})
    compile: bool = field(default=False, metadata={"help": "compile the network with torch.compile"})
    save_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the exported refiner"}
    )
    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of skipping it"})
    validation_images: int = field(default=512, metadata={"help": "images of val that an evaluation uses"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("label_dropout", 1), ("bit_flips", 0.5), ("continued_share", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, {most}]")
        if self.validation_images < 1:
            raise InputError(f"validation_images is {self.validation_images}; it must be at least 1")
