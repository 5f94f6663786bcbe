"""The held-out images that reconstruction is measured on: the one place that touches the data interface."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from tokenizer.data import ImageBatch, ImageDataset, collate, listing_fingerprint, open_split
from tokenizer.reconstruction.config import ReconstructionConfig

SPLIT = "val"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    data_dir: str = field(metadata={"help": "folder with train/<class>/* and val/<class>/*; val is used"})


@dataclass(frozen=True, kw_only=True)
class HeldOutImages:
    """`count` of a split's `available` images, spread evenly over it, in batches that are read one at a time.

    `name`, `fingerprint`: which data; `preparation`: what was done to an image before it was measured.
    """

    name: str
    fingerprint: str
    preparation: str
    available: int
    count: int
    batches: Iterable[ImageBatch]


def spread(total: int, count: int) -> list[int]:
    """`count` of 0..total-1, spread evenly, rising; all of them if there are not more."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def open_images(data: DataConfig, image_size: int, config: ReconstructionConfig) -> HeldOutImages:
    """Open the validation split; nothing of it is read yet.

    Raises:
        InputError: data that cannot be used.
    """
    folder = open_split(data.data_dir, SPLIT)
    images = ImageDataset(folder, image_size, flip_seed=None, replace_unreadable=False)
    keys = [(index, 0) for index in spread(len(images), config.max_images or len(images))]
    batches = [keys[start : start + config.batch_size] for start in range(0, len(keys), config.batch_size)]
    return HeldOutImages(
        name=SPLIT,
        fingerprint=listing_fingerprint(folder),
        preparation=f"upright, shorter side scaled to {image_size} pixels (Lanczos), middle square, 8 bits",
        available=len(images),
        count=len(keys),
        batches=DataLoader(images, batch_sampler=batches, num_workers=config.num_workers, collate_fn=collate),
    )
