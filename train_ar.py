"""Train a generator on a token store: see `--help`, configs/ and docs/training.md."""

from common import cli
from generator.config import GeneratorConfig, GeneratorTrainingConfig


def main() -> None:
    """Parse, load the tokenizer of the store for pictures, then train."""
    training, size = cli.parse(GeneratorTrainingConfig, GeneratorConfig, description=__doc__)
    size = training.transformer(size)
    # here, so that --help and mistakes are answered without loading torch
    from common.config import InputError
    from common.runtime import move
    from generator.tokens import TokenStore
    from generator.training import GeneratorTrainer
    from tokenizer.tokenizer import ChannelTokenizer

    store = TokenStore.open(training.tokens)
    tokenizer = ChannelTokenizer.from_pretrained(store.tokenizer_folder)
    if tokenizer.token_fingerprint() != store.header.tokenizer_fingerprint:
        raise InputError(f"{store.tokenizer_folder} is not the tokenizer that made these tokens; extract them again")
    GeneratorTrainer(training, size, lambda device: move(tokenizer, device).detokenize).run()


if __name__ == "__main__":
    cli.run(main)
