"""Images to tokens in bulk."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.images import to_float
from tokenizer.data import ImageDataset, UnreadableFiles, collate
from tokenizer.sources import ImageSource
from tokenizer.tokenizer import ChannelTokenizer


def tokenize_files(
    tokenizer: ChannelTokenizer,
    source: ImageSource,
    files: range,
    *,
    flip: bool,
    batch_size: int,
    num_workers: int,
    unreadable: UnreadableFiles,
) -> tuple[Tensor, Tensor, list[str]]:
    """Tokens of a range of a split's files.

    Args:
        tokenizer: on the device to use.
        source: the split.
        files: positions in the split.
        flip: also tokenize every image mirrored, as a second view.
        batch_size: images a pass.
        num_workers: processes that read images.
        unreadable: told of each image that cannot be read; such an image gets no row.

    Returns:
        tokens (rows, views, C) int64, labels (rows,) int64, and a line for each unreadable image.
    """
    size = tokenizer.config.image_size
    dataset = ImageDataset(source, size, augmentation=None, seed=0, replace_unreadable=False)
    keys = [(index, 0) for index in files]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate)
    tokens = [torch.empty(0, 1 + flip, tokenizer.config.num_channels, dtype=torch.long)]
    labels = [torch.empty(0, dtype=torch.long)]
    left_out: list[str] = []
    for batch in loader:
        unreadable.note(batch)
        left_out += [f"{name}: {reason}" for name, reason in batch.unreadable.items()]
        if not len(batch.images):
            continue
        images = to_float(batch.images.to(tokenizer.device))
        views = [images, images.flip(-1)] if flip else [images]
        tokens.append(torch.stack([tokenizer.tokenize(view).cpu() for view in views], dim=1))
        labels.append(batch.labels)
    return torch.cat(tokens), torch.cat(labels), left_out
