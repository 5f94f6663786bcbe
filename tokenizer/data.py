"""Images ready for a model: decoded, cut, scaled and mirrored in the processes that load them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import InputError
from common.images import MIDDLE_SQUARE, Crop, UnreadableImageError, load_image
from common.randomness import Stream, generator_for
from tokenizer.settings import AugmentationConfig
from tokenizer.sources import ImageSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """images (b 3 H W) uint8, labels (b,) int64, and name: reason for each image that could not be read."""

    images: Tensor
    labels: Tensor
    unreadable: dict[str, str]

    def pin_memory(self) -> "ImageBatch":
        """The same in memory that a GPU can fetch from; torch's loader asks for it."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True, kw_only=True)
class _Sample:
    image: Tensor | None
    label: int
    unreadable: dict[str, str]


class ImageDataset(Dataset[_Sample]):
    """Images by (index, epoch); what is random about an image depends on seed, index and epoch alone.

    Args:
        source: from `tokenizer.sources.open_source`.
        image_size: pixels of a side.
        augmentation: what is random; None takes the middle square of every image as it is.
        seed: decides the augmentation.
        replace_unreadable: put the next readable image in the place of one that cannot be read;
            otherwise the place stays empty.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        augmentation: AugmentationConfig | None,
        seed: int,
        replace_unreadable: bool,
    ):
        self.source = source
        self.image_size = image_size
        self.augmentation = augmentation
        self.seed = seed
        self.replace_unreadable = replace_unreadable
        self._replaced: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def _draw(self, index: int, epoch: int) -> tuple[bool, Crop]:
        if self.augmentation is None:
            return False, MIDDLE_SQUARE
        # the flip is drawn first, and also where it is not wanted: no setting changes what another one draws
        rng = generator_for(self.seed, Stream.AUGMENTATION, index, epoch)
        flip = bool(torch.rand((), generator=rng) < 0.5) and self.augmentation.random_flip
        if self.augmentation.min_crop == 1:
            return flip, MIDDLE_SQUARE
        share, across, down = torch.rand(3, generator=rng).tolist()
        lowest = self.augmentation.min_crop
        return flip, Crop(share=lowest + (1 - lowest) * share, across=across, down=down)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        index, epoch = key
        flip, crop = self._draw(index, epoch)
        unreadable: dict[str, str] = {}
        for step in range(len(self) if self.replace_unreadable else 1):
            position = (index + step) % len(self)
            if position in self._replaced:  # was reported by this process, and will not have become readable
                continue
            name = self.source.image_name(position)
            try:
                image = load_image(self.source.read(position), self.image_size, crop, name)
            except UnreadableImageError as error:
                unreadable[error.name] = error.reason
                if self.replace_unreadable:
                    self._replaced.add(position)
                continue
            image = image.flip(-1) if flip else image
            return _Sample(image=image, label=self.source.label(position), unreadable=unreadable)
        return _Sample(image=None, label=self.source.label(index), unreadable=unreadable)


def collate(samples: Sequence[_Sample]) -> ImageBatch:
    """Stack what could be read; a batch may be smaller than asked for, or empty."""
    images = [sample.image for sample in samples if sample.image is not None]
    return ImageBatch(
        images=torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        labels=torch.tensor([sample.label for sample in samples if sample.image is not None], dtype=torch.long),
        unreadable={name: reason for sample in samples for name, reason in sample.unreadable.items()},
    )


def spread(total: int, count: int) -> list[int]:
    """`count` of 0..total-1, spread evenly, rising; all of them if there are not more."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


class UnreadableFiles:
    """Names each unreadable image once, counts them, and stops at the first one if `strict`."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.names: dict[str, None] = {}

    def note(self, batch: ImageBatch) -> None:
        """Take in what a batch reports.

        Raises:
            InputError: an image is unreadable and `strict` is set.
        """
        for name, reason in batch.unreadable.items():
            if self.strict:
                raise InputError(f"unreadable image {name}: {reason}; remove it, or leave --strict away to skip it")
            if name not in self.names:
                self.names[name] = None
                logger.warning("skipped unreadable image %s: %s", name, reason)

    def summary(self) -> dict[str, Any]:
        """Count and names, for a log."""
        return {"count": len(self.names), "files": list(self.names)}
