"""Images from a folder: train/<class>/* and val/<class>/*, as torchvision's ImageFolder reads them."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from common.errors import InputError
from common.images import UnreadableImageError, load_image
from common.steps import generator_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """images (b 3 H W) uint8, labels (b,) int64, and a line for each file that could not be read."""

    images: Tensor
    labels: Tensor
    unreadable: list[str]


@dataclass(frozen=True, kw_only=True)
class _Sample:
    image: Tensor | None
    label: int
    unreadable: list[str]


def open_split(data_dir: str | Path, split: str) -> ImageFolder:
    """List the image files below data_dir/split, a folder for each class.

    Raises:
        InputError: no such folder, no class folders, or a class without a single image.
    """
    folder = Path(data_dir) / split
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; data_dir must hold {split}/<class>/<images>")
    try:
        return ImageFolder(str(folder))
    except (FileNotFoundError, RuntimeError) as error:
        raise InputError(f"{folder}: {error}; each class folder needs at least one image") from error


def listing_fingerprint(folder: ImageFolder) -> str:
    """16 hexadecimal digits that stand for the names, sizes and classes of a split's files."""
    digest = hashlib.sha256()
    for path, label in folder.samples:
        digest.update(f"{Path(path).name} {Path(path).stat().st_size} {label};".encode())
    return digest.hexdigest()[:16]


class ImageDataset(Dataset[_Sample]):
    """Images by (index, epoch); what is random about an image depends on seed, index and epoch alone.

    Args:
        folder: from `open_split`.
        image_size: pixels; the middle square of an image, scaled.
        flip_seed: mirror half of the images at random, by this seed; None never mirrors.
        replace_unreadable: put the next readable image in the place of one that cannot be read;
            otherwise the place stays empty.
    """

    def __init__(self, folder: ImageFolder, image_size: int, *, flip_seed: int | None, replace_unreadable: bool):
        self.samples = folder.samples
        self.image_size = image_size
        self.flip_seed = flip_seed
        self.replace_unreadable = replace_unreadable

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        index, epoch = key
        unreadable: list[str] = []
        for step in range(len(self) if self.replace_unreadable else 1):
            path, label = self.samples[(index + step) % len(self)]
            try:
                image = load_image(path, self.image_size)
            except UnreadableImageError as error:
                unreadable.append(str(error))
                continue
            if (
                self.flip_seed is not None
                and torch.rand((), generator=generator_for(self.flip_seed, 3, index, epoch)) < 0.5
            ):
                image = image.flip(-1)
            return _Sample(image=image, label=label, unreadable=unreadable)
        return _Sample(image=None, label=self.samples[index][1], unreadable=unreadable)


def collate(samples: Sequence[_Sample]) -> ImageBatch:
    """Stack what could be read; a batch may be smaller than asked for, or empty."""
    images = [sample.image for sample in samples if sample.image is not None]
    return ImageBatch(
        images=torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        labels=torch.tensor([sample.label for sample in samples if sample.image is not None], dtype=torch.long),
        unreadable=[line for sample in samples for line in sample.unreadable],
    )


class UnreadableFiles:
    """Names each unreadable file once, counts them, and stops at the first one if `strict`."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.lines: dict[str, None] = {}

    def note(self, batch: ImageBatch) -> None:
        """Take in what a batch reports.

        Raises:
            InputError: a file is unreadable and `strict` is set, or nothing in the batch is readable.
        """
        for line in batch.unreadable:
            if self.strict:
                raise InputError(f"unreadable image {line}; remove it, or leave --strict away to skip it")
            if line not in self.lines:
                self.lines[line] = None
                logger.warning("skipped unreadable image %s", line)

    def summary(self) -> dict[str, Any]:
        """Count and names, for a log."""
        return {"count": len(self.lines), "files": list(self.lines)}
