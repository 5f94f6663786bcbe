"""Draw pictures of classes, one latent channel at a time: see `--help`; with no flags, a few classes at growing k."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common import cli, runtime
from common.errors import InputError
from generator.drawing import DrawingRequest, draw_to_folder
from generator.pipeline import ChannelTokPipeline
from generator.sampling import SamplingConfig

DEMO_MODEL = str(Path(__file__).parent / "weights" / "demo")
SHOWN_CLASSES = 6


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Flags of sample.py beside those of sampling."""

    class_labels: list[int] | None = field(default=None, metadata={"help": "classes by number"})
    class_names: list[str] | None = field(default=None, metadata={"help": 'classes by name, for example "goldfish"'})
    num_tokens: int | None = field(default=None, metadata={"help": "tokens to draw; default: all that the model has"})
    samples_per_class: int = field(default=1, metadata={"help": "images of each class"})
    seed: int = field(default=0, metadata={"help": "image i is drawn with seed + i"})
    previews: list[int] | None = field(default=None, metadata={"help": "also write the pictures at each of these k"})
    model: str = field(default=DEMO_MODEL, metadata={"help": "folder with tokenizer/ and generator/, or a hub name"})
    output_dir: str = field(default="samples", metadata={"help": "folder for the pictures and tokens.npz"})
    batch_size: int = field(default=32, metadata={"help": "images drawn side by side"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the generator"}
    )

    def __post_init__(self) -> None:
        if self.samples_per_class < 1:
            raise InputError(f"samples_per_class is {self.samples_per_class}; it must be at least 1")


def main() -> None:
    """Parse, load, draw."""
    runtime.set_up_logging()
    config, sampling = cli.parse(SampleConfig, SamplingConfig, description=__doc__)
    pipeline = ChannelTokPipeline.from_pretrained(config.model, config.device, runtime.pick_dtype(config.dtype))
    layout = pipeline.layout
    labels = [*(config.class_labels or []), *pipeline.class_labels(config.class_names or [])]
    previews = config.previews or []
    num_tokens = layout.num_channels if config.num_tokens is None else config.num_tokens
    if not labels:
        shown = min(SHOWN_CLASSES, layout.num_classes)
        labels = [i * layout.num_classes // shown for i in range(shown)]
        previews = previews or [k for k in (1, 4, 16, 32, 64, 128) if k < num_tokens]
    request = DrawingRequest(
        class_labels=[label for label in labels for _ in range(config.samples_per_class)],
        num_tokens=num_tokens,
        seed=config.seed,
        sampling=sampling,
        batch_size=config.batch_size,
        previews=previews,
    )
    draw_to_folder(pipeline, request, config.output_dir)


if __name__ == "__main__":
    cli.run(main)
