"""Train a tokenizer on images: see `--help`, configs/ and docs/training.md."""

from common import cli, runtime
from tokenizer.config import TokenizerConfig
from tokenizer.data import AugmentationConfig
from tokenizer.losses import TokenizerLossConfig
from tokenizer.sources import DataConfig
from tokenizer.tail_drop import TailDropConfig
from tokenizer.training import TokenizerTrainingConfig, train_tokenizer


def main() -> None:
    """Parse, then train."""
    runtime.set_up_logging()
    parts = (TokenizerTrainingConfig, TokenizerConfig, TokenizerLossConfig, TailDropConfig)
    parsed = cli.parse(*parts, DataConfig, AugmentationConfig, description=__doc__)
    train_tokenizer(*parsed)


if __name__ == "__main__":
    cli.run(main)
