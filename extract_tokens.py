"""Turn images into a token store with a trained tokenizer, or check one with --verify alone: see docs/training.md."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common import cli, runtime
from common.checkpoint import folder_written_whole, read_json, save_pretrained_whole
from common.errors import InputError
from common.processes import Team, team
from generator.tokens import StoreHeader, TokenStore
from generator.verification import describe, verify
from tokenizer import ChannelTokenizer
from tokenizer.data import UnreadableFiles
from tokenizer.extraction import VIEWS, as_it_was_saved, tokenize_files
from tokenizer.sources import SPLITS, DataConfig, open_source

logger = logging.getLogger("tokenizer.extract_tokens")


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """Flags of extract_tokens.py."""

    tokenizer: str = field(metadata={"help": "tokenizer folder, or its name on the Hugging Face hub"})
    output_dir: str = field(metadata={"help": "folder of the token store; one that was begun is continued"})
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "JSON file that gives classes a readable name; default: names of the folders or of --dataset"
        },
    )
    views: Literal["none", "flip", "ten-crop"] = field(
        default="none",
        metadata={"help": "of train; flip: the mirror image as well; ten-crop: corners and middle of a larger image, "
                  "and their mirror images"},
    )  # fmt: skip
    shard_size: int = field(default=10_000, metadata={"help": "images a shard"})
    batch_size: int = field(default=64, metadata={"help": "images a pass"})
    num_workers: int = field(default=1, metadata={"help": "processes that read images"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of leaving it out"})

    verify: str | None = field(
        default=None, metadata={"help": "alone on the command line: a token store to check, in place of making one"}
    )

    def __post_init__(self) -> None:
        if self.verify is not None:
            raise InputError("verify stands alone on the command line: extract_tokens.py --verify STORE")
        if self.batch_size < 1 or self.shard_size < 1 or self.num_workers < 0:
            raise InputError("batch_size and shard_size must be at least 1, num_workers at least 0")


def check(folder: str) -> None:
    """Tell what a store holds and what is wrong with it."""
    store = TokenStore(folder, TokenStore.peek(folder))
    header = store.header
    with logging_redirect_tqdm():
        found = verify(store)
    problems = list(found.problems)
    try:
        tokenizer = ChannelTokenizer.from_pretrained(store.tokenizer_folder)
    except InputError as error:
        problems.append(str(error))
    else:
        made = (tokenizer.token_fingerprint(), tokenizer.config.num_channels, tokenizer.config.num_bits)
        wanted = (header.tokenizer_fingerprint, header.num_channels, header.num_bits)
        if made != wanted:
            problems.append(
                f"{store.tokenizer_folder} is the tokenizer {made[0]} ({made[1]} tokens of {made[2]} bits), the store "
                f"is of {wanted[0]} ({wanted[1]} tokens of {wanted[2]} bits); put back the one that made it"
            )
    for line in describe(header, found):
        logger.info("%s", line)
    for problem in problems:
        logger.warning("%s", problem)
    if problems:
        raise InputError(f"{folder}: problems found: {len(problems)}, each told above; extract again what they name")
    logger.info("%s: no problem found", folder)


def main() -> None:
    """Parse, then write each shard that is missing."""
    runtime.set_up_logging()
    folder = cli.parse_alone("verify")
    if folder is not None:
        check(folder)
        return
    config, data = cli.parse(ExtractionConfig, DataConfig, description=__doc__)
    with team(config.device) as workers:
        extract(config, data, workers)


def extract(config: ExtractionConfig, data: DataConfig, workers: Team) -> None:
    """Write the shards that are missing, of those that fall to this process."""
    sources = {split: open_source(data, split) for split in SPLITS}
    train, val = sources["train"], sources["val"]
    if train.classes != val.classes:
        raise InputError(f"{train.name} and {val.name} hold different classes; they must be the same")
    names = read_json(config.class_names) if config.class_names else {}
    tokenizer = ChannelTokenizer.from_pretrained(config.tokenizer)
    header = StoreHeader(
        tokenizer_fingerprint=tokenizer.token_fingerprint(),
        num_channels=tokenizer.config.num_channels,
        num_bits=tokenizer.config.num_bits,
        class_names=[str(names.get(name, name)) for name in train.classes],
        views=config.views,
        shard_size=config.shard_size,
        split_files={split: len(source) for split, source in sources.items()},
        listings={split: source.fingerprint() for split, source in sources.items()},
    )
    store = TokenStore.create(config.output_dir, header, write=workers.is_main)
    if workers.is_main and not store.tokenizer_folder.exists():
        with folder_written_whole(store.tokenizer_folder) as temporary:
            save_pretrained_whole(as_it_was_saved(tokenizer), temporary)
    workers.wait()
    runtime.move(tokenizer, workers.device)
    unreadable = UnreadableFiles(config.strict)
    # dealt out before looking which are there: what one process has written in the meantime moves nothing to another
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
