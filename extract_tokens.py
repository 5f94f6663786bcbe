"""Turn images into a token store with a trained tokenizer, or check one with --verify: see docs/training.md."""

from typing import Any

from common import cli
from tokenizer.settings import DataConfig, ExtractionConfig, VerificationConfig


def main() -> None:
    """Parse, then check a store or write one."""
    if cli.has_flag("verify"):
        (verification,) = cli.parse(VerificationConfig, description=__doc__)
        check(verification.verify)
    else:
        extract(*cli.parse(ExtractionConfig, DataConfig, description=__doc__))


# modules that load torch are imported in functions, so that --help and mistakes are answered at once
def check(folder: str) -> None:
    """Report the content of a store and its problems."""
    from generator.tokens import TokenStore, verify
    from tokenizer.extraction import log_verification

    store = TokenStore(folder, TokenStore.peek(folder))
    log_verification(store, *verify(store))


def extract(config: ExtractionConfig, data: DataConfig) -> None:
    """Write the shards that are missing."""
    from generator.tokens import StoreHeader, TokenStore
    from tokenizer.extraction import write_store

    def create(write: bool, **header: Any) -> TokenStore:
        return TokenStore.create(config.output_dir, StoreHeader(**header), write)

    write_store(config, data, create)


if __name__ == "__main__":
    cli.run(main)
