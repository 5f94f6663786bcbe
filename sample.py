"""Draw pictures of classes, one latent channel at a time: see `--help`; with no flags, a few classes at growing k."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import cli, runtime
from common.errors import InputError
from generator.drawing import Drawing
from generator.pipeline import ChannelTokPipeline
from generator.sampling import SamplingConfig
from generator.session import DrawingRequest, draw_to_folder

DEMO_MODEL = str(Path(__file__).parent / "weights" / "demo")
SHOWN_CLASSES = 6
SamplingFlags = cli.unset(SamplingConfig, "default: the model's own, or the drawing's that is gone on with")


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
    continue_from: str | None = field(default=None, metadata={"help": "tokens.npz of a drawing to go on with"})
    rows: list[int] | None = field(default=None, metadata={"help": "rows of it to go on with; default: all"})
    sketch_tokens: int | None = field(default=None, metadata={"help": "draw all images so far, then choose; see keep"})
    keep: int | None = field(default=None, metadata={"help": "sketches of each class to finish: the likeliest"})
    prefix_image: str | None = field(default=None, metadata={"help": "photograph whose first channels are kept"})
    prefix_tokens: int = field(default=16, metadata={"help": "how many channels of it are kept"})
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


def fresh_request(config: SampleConfig, given: dict[str, Any], pipeline: ChannelTokPipeline) -> DrawingRequest:
    """A request for new drawings, from class labels or a few classes at growing k."""
    layout = pipeline.layout
    labels = [*(config.class_labels or []), *pipeline.class_labels(config.class_names or [])]
    previews = config.previews or []
    if not labels:
        shown = min(SHOWN_CLASSES, layout.num_classes)
        labels = [i * layout.num_classes // shown for i in range(shown)]
        longest = max(config.num_tokens or [layout.num_channels])
        previews = previews or [k for k in (1, 4, 16, 32, 64, 128) if k < longest]
    labels = [label for label in labels for _ in range(config.samples_per_class)]
    num_tokens = counts(config.num_tokens, len(labels), layout.num_channels)
    prefix = None
    if config.prefix_image is not None:
        prefix = pipeline.prefix_of(config.prefix_image, config.prefix_tokens).expand(len(labels), -1)
    return DrawingRequest(
        class_labels=labels,
        seeds=[config.seed + i for i in range(len(labels))],
        rows=list(range(len(labels))),
        num_tokens=num_tokens,
        # images that end at several k are drawn as those that go to the end, so that none hangs on its neighbours
        sampling=pipeline.sampling(num_tokens[0] if len(set(num_tokens)) == 1 else None, **given),
        batch_size=config.batch_size,
        previews=previews,
        prefix=prefix,
        prefix_lengths=None if prefix is None else [config.prefix_tokens] * len(labels),
        deadline=config.deadline,
        stop_when_stable=config.stop_when_stable,
        sketch_tokens=config.sketch_tokens,
        keep=config.keep,
    )


def counts(num_tokens: list[int] | None, images: int, default: int) -> list[int]:
    """The length of each image from --num-tokens: none, one for all, or one for each."""
    given = [default] if num_tokens is None else num_tokens
    if len(given) not in (1, images):
        raise InputError(f"num_tokens has {len(given)} numbers for {images} images; give one for all or one for each")
    return given * images if len(given) == 1 else given


def continued_request(
    config: SampleConfig, given: dict[str, Any], pipeline: ChannelTokPipeline, drawing: Drawing
) -> DrawingRequest:
    """A request that goes on with rows of a drawing, with its own settings unless others are given."""
    rows = list(range(len(drawing.seeds))) if config.rows is None else config.rows
    chosen = drawing.rows(rows)
    lengths = chosen.num_tokens.tolist()
    num_tokens = counts(config.num_tokens, len(rows), pipeline.layout.num_channels)
    for row, length, count in zip(rows, lengths, num_tokens, strict=True):
        if length >= count:
            raise InputError(f"row {row} has {length} tokens already; num_tokens is {count} and must be above that")
    return DrawingRequest(
        class_labels=chosen.class_labels,
        seeds=chosen.seeds,
        rows=rows,
        num_tokens=num_tokens,
        sampling=drawing.sampling.override(given),
        batch_size=config.batch_size,
        previews=config.previews or [],
        prefix=chosen.tokens,
        prefix_lengths=lengths,
        deadline=config.deadline,
        stop_when_stable=config.stop_when_stable,
    )


def main() -> None:
    """Parse, load, draw."""
    runtime.set_up_logging()
    config, flags = cli.parse(SampleConfig, SamplingFlags, description=__doc__)
    given = {name: value for name, value in vars(flags).items() if value is not None}
    SamplingConfig(**given)  # what is wrong with them alone is told before a model is loaded
    pipeline = ChannelTokPipeline.from_pretrained(
        config.model, config.device, runtime.pick_dtype(config.dtype), compile=config.compile
    )
    if config.continue_from is None:
        draw_to_folder(pipeline, fresh_request(config, given, pipeline), config.output_dir)
        return
    path = Path(config.continue_from)
    drawing = Drawing.load(path)
    drawing.check(path, pipeline.layout, pipeline.tokens_fingerprint)
    request = continued_request(config, given, pipeline, drawing)
    draw_to_folder(pipeline, request, config.output_dir, drawing, path)


if __name__ == "__main__":
    cli.run(main)
