"""Configuration of the generator, of its training and of sampling; imports no torch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from common.config import LoopConfig
from common.errors import InputError

Weighting = Literal["none", "linear", "exponential"]
DEMO_MODEL = str(Path(__file__).resolve().parents[1] / "weights" / "demo")
Schedule = Literal["constant", "linear", "cosine", "interval"]


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Size of the transformer; the defaults are the paper's size B (arXiv 2606.04461, generator table)."""

    num_layers: int = field(default=12, metadata={"help": "transformer blocks"})
    num_heads: int = field(default=12, metadata={"help": "attention heads"})
    hidden_size: int = field(default=768, metadata={"help": "width of the residual stream"})
    intermediate_size: int = field(default=2048, metadata={"help": "width inside the SwiGLU"})
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary position embedding"})

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise InputError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads = {2 * self.num_heads}"
            )
        if not 1 < self.rope_theta < math.inf:
            raise InputError(f"rope_theta is {self.rope_theta}; it must be above 1")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads


def size_of(config: GeneratorConfig) -> GeneratorConfig:
    """The size alone of a configuration that has more."""
    return GeneratorConfig(**{entry.name: getattr(config, entry.name) for entry in fields(GeneratorConfig)})


# B and L are the paper's; XL and XXL continue the family they come from (LlamaGen, arXiv 2406.06525); S is for machines
# without a GPU. Parameters with 256 tokens of 14 bits and 1,000 classes: see docs/training.md.
GENERATOR_SIZES = {
    "S": GeneratorConfig(num_layers=7, num_heads=6, hidden_size=384, intermediate_size=1024),
    "B": GeneratorConfig(),
    "L": GeneratorConfig(num_layers=24, num_heads=16, hidden_size=1024, intermediate_size=2816),
    "XL": GeneratorConfig(num_layers=36, num_heads=20, hidden_size=1280, intermediate_size=3584),
    "XXL": GeneratorConfig(num_layers=48, num_heads=24, hidden_size=1536, intermediate_size=4096),
}


@dataclass(frozen=True, kw_only=True)
class ChannelGPTConfig(GeneratorConfig):
    """A generator: the size of its transformer, and the tokens and classes it was trained on.

    Attributes:
        num_channels: C, tokens of an image.
        num_bits: n, bits of a token.
        class_names: a name for each class; `num_classes` is also the null label.
        tokenizer_fingerprint: of the tokenizer that made the tokens.
        has_null_label: whether training dropped labels, which classifier-free guidance needs.
    """

    num_channels: int
    num_bits: int
    class_names: list[str]
    tokenizer_fingerprint: str
    has_null_label: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_channels < 1 or not 1 <= self.num_bits <= 16 or not self.class_names:
            raise InputError(
                f"num_channels is {self.num_channels}, num_bits {self.num_bits}, class_names {len(self.class_names)}; "
                "allowed are at least 1, 1..16 and at least one name"
            )

    @property
    def codebook_size(self) -> int:
        """Number of different tokens, 2**num_bits."""
        return int(2**self.num_bits)

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class."""
        return len(self.class_names)

    @property
    def null_label(self) -> int:
        """The class label that stands for no class."""
        return self.num_classes

    def check_labels(self, class_labels: Iterable[int]) -> None:
        """Refuse labels outside [0, null_label], and the null label of a model that was trained without it.

        Raises:
            InputError: the first such label.
        """
        for label in class_labels:
            if not 0 <= label <= self.null_label:
                raise InputError(
                    f"class label {label} is out of range; allowed are 0..{self.num_classes - 1}, "
                    f"and {self.null_label} for no class"
                )
            if label == self.null_label and not self.has_null_label:
                raise InputError(
                    f"class label {label} stands for no class, which this model was not trained on; "
                    f"use 0..{self.num_classes - 1}"
                )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn from its log-probabilities. Applied in this order: guidance, temperature, top-k, top-p.

    Guidance may change over the channels. With t = position / C (a share of all channels, not of those asked for, so
    that a prefix stays a prefix), the scale is cfg_scale throughout (constant), falls from cfg_scale to 1 in a straight
    line or half a cosine (linear, cosine), or is cfg_scale for cfg_start <= t < cfg_end and 1 elsewhere (interval;
    Kynkaanniemi et al., 2024, arXiv 2404.07724).
    """

    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token, 1 the model's own odds"})
    top_k: int = field(default=0, metadata={"help": "draw among this many most likely tokens; 0 = all"})
    top_p: float = field(
        default=1.0, metadata={"help": "draw among the most likely tokens that hold this mass; 1 = all"}
    )
    cfg_scale: float = field(default=1.0, metadata={"help": "classifier-free guidance; 1 = off, at half the cost"})
    cfg_schedule: Schedule = field(default="constant", metadata={"help": "how guidance changes over the channels"})
    cfg_start: float = field(default=0.0, metadata={"help": "interval: share of all channels where guidance begins"})
    cfg_end: float = field(default=1.0, metadata={"help": "interval: share of all channels where guidance ends"})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 or above")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise InputError(f"cfg_scale is {self.cfg_scale}; it must be 0 or above")
        if self.cfg_schedule not in get_args(Schedule):
            raise InputError(f"cfg_schedule is {self.cfg_schedule!r}; allowed: {', '.join(get_args(Schedule))}")
        if not 0 <= self.cfg_start < self.cfg_end <= 1:
            raise InputError(
                f"cfg_start is {self.cfg_start} and cfg_end {self.cfg_end}; needed is 0 <= cfg_start < cfg_end <= 1"
            )
        if self.cfg_schedule != "interval" and (self.cfg_start, self.cfg_end) != (0, 1):
            raise InputError(
                f"cfg_start and cfg_end belong to cfg_schedule interval; it is {self.cfg_schedule}, so omit them"
            )

    def override(self, given: Mapping[str, Any]) -> "SamplingConfig":
        """Replace the given fields; if any field of guidance (cfg_...) is given, the others return to their defaults.

        Raises:
            InputError: a value that is not allowed.
        """
        own = asdict(self)
        if any(name.startswith("cfg_") for name in given):
            own = {name: value for name, value in own.items() if not name.startswith("cfg_")}
        return SamplingConfig(**own | dict(given))


