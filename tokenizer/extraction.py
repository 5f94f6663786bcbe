"""Tokens of many images, each in one or several views, and the token store that they are written to."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import ten_crop
from tqdm import tqdm

from common.config import InputError
from common.files import exclusive_folder, folder_written_whole, read_json
from common.images import to_float
from common.runtime import launched_workers, move
from tokenizer.data import ImageDataset, UnreadableFiles, collate
from tokenizer.settings import DataConfig, ExtractionConfig
from tokenizer.sources import SPLITS, ImageSource, check_same_classes, open_source
from tokenizer.tokenizer import ChannelTokenizer

logger = logging.getLogger(__name__)
# for each setting: number of views, side of the square to load relative to the tokenizer's, and a function that cuts
# images (b 3 H W) of that side into views (b 3 side side), given the tokenizer's side
VIEWS: dict[str, tuple[int, float, Callable[[Tensor, int], Sequence[Tensor]]]] = {
    "none": (1, 1.0, lambda images, _: [images]),
    "flip": (2, 1.0, lambda images, _: [images, images.flip(-1)]),
    # as LlamaGen extracts its codes (arXiv 2406.06525): four corners and the middle, and the mirror images of these
    "ten-crop": (10, 1.1, ten_crop),
}


def tokenize_files(
    tokenizer: ChannelTokenizer,
    source: ImageSource,
    files: Sequence[int],
    *,
    views: str,
    batch_size: int,
    num_workers: int,
    unreadable: UnreadableFiles,
) -> tuple[Tensor, Tensor, list[str]]:
    """Tokenize some of a split's files.

    Args:
        tokenizer: on the device to use.
        source: the split.
        files: positions in the split.
        views: one of `VIEWS`.
        batch_size: images per forward pass.
        num_workers: processes that read images.
        unreadable: logs each image that cannot be read; such an image gets no row.

    Returns:
        tokens (rows, views, C) int64, labels (rows,) int64, and a line for each unreadable image.
    """
    size, (count, side, cut) = tokenizer.config.image_size, VIEWS[views]
    loader = DataLoader(
        ImageDataset(source, round(side * size)),
        batch_sampler=[[(i, 0) for i in files[at : at + batch_size]] for at in range(0, len(files), batch_size)],
        num_workers=num_workers,
        collate_fn=collate,
    )
    tokens = [torch.empty(0, count, tokenizer.config.num_channels, dtype=torch.long)]
    labels = [torch.empty(0, dtype=torch.long)]
    left_out: list[str] = []
    for batch in loader:
        unreadable.note(batch)
        left_out += [f"{name}: {reason}" for name, reason in batch.unreadable.items()]
        if len(batch.images):
            images = to_float(batch.images.to(tokenizer.device))
            tokens.append(torch.stack([tokenizer.tokenize(view).cpu() for view in cut(images, size)], dim=1))
            labels.append(batch.labels)
    return torch.cat(tokens), torch.cat(labels), left_out


def exact_dtype(tokenizer: ChannelTokenizer) -> torch.dtype:
    """Return the format of a copy: bfloat16 if it represents all weights exactly, otherwise float32."""
    exact = all(bool((weight == weight.bfloat16()).all()) for weight in tokenizer.parameters())
    return torch.bfloat16 if exact else torch.float32


def write_store(config: ExtractionConfig, data: DataConfig, create: Callable[..., Any]) -> None:
    """Write the shards of a token store that are missing, in one process or those that a launcher started.

    Args:
        config: the settings.
        data: where the images are.
        create: (whether this process writes the header, **fields of a `StoreHeader`) -> a `TokenStore`.

    Raises:
        InputError: what the settings name cannot be read, or the folder holds another store.
    """
    with (
        launched_workers(config.device) as workers,
        exclusive_folder(config.output_dir) if workers.is_main else nullcontext(),
    ):
        sources = {split: open_source(data, split) for split in SPLITS}
        check_same_classes(sources["train"], sources["val"])
        names = read_json(config.class_names) if config.class_names else {}
        tokenizer = ChannelTokenizer.from_pretrained(config.tokenizer)
        store = create(
            workers.is_main,
            tokenizer_fingerprint=tokenizer.token_fingerprint(),
            num_channels=tokenizer.config.num_channels,
            num_bits=tokenizer.config.num_bits,
            class_names=[str(names.get(name, name)) for name in sources["train"].classes],
            views=config.views,
            shard_size=config.shard_size,
            split_files={split: len(source) for split, source in sources.items()},
            listings={split: source.fingerprint() for split, source in sources.items()},
        )
        if workers.is_main and not store.tokenizer_folder.exists():
            with folder_written_whole(store.tokenizer_folder) as temporary:
                # of the weights that made the tokens: the source folder may be written again meanwhile
                tokenizer.save_pretrained(temporary, exact_dtype(tokenizer))
        workers.wait()
        move(tokenizer, workers.device)
        unreadable = UnreadableFiles(config.strict)
        # assigned before those that exist are skipped, so that the assignment does not depend on other processes
        own = store.header.shards()[workers.index :: workers.count]
        for split, shard in tqdm(own, unit="shard", disable=not workers.is_main):
            if not store.has_shard(split, shard):
                found = tokenize_files(
                    tokenizer,
                    sources[split],
                    store.header.shard_files(split, shard),
                    views=config.views if split == "train" else "none",
                    batch_size=config.batch_size,
                    num_workers=config.num_workers,
                    unreadable=unreadable,
                )
                store.write_shard(split, shard, *found)
        workers.wait()
        if workers.is_main:
            logger.info("%s: complete, %d unreadable files left out", config.output_dir, len(store.left_out()))


def log_verification(store: Any, content: list[str], problems: list[str]) -> None:
    """Log what `generator.tokens.verify` found in a store, and whether its tokenizer is the one that made it.

    Raises:
        InputError: there are problems.
    """
    folder, expected = store.tokenizer_folder, store.header.tokenizer_fingerprint
    try:
        found = ChannelTokenizer.from_pretrained(folder).token_fingerprint()
        if found != expected:
            raise InputError(
                f"{folder} is the tokenizer {found}, the store is of {expected}; restore the one that made it"
            )
    except InputError as error:
        problems = [*problems, str(error)]
    for line in content:
        logger.info("%s", line)
    for problem in problems:
        logger.warning("%s", problem)
    if problems:
        raise InputError(
            f"{store.folder}: problems found: {len(problems)}, reported above; extract again what they name"
        )
    logger.info("%s: no problem found", store.folder)
