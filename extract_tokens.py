"""Turn images into a token store with a trained tokenizer, or check one with --verify: see docs/training.md."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli
from common.errors import InputError
from tokenizer.settings import DataConfig, ExtractionConfig, VerificationConfig

if TYPE_CHECKING:
    from common.runtime import Workers

# modules that load torch are imported in functions, so that --help and mistakes are answered at once
logger = logging.getLogger("tokenizer.extract_tokens")


def main() -> None:
    """Parse, then check a store or write one."""
    if cli.has_flag("verify"):
        (verification,) = cli.parse(VerificationConfig, description=__doc__)
        check(verification.verify)
    else:
        extract(*cli.parse(ExtractionConfig, DataConfig, description=__doc__))


def check(folder: str) -> None:
    """Report the content of a store and its problems.

    Raises:
        InputError: there are problems.
    """
    from generator.tokens import TokenStore, verify
    from tokenizer.tokenizer import ChannelTokenizer

    store = TokenStore(folder, TokenStore.peek(folder))
    content, problems = verify(store)
    try:
        made = ChannelTokenizer.from_pretrained(store.tokenizer_folder).token_fingerprint()
    except InputError as error:
        problems.append(str(error))
    else:
        if made != store.header.tokenizer_fingerprint:
            problems.append(
                f"{store.tokenizer_folder} is the tokenizer {made}, the store is of "
                f"{store.header.tokenizer_fingerprint}; restore the one that made it"
            )
    for line in content:
        logger.info("%s", line)
    for problem in problems:
        logger.warning("%s", problem)
    if problems:
        raise InputError(f"{folder}: problems found: {len(problems)}, reported above; extract again what they name")
    logger.info("%s: no problem found", folder)


def extract(config: ExtractionConfig, data: DataConfig) -> None:
    """Write the shards that are missing, in one process or those that a launcher started."""
    from contextlib import ExitStack

    from common.files import exclusive_folder
    from common.runtime import launched_workers

    with launched_workers(config.device) as workers, ExitStack() as stack:
        if workers.is_main:
            stack.enter_context(exclusive_folder(config.output_dir))
        write_shards(config, data, workers)


def write_shards(config: ExtractionConfig, data: DataConfig, workers: "Workers") -> None:
    """Write the shards that are missing, of those assigned to this process."""
    from tqdm import tqdm

    from common.files import folder_written_whole, read_json
    from common.runtime import move
    from generator.tokens import StoreHeader, TokenStore
    from tokenizer.data import UnreadableFiles
    from tokenizer.extraction import VIEWS, exact_dtype, tokenize_files
    from tokenizer.sources import SPLITS, check_same_classes, open_source
    from tokenizer.tokenizer import ChannelTokenizer

    sources = {split: open_source(data, split) for split in SPLITS}
    check_same_classes(sources["train"], sources["val"])
    names = read_json(config.class_names) if config.class_names else {}
    tokenizer = ChannelTokenizer.from_pretrained(config.tokenizer)
    header = StoreHeader(
        tokenizer_fingerprint=tokenizer.token_fingerprint(),
        num_channels=tokenizer.config.num_channels,
        num_bits=tokenizer.config.num_bits,
        class_names=[str(names.get(name, name)) for name in sources["train"].classes],
        views=config.views,
        shard_size=config.shard_size,
        split_files={split: len(source) for split, source in sources.items()},
        listings={split: source.fingerprint() for split, source in sources.items()},
    )
    store = TokenStore.create(config.output_dir, header, write=workers.is_main)
    if workers.is_main and not store.tokenizer_folder.exists():
        with folder_written_whole(store.tokenizer_folder) as temporary:
            tokenizer.save_pretrained(temporary, exact_dtype(tokenizer))
    workers.wait()
    move(tokenizer, workers.device)
    unreadable = UnreadableFiles(config.strict)
    # assigned before those that exist are skipped, so that the assignment does not depend on other processes
    own = header.shards()[workers.index :: workers.count]
    for split, shard in tqdm(own, unit="shard", disable=not workers.is_main):
        if store.has_shard(split, shard):
            continue
        tokens, labels, left_out = tokenize_files(
            tokenizer,
            sources[split],
            header.shard_files(split, shard),
            views=VIEWS[config.views if split == "train" else "none"],
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            unreadable=unreadable,
        )
        store.write_shard(split, shard, tokens, labels, left_out)
    workers.wait()
    if workers.is_main:
        logger.info("%s: complete, %d unreadable files left out", Path(config.output_dir), len(store.left_out()))


if __name__ == "__main__":
    cli.run(main)
