"""Train a tokenizer on a folder of images: see `--help`, configs/ and docs/training.md."""

from common import cli, runtime
from tokenizer.config import TokenizerConfig
from tokenizer.losses import TokenizerLossConfig
from tokenizer.tail_drop import TailDropConfig
from tokenizer.training import TokenizerTrainingConfig, train_tokenizer


def main() -> None:
    """Parse, then train."""
    runtime.set_up_logging()
    parts = (TokenizerTrainingConfig, TokenizerConfig, TokenizerLossConfig, TailDropConfig)
    training, model, loss, tail_drop = cli.parse(*parts, description=__doc__)
    train_tokenizer(training, model, loss, tail_drop)


if __name__ == "__main__":
    cli.run(main)