@dataclass(frozen=True, kw_only=True)
class GeneratorTrainingConfig(LoopConfig):
    """Settings of train_ar.py beside the transformer's size."""

    tokens: str = field(metadata={"help": "token store, from extract_tokens.py"})
    size: Literal["S", "B", "L", "XL", "XXL"] | None = field(
        default=None, metadata={"help": "size of the transformer, in place of --num-layers and the like"}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "start from the weights of a trained generator; classes may differ"}
    )
    label_dropout: float = field(default=0.1, metadata={"help": "share of labels replaced by the null label"})
    dropout: float = field(
        default=0.0, metadata={"help": "share of entries zeroed after the embedding and in residual branches"}
    )
    attention_dropout: float = field(default=0.0, metadata={"help": "share of attention weights zeroed"})
    bit_flips: float = field(
        default=0.0,
        metadata={"help": "flip input bits, not targets: each image's share is drawn evenly from 0 up to this"},
    )
    position_weighting: Weighting = field(
        default="none",
        metadata={"help": "weight of the first token's loss over the last's: none 1, linear 2, exponential 16"},
    )
    prefixes: bool = field(
        default=False,
        metadata={"help": "each step sees the first k tokens only, k drawn evenly from 1..C: half the work"},
    )
    prior_steps: int = field(
        default=600, metadata={"help": "steps of 512 images that fit the linear prior before the first step; 0 = none"}
    )
    prior_learning_rate: float = field(
        default=0.1,
        metadata={"help": "learning rate of the prior during training, relative to learning_rate; 0 = frozen"},
    )
    prior_l2_weight: float = field(default=1e-5, metadata={"help": "weight of the L2 penalty of the prior"})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "compute blocks again in the backward pass: less memory, a third more time"},
    )
    compile: bool = field(default=False, metadata={"help": "compile the blocks with torch.compile"})
    save_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the exported generator"}
    )
    keep_best: bool = field(
        default=False, metadata={"help": "export the weights of the lowest validation loss, not those of the last step"}
    )
    validation_images: int = field(default=2000, metadata={"help": "images of val that an evaluation uses"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_dropout", "dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if not 0 <= self.bit_flips <= 0.5:
            raise InputError(f"bit_flips is {self.bit_flips}; it must be in [0, 0.5]")
        if self.position_weighting not in get_args(Weighting):
            raise InputError(
                f"position_weighting is {self.position_weighting!r}; allowed: {', '.join(get_args(Weighting))}"
            )
        for name in ("prior_steps", "prior_learning_rate", "prior_l2_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        if self.validation_images < 1:
            raise InputError(f"validation_images is {self.validation_images}; it must be at least 1")

    def transformer(self, given: GeneratorConfig) -> GeneratorConfig:
        """Size of the transformer: that of `size`, otherwise the given one.

        Raises:
            InputError: both are given.
        """
        if self.size and given != GeneratorConfig():
            raise InputError(f"size is {self.size}, and num_layers or other fields are given; give one or the other")
        return GENERATOR_SIZES[self.size] if self.size else given


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Flags of sample.py beside those of sampling."""

    class_labels: list[int] | None = field(default=None, metadata={"help": "classes by number"})
    class_names: list[str] | None = field(default=None, metadata={"help": 'classes by name, for example "goldfish"'})
    num_tokens: list[int] | None = field(
        default=None, metadata={"help": "tokens to draw, one number for all or one for each image; default: all"}
    )
    samples_per_class: int = field(default=1, metadata={"help": "images of each class"})
    seed: int = field(default=0, metadata={"help": "image i is drawn with seed + i"})
    previews: list[int] | None = field(default=None, metadata={"help": "also write the pictures at each of these k"})
    deadline: float | None = field(
        default=None, metadata={"help": "seconds for each batch, decoding included; draws as far as they reach"}
    )
    stop_when_stable: float | None = field(
        default=None,
        metadata={"help": "end an image once half its channels changed it by less than so many grey levels"},
    )
    continue_from: str | None = field(default=None, metadata={"help": "tokens.npz of a drawing to continue"})
    rows: list[int] | None = field(default=None, metadata={"help": "rows of it to continue; default: all"})
    sketch_tokens: int | None = field(default=None, metadata={"help": "draw all images so far, then choose; see keep"})
    keep: int | None = field(default=None, metadata={"help": "sketches of each class to finish: the likeliest"})
    prefix_image: str | None = field(default=None, metadata={"help": "photograph whose first channels are kept"})
    prefix_tokens: int = field(default=16, metadata={"help": "how many channels of it are kept"})
    refine: int | None = field(
        default=None,
        metadata={"help": "steps of the refiner for the final images; 0: none; default: 4 if the model has refiner/"},
    )
    refine_cfg_scale: float | None = field(
        default=None, metadata={"help": "guidance of the refiner; 1 = off, others cost two passes; default: 1"}
    )
    refine_temperature: float | None = field(
        default=None, metadata={"help": "standard deviation of the refiner's noise; lower: less detail; default: 1"}
    )
    refine_previews: bool = field(default=False, metadata={"help": "refine the pictures of --previews as well"})
    model: str = field(default=DEMO_MODEL, metadata={"help": "folder with tokenizer/ and generator/, or a hub name"})
    output_dir: str = field(default="samples", metadata={"help": "folder for the pictures and tokens.npz"})
    batch_size: int = field(default=32, metadata={"help": "images drawn side by side"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the generator's weights"}
    )
    compile: bool = field(
        default=False, metadata={"help": "compile first (a minute), then draw faster; for long or repeated drawing"}
    )

    def __post_init__(self) -> None:
        if self.samples_per_class < 1:
            raise InputError(f"samples_per_class is {self.samples_per_class}; it must be at least 1")
        if self.rows is not None and self.continue_from is None:
            raise InputError("rows are those of a drawing; give it with --continue-from")
        if self.continue_from is None:
            return
        named = {
            "class_labels": self.class_labels, "class_names": self.class_names,
            "prefix_image": self.prefix_image, "sketch_tokens": self.sketch_tokens,
        }  # fmt: skip
        for name, value in named.items():
            if value is not None:
                raise InputError(f"{name} does not go with continue_from: the drawing says what is drawn; leave it out")
        if self.seed or self.samples_per_class != 1:
            raise InputError("seed and samples_per_class do not go with continue_from: the drawing has them")
