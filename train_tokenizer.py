"""Train a tokenizer on images: see `--help`, configs/ and docs/training.md."""

from common import cli
from tokenizer.config import TokenizerConfig
from tokenizer.settings import (
    AugmentationConfig,
    DataConfig,
    GanConfig,
    RateConfig,
    TailDropConfig,
    TokenizerLossConfig,
    TokenizerTrainingConfig,
)

CONFIGS = (
    TokenizerTrainingConfig,
    DataConfig,
    AugmentationConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TailDropConfig,
    GanConfig,
    RateConfig,
)


def main() -> None:
    """Parse, then train."""
    configs = cli.parse(*CONFIGS, description=__doc__)
    # here, so that --help and mistakes are answered without loading torch
    from tokenizer.training import train_tokenizer

    train_tokenizer(*configs)


if __name__ == "__main__":
    cli.run(main)
