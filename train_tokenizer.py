"""Train a tokenizer on images: see `--help`, configs/ and docs/training.md."""

from common import cli
from tokenizer import settings
from tokenizer.config import TokenizerConfig

CONFIGS = (
    settings.TokenizerTrainingConfig,
    settings.DataConfig,
    settings.AugmentationConfig,
    TokenizerConfig,
    settings.TokenizerLossConfig,
    settings.TailDropConfig,
    settings.GanConfig,
    settings.RateConfig,
)


def main() -> None:
    """Parse, then train."""
    configs = cli.parse(*CONFIGS, description=__doc__)
    # here, so that --help and mistakes are answered without loading torch
    from tokenizer.training import TokenizerTrainer

    TokenizerTrainer(*configs).run()


if __name__ == "__main__":
    cli.run(main)
