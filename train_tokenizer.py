"""Train a tokenizer on images: see `--help`, configs/ and docs/training.md."""

from typing import Any

from common import cli
from tokenizer import settings
from tokenizer.config import TokenizerConfig, fit_widths

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


def adapt(values: dict[str, Any]) -> None:
    """With --image-size alone, give the network of the defaults or of --config the stages for that size."""
    if cli.has_flag("image-size") and not any(map(cli.has_flag, ("encoder-widths", "decoder-widths", "patch-size"))):
        fit_widths(values)


def main() -> None:
    """Parse, then train."""
    configs = cli.parse(*CONFIGS, description=__doc__, adapt=adapt)
    # here, so that --help and mistakes are answered without loading torch
    from tokenizer.training import TokenizerTrainer

    TokenizerTrainer(*configs).run()


if __name__ == "__main__":
    cli.run(main)
