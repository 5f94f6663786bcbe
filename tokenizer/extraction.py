"""Tokens of many images, each in one or several views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import ten_crop

from common.images import to_float
from tokenizer.data import ImageDataset, UnreadableFiles, collate
from tokenizer.sources import ImageSource
from tokenizer.tokenizer import ChannelTokenizer


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of an image that are tokenized.

    Attributes:
        count: number of views.
        side: side of the middle square to load, relative to the tokenizer's image size.
        cut: (images (b 3 H W) of that side, the tokenizer's side) -> the views, each (b 3 side side).
    """

    count: int
    side: float
    cut: Callable[[Tensor, int], Sequence[Tensor]]

    def pixels(self, image_size: int) -> int:
        """Return the side to load, in pixels."""
        return round(self.side * image_size)


VIEWS = {
    "none": Views(count=1, side=1.0, cut=lambda images, _: [images]),
    "flip": Views(count=2, side=1.0, cut=lambda images, _: [images, images.flip(-1)]),
    # as LlamaGen extracts its codes (arXiv 2406.06525): four corners and the middle, and the mirror images of these
    "ten-crop": Views(count=10, side=1.1, cut=ten_crop),
}


def exact_dtype(tokenizer: ChannelTokenizer) -> torch.dtype:
    """Return the format of a copy: bfloat16 if it represents all weights exactly, otherwise float32."""
    exact = all(bool((weight == weight.bfloat16()).all()) for weight in tokenizer.parameters())
    return torch.bfloat16 if exact else torch.float32


def tokenize_files(
    tokenizer: ChannelTokenizer,
    source: ImageSource,
    files: Sequence[int],
    *,
    views: Views,
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
    size = tokenizer.config.image_size
    dataset = ImageDataset(source, views.pixels(size), augmentation=None, seed=0, replace_unreadable=False)
    keys = [(index, 0) for index in files]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate)
    tokens = [torch.empty(0, views.count, tokenizer.config.num_channels, dtype=torch.long)]
    labels = [torch.empty(0, dtype=torch.long)]
    left_out: list[str] = []
    for batch in loader:
        unreadable.note(batch)
        left_out += [f"{name}: {reason}" for name, reason in batch.unreadable.items()]
        if not len(batch.images):
            continue
        images = to_float(batch.images.to(tokenizer.device))
        tokens.append(torch.stack([tokenizer.tokenize(view).cpu() for view in views.cut(images, size)], dim=1))
        labels.append(batch.labels)
    return torch.cat(tokens), torch.cat(labels), left_out
