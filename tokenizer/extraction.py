"""Images to tokens in bulk."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from common.images import to_float
from tokenizer.data import ImageDataset, UnreadableFiles, collate
from tokenizer.tokenizer import ChannelTokenizer


def tokenize_files(
    tokenizer: ChannelTokenizer,
    folder: ImageFolder,
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
        folder: the split.
        files: positions in the split's listing.
        flip: also tokenize every image mirrored, as a second view.
        batch_size: images a pass.
        num_workers: processes that read files.
        unreadable: told of each file that cannot be read; such a file gets no row.

    Returns:
        tokens (rows, views, C) int64, labels (rows,) int64, and a line for each unreadable file.
    """
    dataset = ImageDataset(folder, tokenizer.config.image_size, flip_seed=None, replace_unreadable=False)
    keys = [(index, 0) for index in files]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate)
    tokens = [torch.empty(0, 1 + flip, tokenizer.config.num_channels, dtype=torch.long)]
    labels = [torch.empty(0, dtype=torch.long)]
    left_out: list[str] = []
    for batch in loader:
        unreadable.note(batch)
        left_out += batch.unreadable
        if not len(batch.images):
            continue
        images = to_float(batch.images.to(tokenizer.device))
        views = [images, images.flip(-1)] if flip else [images]
        tokens.append(torch.stack([tokenizer.tokenize(view).cpu() for view in views], dim=1))
        labels.append(batch.labels)
    return torch.cat(tokens), torch.cat(labels), left_out
