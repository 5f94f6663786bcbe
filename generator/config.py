"""Configuration of the generator, of its training and of sampling; imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from common.config import Config, Dtype, InputError, ModelTrainingConfig, setting

Weighting = Literal["none", "linear"]
DEMO_MODEL = str(Path(__file__).resolve().parents[1] / "weights" / "demo")
Size = Literal["S", "B", "L", "XL", "XXL"]
Schedule = Literal["constant", "linear", "cosine", "interval"]


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(Config):
    """Size of the transformer; the defaults are the paper's size B (arXiv 2606.04461, generator table)."""

    num_layers: int = setting(12, "transformer blocks", ge=1, le=2**10)
    num_heads: int = setting(12, "attention heads", ge=1, le=2**10)
    hidden_size: int = setting(768, "width of the residual stream", ge=1, le=2**16)
    intermediate_size: int = setting(2048, "width inside the SwiGLU", ge=1, le=2**18)
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", gt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (2 * self.num_heads):
            raise InputError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads = {2 * self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads


def size_of(config: GeneratorConfig) -> GeneratorConfig:
    """The size alone of a configuration that has more."""
    return GeneratorConfig(**{entry.name: getattr(config, entry.name) for entry in fields(GeneratorConfig)})


# B and L are the paper's; XL and XXL continue the family they come from (LlamaGen, arXiv 2406.06525); S is for machines
# without a GPU. Parameters with 256 tokens of 14 bits and 1,000 classes: see docs/training.md.
GENERATOR_SIZES: dict[str, GeneratorConfig] = {
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

    num_channels: int = setting(ge=1, le=2**16)
    num_bits: int = setting(ge=1, le=16)
    class_names: list[str]
    tokenizer_fingerprint: str
    has_null_label: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.class_names:
            raise InputError("class_names is empty; give at least one name")

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
        """Class label of no class."""
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
                    f"class label {label} means no class, which this model was not trained on; "
                    f"use 0..{self.num_classes - 1}"
                )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How a token is drawn from its log-probabilities.

    Applied in this order: autoguidance, guidance, temperature, top-k, top-p.

    Autoguidance (Karras et al., 2024, arXiv 2406.02507) moves log-odds away from those of a weaker model, here the
    generator's own linear prior: prior + autoguidance * (generator - prior), for bits and pairs, without a second pass.

    Guidance may change over the channels. With t = position / C (a share of all C channels, so that a prefix stays a
    prefix), the scale is cfg_scale throughout (constant), falls from cfg_scale to 1 in a straight
    line or half a cosine (linear, cosine), or is cfg_scale for cfg_start <= t < cfg_end and 1 elsewhere (interval;
    Kynkaanniemi et al., 2024, arXiv 2404.07724).
    """

    temperature: float = setting(1.0, "0 takes the most likely token, 1 the model's own odds", ge=0)
    top_k: int = setting(0, "draw among this many most likely tokens; 0 = all", ge=0)
    top_p: float = setting(1.0, "draw among the most likely tokens that hold this mass; 1 = all", gt=0, le=1)
    autoguidance: float = setting(1.0, "scale of what the transformer adds to the linear prior; 1 = off", ge=0, le=100)
    cfg_scale: float = setting(1.0, "classifier-free guidance; 1 = off, at half the cost", ge=0, le=100)
    cfg_schedule: Schedule = setting("constant", "how guidance changes over the channels")
    cfg_start: float = setting(0.0, "interval: share of all channels where guidance begins", ge=0, lt=1)
    cfg_end: float = setting(1.0, "interval: share of all channels where guidance ends", gt=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg_start >= self.cfg_end:
            raise InputError(
                f"cfg_start is {self.cfg_start} and cfg_end {self.cfg_end}; cfg_start must be below cfg_end"
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
class GeneratorTrainingConfig(ModelTrainingConfig):
    """Settings of train_ar.py beside the transformer's size."""

    tokens: str = setting(help="token store, from extract_tokens.py", reads=True)
    size: Size | None = setting(None, "size of the transformer, in place of --num-layers and the like")
    label_dropout: float = setting(0.1, "share of labels replaced by the null label", ge=0, lt=1)
    dropout: float = setting(0.0, "share of entries zeroed after the embedding and in residual branches", ge=0, lt=1)
    attention_dropout: float = setting(0.0, "share of attention weights zeroed", ge=0, lt=1)
    position_weighting: Weighting = setting(
        "none", "linear: the loss of the first token counts twice as much as that of the last"
    )
    prior_steps: int = setting(
        600, "steps of 512 images that fit the linear prior before the first step; 0 = none", ge=0
    )
    prior_learning_rate: float = setting(
        0.1, "learning rate of the prior during training, relative to learning_rate; 0 = frozen", ge=0
    )
    prior_l2_weight: float = setting(1e-5, "weight of the L2 penalty of the prior", ge=0)
    gradient_checkpointing: bool = setting(
        False, "compute blocks again in the backward pass: less memory, a third more time"
    )
    keep_best: bool = setting(False, "export the weights of the lowest validation loss, not those of the last step")

    def transformer(self, given: GeneratorConfig) -> GeneratorConfig:
        """Size of the transformer: that of `size`, or the given one; an InputError if both are given."""
        if self.size and given != GeneratorConfig():
            raise InputError(f"size is {self.size}, and num_layers or other fields are given; give one or the other")
        return GENERATOR_SIZES[self.size] if self.size else given


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """Flags of sample.py beside those of `SamplingConfig`."""

    class_labels: list[int] | None = setting(None, "classes by number")
    class_names: list[str] | None = setting(None, 'classes by name, for example "goldfish"')
    num_tokens: list[int] | None = setting(
        None, "tokens to draw, one number for all or one for each image; default: all"
    )
    samples_per_class: int = setting(1, "images of each class", ge=1, le=10**6)
    seed: int = setting(0, "image i is drawn with seed + i", ge=0, lt=2**63)
    previews: list[int] | None = setting(None, "also write the pictures at each of these k")
    strip: bool = setting(False, "also write each image at growing k, side by side, as NNNNN_strip.png")
    animate: Literal["gif", "webp"] | None = setting(None, "also write an animation of each growing image")
    deadline: float | None = setting(
        None, "seconds for each batch, decoding included; draws as far as they reach", gt=0
    )
    stop_when_stable: float | None = setting(
        None, "end an image once half its channels changed it by less than so many grey levels", gt=0
    )
    continue_from: str | None = setting(None, "tokens.npz of a drawing to continue")
    rows: list[int] | None = setting(None, "rows of it to continue; default: all")
    sketch_tokens: int | None = setting(None, "draw all images so far, then choose; see keep")
    keep: int | None = setting(None, "sketches of each class to finish: the likeliest", ge=1)
    prefix_image: str | None = setting(None, "photograph whose first channels are kept", reads=True)
    prefix_tokens: int | None = setting(None, "how many channels of it are kept; default: 16", ge=1)
    refine: int | None = setting(
        None, "steps of the refiner for the final images; 0: none; default: 4 if the model has refiner/", ge=0, le=1000
    )
    refine_cfg_scale: float | None = setting(
        None, "guidance of the refiner; 1 = off, others cost 10 passes instead of 7; default: 3", ge=0
    )
    refine_temperature: float | None = setting(
        None, "standard deviation of the refiner's noise; lower: less detail; default: the model's", ge=0, le=2
    )
    refine_previews: bool = setting(False, "refine the pictures of --previews as well")
    model: str = setting(DEMO_MODEL, "folder with tokenizer/ and generator/, or a hub name", reads=True)
    output_dir: str = setting("samples", "folder for the pictures and tokens.npz")
    batch_size: int = setting(32, "images drawn side by side", ge=1, le=2**16)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: Dtype = setting("float32", "number format of the generator's weights")
    compile: bool = setting(False, "compile first (a minute), then draw faster; for long or repeated drawing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sketch_tokens is None) != (self.keep is None):
            raise InputError("sketch_tokens and keep go together; give both or neither")
        if self.sketch_tokens is not None and len(set(self.num_tokens or [])) > 1:
            raise InputError("num_tokens must be one number with sketch_tokens")
        if self.prefix_tokens is not None and self.prefix_image is None:
            raise InputError("prefix_tokens is given without --prefix-image; give both or neither")
        if self.rows is not None and self.continue_from is None:
            raise InputError("rows are those of a drawing; give it with --continue-from")
        if self.continue_from is not None:
            excluded = "class_labels", "class_names", "prefix_image", "sketch_tokens", "seed", "samples_per_class"
            for entry in fields(self):
                if entry.name in excluded and getattr(self, entry.name) != entry.default:
                    raise InputError(f"{entry.name} cannot be given with continue_from; omit it")
