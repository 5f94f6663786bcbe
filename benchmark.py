"""Measure samples (fid), reconstructions (reconstruction) or speed, or train the network that looks (features).

`features` trains the small classifier that is used where Inception's weights are not available.
`benchmark.py fid --help` and so on list the flags of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli
from common.config import ClassifierConfig
from common.errors import InputError
from evaluation.fid.config import FidConfig
from evaluation.reconstruction.config import ReconstructionConfig
from evaluation.speed.config import SpeedConfig
from generator.config import GENERATOR_SIZES, ChannelGPTConfig, SamplingConfig
from tokenizer.published import PUBLISHED_TOKENIZERS, published_config
from tokenizer.settings import AugmentationConfig, ClassifierTrainingConfig, DataConfig

if TYPE_CHECKING:
    from generator.model import ChannelGPT
    from tokenizer.tokenizer import ChannelTokenizer

# modules that load torch are imported in functions, so that --help and mistakes are answered at once
NO_TOKENIZER = "none"
NUM_CLASSES = 1000
RANDOM_WEIGHTS = "random weights"
SamplingFlags = cli.unset(SamplingConfig, "default: the model's own for the largest k")


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


def random_config(size: str, num_channels: int = 256, num_bits: int = 14) -> ChannelGPTConfig:
    """Configuration of a generator with random weights, by default with the tokens of the paper's 256x256 models."""
    return ChannelGPTConfig(
        **vars(GENERATOR_SIZES[size]),
        num_channels=num_channels,
        num_bits=num_bits,
        class_names=[str(label) for label in range(NUM_CLASSES)],
        tokenizer_fingerprint=RANDOM_WEIGHTS,
        has_null_label=True,
    )


def models_of(config: SubjectConfig, seed: int) -> tuple["ChannelGPT", "ChannelTokenizer | None"]:
    """Models of a folder, or of a published size with random weights."""
    import torch

    from common.checkpoint import resolve_folder
    from generator.model import ChannelGPT
    from tokenizer.tokenizer import ChannelTokenizer

    if config.model is not None:
        folder = resolve_folder(config.model)
        return (
            ChannelGPT.from_pretrained(folder / "generator"),
            ChannelTokenizer.from_pretrained(folder / "tokenizer"),
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.tokenizer_name == NO_TOKENIZER:
            return ChannelGPT(random_config(config.generator_name)), None
        tokenizer = ChannelTokenizer(published_config(config.tokenizer_name)).eval()
        sizes = tokenizer.config.num_channels, tokenizer.config.num_bits
        return ChannelGPT(random_config(config.generator_name, *sizes)), tokenizer


def speed(what: SubjectConfig, config: SpeedConfig) -> None:
    """Build, measure, write."""
    from common.runtime import move, pick_device
    from evaluation.speed.measure import Subject, measure_speed
    from evaluation.speed.report import write_report
    from tokenizer.decoding import PictureDecoder

    device = pick_device(config.device)
    model, tokenizer = models_of(what, config.seed)
    pictures = None
    if tokenizer is not None:
        pictures = partial(PictureDecoder, move(tokenizer, device), compile=what.compile_pictures)
    subject = Subject(
        model=model,
        name=what.generator_name,
        pictures=pictures,
        tokenizer=tokenizer,
        tokenizer_name=what.tokenizer_name,
    )
    write_report(measure_speed(subject, config), what.output_dir, cli.command_line())


def reconstruction(config: ReconstructionConfig, data: DataConfig) -> None:
    """Load, measure, write."""
    from evaluation.reconstruction.measure import measure_reconstruction
    from evaluation.reconstruction.report import read_curve, write_report
    from tokenizer.tokenizer import ChannelTokenizer

    tokenizer = ChannelTokenizer.from_pretrained(config.tokenizer)
    compared = [read_curve(path) for path in config.compare]
    results = measure_reconstruction(tokenizer, data, config)
    write_report(results, config.output_dir, cli.command_line(), compared)


def fid(config: FidConfig, flags: Any) -> None:
    """Measure one setting or many; in one process or those that `accelerate launch` started."""
    given = {name: value for name, value in vars(flags).items() if value is not None}
    SamplingConfig(**given)  # refuses wrong values before torch is loaded
    from evaluation.fid.measure import measure_fid

    measure_fid(config, given, cli.command_line())


def features(
    training: ClassifierTrainingConfig, data: DataConfig, augmentation: AugmentationConfig, network: ClassifierConfig
) -> None:
    """Train the classifier."""
    from evaluation.classifier import train_classifier

    train_classifier(training, data, augmentation, network)


COMMANDS: dict[str, tuple[Callable[..., None], tuple[type, ...]]] = {
    "speed": (speed, (SubjectConfig, SpeedConfig)),
    "fid": (fid, (FidConfig, SamplingFlags)),
    "reconstruction": (reconstruction, (ReconstructionConfig, DataConfig)),
    "features": (features, (ClassifierTrainingConfig, DataConfig, AugmentationConfig, ClassifierConfig)),
}


def main() -> None:
    """Parse, and do what the first word says."""
    kinds = {name: flags for name, (_, flags) in COMMANDS.items()}
    command, settings = cli.parse_command(kinds, description=__doc__)
    COMMANDS[command][0](*settings)


if __name__ == "__main__":
    cli.run(main)
