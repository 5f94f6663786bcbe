"""Configuration of the refiner and of its training; imports no torch."""

from dataclasses import dataclass, fields
from itertools import pairwise

from common.config import Config, InputError, ModelTrainingConfig, setting


@dataclass(frozen=True, kw_only=True)
class RefinerSize(Config):
    """Size of the network, a transformer over patches; the defaults are for images of 64 x 64."""

    layers: int = setting(4, "transformer blocks on patches of patch_size", ge=1, le=2**10)
    outer_layers: int = setting(
        1, "blocks on patches of half that side, before those and again after them", ge=1, le=2**10
    )
    heads: int = setting(8, "attention heads", ge=1, le=2**10)
    width: int = setting(256, "width of the residual stream", ge=1, le=2**14)
    patch_size: int = setting(8, "pixels of a patch's side, an even number", ge=2, le=2**10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size % 2:
            raise InputError(f"patch_size is {self.patch_size}; it must be even")
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
        temperature: default of sampling, below 1 for a refiner that was trained briefly and draws noise at 1.
    """

    image_size: int = setting(ge=1, le=2**13)
    num_channels: int = setting(ge=1, le=2**16)
    class_names: list[str]
    tokenizer_fingerprint: str
    scale_lengths: list[int] = setting(ge=1)
    scales: list[float] = setting(gt=0)
    has_null_label: bool
    temperature: float = setting(1.0, ge=0, le=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise InputError(f"image_size is {self.image_size}; it must be a multiple of patch_size {self.patch_size}")
        if not self.class_names:
            raise InputError("class_names must not be empty")
        rising = all(first < second for first, second in pairwise(self.scale_lengths))
        if not self.scales or len(self.scales) != len(self.scale_lengths) or not rising:
            raise InputError("scale_lengths must rise, with one of scales for each")

    @property
    def null_label(self) -> int:
        """Label of no class."""
        return len(self.class_names)


def size_of(config: RefinerSize) -> RefinerSize:
    """The size alone of a configuration that has more."""
    return RefinerSize(**{entry.name: getattr(config, entry.name) for entry in fields(RefinerSize)})


@dataclass(frozen=True, kw_only=True)
class RefinerTrainingConfig(ModelTrainingConfig):
    """Settings of train_refiner.py beside those of data, augmentation and size."""

    tokenizer: str = setting(help="tokenizer folder, or its name on the Hugging Face hub", reads=True)
    class_names: str | None = setting(
        None,
        "JSON file that gives classes a readable name, the one given to extract_tokens.py; default: names of the "
        "folders or of --dataset",
    )
    label_dropout: float = setting(
        0.1, "share of images without class, for guidance; 0 = no guidance later", ge=0, le=1
    )
    bit_flips: float = setting(
        0.05, "flip bits with a probability drawn evenly from 0 to this, as errors of a generator", ge=0, le=0.5
    )
    generator: str | None = setting(
        None,
        "model folder with tokenizer/ and generator/: continues the tokens of some images, so that the refiner is "
        "trained on its errors",
        reads=True,
    )
    continued_share: float = setting(
        0.5, "with --generator: share of images whose tokens it draws after the first few", ge=0, le=1
    )
    strict: bool = setting(False, "stop at an unreadable image instead of skipping it")
    validation_images: int = setting(512, "held-out images that an evaluation uses", ge=1)
