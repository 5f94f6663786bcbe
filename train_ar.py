"""Train a generator on a token store: see `--help`, configs/ and docs/training.md."""

from common import cli, runtime
from common.errors import InputError
from generator.config import GeneratorConfig
from generator.tokens import TokenStore
from generator.training import GeneratorTrainingConfig, train_generator
from tokenizer import ChannelTokenizer


def main() -> None:
    """Parse, load the tokenizer that the store carries for its pictures, then train."""
    runtime.set_up_logging()
    training, size = cli.parse(GeneratorTrainingConfig, GeneratorConfig, description=__doc__)
    store = TokenStore.open(training.tokens)
    tokenizer = ChannelTokenizer.from_pretrained(store.tokenizer_folder)
    if tokenizer.token_fingerprint() != store.header.tokenizer_fingerprint:
        raise InputError(f"{store.tokenizer_folder} is not the tokenizer that made these tokens; extract them again")
    train_generator(training, size, lambda device: runtime.move(tokenizer, device).detokenize, cli.command_line())


if __name__ == "__main__":
    cli.run(main)
