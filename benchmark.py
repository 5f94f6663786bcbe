"""Measure samples (fid), reconstructions (reconstruction) or speed, or train a small classifier (features).

The classifier takes the place of Inception where its weights are not available.
`benchmark.py fid --help` and so on list the flags of each.
"""

from collections.abc import Callable
from typing import Any

from common import cli
from evaluation.config import FidConfig, ReconstructionConfig, SpeedConfig
from generator.config import SamplingConfig
from tokenizer.settings import AugmentationConfig, ClassifierConfig, ClassifierTrainingConfig, DataConfig

# modules that load torch are imported in functions, so that --help and mistakes are answered at once
SamplingFlags = cli.unset(SamplingConfig, "default: the model's own for the largest k")


def speed(config: SpeedConfig) -> None:
    """Measure samplers."""
    from evaluation.reports import write_report
    from evaluation.speed.measure import load_models, measure_speed, report

    found = measure_speed(*load_models(config), config) | {"command": cli.command_line()}
    write_report(config.output_dir, "speed", found, report(found))


def reconstruction(config: ReconstructionConfig, data: DataConfig) -> None:
    """Measure reconstructions."""
    from evaluation.reconstruction.measure import measure_reconstruction
    from evaluation.reconstruction.report import write_reconstruction
    from tokenizer.tokenizer import ChannelTokenizer

    tokenizer = ChannelTokenizer.from_pretrained(config.tokenizer)
    found, sheet = measure_reconstruction(tokenizer, data, config)
    write_reconstruction(found | {"command": cli.command_line()}, sheet, config.output_dir)


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
    from evaluation.classifier import ClassifierTrainer

    ClassifierTrainer(training, data, augmentation, network).run()


COMMANDS: dict[str, tuple[Callable[..., None], tuple[type, ...]]] = {
    "speed": (speed, (SpeedConfig,)),
    "fid": (fid, (FidConfig, SamplingFlags)),
    "reconstruction": (reconstruction, (ReconstructionConfig, DataConfig)),
    "features": (features, (ClassifierTrainingConfig, DataConfig, AugmentationConfig, ClassifierConfig)),
}


def main() -> None:
    """Parse, and run the command of the first word."""
    kinds = {name: flags for name, (_, flags) in COMMANDS.items()}
    command, settings = cli.parse_command(kinds, description=__doc__)
    COMMANDS[command][0](*settings)


if __name__ == "__main__":
    cli.run(main)
