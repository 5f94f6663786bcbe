"""Batches of images for a model: decoded, cropped, scaled and mirrored in the processes that load them."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.config import InputError
from common.images import MIDDLE_SQUARE, Crop, UnreadableImageError, load_image
from common.randomness import Stream, generator_for
from tokenizer.settings import AugmentationConfig
from tokenizer.sources import ImageSource

logger = logging.getLogger(__name__)
Sample = tuple[Tensor | None, int, dict[str, str]]  # image, label, and name: reason of images that cannot be read


class ImageBatch(NamedTuple):
    """images (b 3 H W) uint8, labels (b,) int64, and name: reason for each image that could not be read."""

    images: Tensor
    labels: Tensor
    unreadable: dict[str, str]


class ImageDataset(Dataset[Sample]):
    """Images by (index, epoch); their augmentation depends on seed, index and epoch alone.

    Args:
        source: from `tokenizer.sources.open_source`.
        image_size: pixels of a side.
        augmentation: random flips and crops; None uses the middle square of every image.
        seed: of the augmentation.
        replace_unreadable: replace an unreadable image by the next readable one; otherwise omit it.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        augmentation: AugmentationConfig | None = None,
        *,
        seed: int = 0,
        replace_unreadable: bool = False,
    ):
        self.source, self.image_size, self.augmentation, self.seed = source, image_size, augmentation, seed
        self.replace_unreadable = replace_unreadable
        self._replaced: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def _draw(self, index: int, epoch: int) -> tuple[bool, Crop]:
        if self.augmentation is None:
            return False, MIDDLE_SQUARE
        # the flip is drawn first, and always: no setting changes what another one draws
        rng = generator_for(self.seed, Stream.AUGMENTATION, index, epoch)
        flip = bool(torch.rand((), generator=rng) < 0.5) and self.augmentation.random_flip
        share, across, down = torch.rand(3, generator=rng).tolist()
        lowest = self.augmentation.min_crop
        crop = Crop(share=lowest + (1 - lowest) * share, across=across, down=down)
        return flip, MIDDLE_SQUARE if lowest == 1 else crop

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        flip, crop = self._draw(index, epoch)
        unreadable: dict[str, str] = {}
        for step in range(len(self) if self.replace_unreadable else 1):
            position = (index + step) % len(self)
            if position in self._replaced:  # this process has reported it
                continue
            try:
                image = load_image(self.source.read(position), self.image_size, crop, self.source.image_name(position))
            except UnreadableImageError as error:
                unreadable[error.name] = error.reason
                if self.replace_unreadable:
                    self._replaced.add(position)
                continue
            return image.flip(-1) if flip else image, int(self.source.labels[position]), unreadable
        return None, -1, unreadable


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Stack the readable images; a batch may be smaller than requested, or empty."""
    images = [image for image, _, _ in samples if image is not None]
    return ImageBatch(
        images=torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        labels=torch.tensor([label for image, label, _ in samples if image is not None], dtype=torch.long),
        unreadable={name: reason for _, _, found in samples for name, reason in found.items()},
    )


def spread(total: int, count: int) -> list[int]:
    """Choose `count` evenly spaced numbers of 0..total-1, ascending; all of them if there are not more."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


class UnreadableFiles:
    """Names and number of the unreadable images, each logged once; with `strict` the first one is an error."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.names: dict[str, None] = {}

    def note(self, batch: ImageBatch) -> None:
        """Log the unreadable images of a batch.

        Raises:
            InputError: an image is unreadable and `strict` is set.
        """
        for name, reason in batch.unreadable.items():
            if self.strict:
                raise InputError(f"unreadable image {name}: {reason}; remove it, or omit --strict to skip it")
            if name not in self.names:
                self.names[name] = None
                logger.warning("skipped unreadable image %s: %s", name, reason)

    def summary(self) -> dict[str, Any]:
        """Return count and names, for a log."""
        return {"count": len(self.names), "files": list(self.names)}
