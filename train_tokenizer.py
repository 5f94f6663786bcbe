"""Train a tokenizer on images: see `--help`, configs/ and docs/training.md."""

from common import cli, runtime
from tokenizer.config import TokenizerConfig
from tokenizer.data import AugmentationConfig
from tokenizer.discriminator import GanConfig
from tokenizer.losses import TokenizerLossConfig
from tokenizer.rate import RateConfig
from tokenizer.sources import DataConfig
from tokenizer.tail_drop import TailDropConfig
from tokenizer.training import TokenizerTrainingConfig, train_tokenizer

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
    runtime.set_up_logging()
    train_tokenizer(*cli.parse(*CONFIGS, description=__doc__))


if __name__ == "__main__":
    cli.run(main)
