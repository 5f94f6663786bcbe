"""Measure samples (fid), reconstructions (reconstruction) or speed, or train the network that looks (features).

`features` trains the small classifier that is used where Inception's weights are not available.
`benchmark.py fid --help` and so on list the flags of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from common import cli, runtime
from common.checkpoint import resolve_folder
from common.classifier import ClassifierConfig
from common.errors import InputError
from common.processes import team
from generator.config import GENERATOR_SIZES, TokenLayout
from generator.model import build_generator, load_generator
from generator.quality import QualityConfig, measure_quality, open_subject, sweep_quality
from generator.quality import write_report as write_quality
from generator.sampling import SamplingConfig
from generator.speed import SpeedConfig, Subject, measure_speed, write_report
from tokenizer import ChannelTokenizer
from tokenizer.classifier import ClassifierTrainingConfig, train_classifier
from tokenizer.data import AugmentationConfig
from tokenizer.decoding import PictureDecoder
from tokenizer.published import PUBLISHED_TOKENIZERS, published_config
from tokenizer.reconstruction import ReconstructionConfig, measure_reconstruction, read_curve
from tokenizer.reconstruction import write_report as write_reconstruction_report
from tokenizer.sources import DataConfig

NO_TOKENIZER = "none"
NUM_CLASSES = 1000
RANDOM_WEIGHTS = "random weights"


@dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """Which models are measured, and where the results go."""

    generator: str | None = field(
        default=None, metadata={"help": f"size, with random weights: {', '.join(GENERATOR_SIZES)}; default: B"}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": f"architecture, with random weights: {', '.join(PUBLISHED_TOKENIZERS)} (default: paper-256), "
                  f"or {NO_TOKENIZER}: 256 tokens of 14 bits, no pictures"},
    )  # fmt: skip
    model: str | None = field(default=None, metadata={"help": "instead: a folder with tokenizer/ and generator/"})
    compile_pictures: bool = field(default=False, metadata={"help": "compile the decoding of pictures, too"})
    output_dir: str = field(default="runs/speed", metadata={"help": "folder for speed.json, .md and .png"})

    def __post_init__(self) -> None:
        if self.model is not None and (self.generator is not None or self.tokenizer is not None):
            raise InputError("model is given, and so is generator or tokenizer; give either the one or the others")
        if self.generator is not None and self.generator not in GENERATOR_SIZES:
            raise InputError(f"generator {self.generator!r} is unknown; allowed: {', '.join(GENERATOR_SIZES)}")
        if self.tokenizer not in (None, NO_TOKENIZER, *PUBLISHED_TOKENIZERS):
            allowed = [*PUBLISHED_TOKENIZERS, NO_TOKENIZER]
            raise InputError(f"tokenizer {self.tokenizer!r} is unknown; allowed: {', '.join(allowed)}")

    @property
    def generator_name(self) -> str:
        """What the results call the generator."""
        return self.generator or ("B" if self.model is None else Path(self.model).name)

    @property
    def tokenizer_name(self) -> str:
        """What the results call the tokenizer."""
        return self.tokenizer or ("paper-256" if self.model is None else Path(self.model).name)


def random_layout(num_channels: int = 256, num_bits: int = 14) -> TokenLayout:
    """Of a generator that is made up: that of the paper's 256x256 models, unless told otherwise."""
    return TokenLayout(
        num_channels=num_channels,
        num_bits=num_bits,
        class_names=[str(label) for label in range(NUM_CLASSES)],
        tokenizer_fingerprint=RANDOM_WEIGHTS,
        has_null_label=True,
    )


def models_of(config: SubjectConfig, seed: int) -> tuple[LlamaForCausalLM, TokenLayout, ChannelTokenizer | None]:
    """Those of a folder, or of a published size with random weights."""
    if config.model is not None:
        folder = resolve_folder(config.model)
        return *load_generator(folder / "generator"), ChannelTokenizer.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = None
        if config.tokenizer_name != NO_TOKENIZER:
            tokenizer = ChannelTokenizer(published_config(config.tokenizer_name)).eval()
        layout = (
            random_layout(tokenizer.config.num_channels, tokenizer.config.num_bits) if tokenizer else random_layout()
        )
        return build_generator(GENERATOR_SIZES[config.generator_name], layout), layout, tokenizer


def speed(what: SubjectConfig, config: SpeedConfig) -> None:
    """Build, measure, write."""
    device = runtime.pick_device(config.device)
    model, layout, tokenizer = models_of(what, config.seed)
    pictures = None
    if tokenizer is not None:
        pictures = partial(PictureDecoder, runtime.move(tokenizer, device), compile=what.compile_pictures)
    subject = Subject(
        model=model,
        layout=layout,
        name=what.generator_name,
        pictures=pictures,
        tokenizer=tokenizer,
        tokenizer_name=what.tokenizer_name,
    )
    write_report(measure_speed(subject, config), what.output_dir, cli.command_line())


def reconstruction(config: ReconstructionConfig, data: DataConfig) -> None:
    """Load, measure, write."""
    tokenizer = ChannelTokenizer.from_pretrained(config.tokenizer)
    compared = [read_curve(path) for path in config.compare]
    results = measure_reconstruction(tokenizer, data, config)
    write_reconstruction_report(results, config.output_dir, cli.command_line(), compared)


def fid(config: QualityConfig, sampling: SamplingConfig) -> None:
    """Measure one setting or many, and write; in one process or those that `accelerate launch` started."""
    with team(config.device) as workers:
        if config.sweep is not None:
            sweep_quality(partial(open_subject, config, workers), sampling, config, workers, cli.command_line())
            return
        subject = open_subject(config, workers)
        results = measure_quality(subject, sampling, config, workers)
        if results is not None:
            write_quality(results, subject, config, cli.command_line(), workers.count)
        workers.wait()


COMMANDS: dict[str, tuple[Callable[..., None], tuple[type, ...]]] = {
    "speed": (speed, (SubjectConfig, SpeedConfig)),
    "fid": (fid, (QualityConfig, SamplingConfig)),
    "reconstruction": (reconstruction, (ReconstructionConfig, DataConfig)),
    "features": (train_classifier, (ClassifierTrainingConfig, DataConfig, AugmentationConfig, ClassifierConfig)),
}


def main() -> None:
    """Parse, and do what the first word says."""
    runtime.set_up_logging()
    kinds = {name: flags for name, (_, flags) in COMMANDS.items()}
    command, settings = cli.parse_command(kinds, description=__doc__)
    COMMANDS[command][0](*settings)


if __name__ == "__main__":
    cli.run(main)
