"""The held-out images that reconstruction is measured on: the one place that touches the data interface."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch.utils.data import DataLoader

from evaluation.reconstruction.config import ReconstructionConfig
from tokenizer.data import ImageBatch, ImageDataset, collate, spread
from tokenizer.settings import DataConfig
from tokenizer.sources import open_source


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


def open_images(data: DataConfig, image_size: int, config: ReconstructionConfig) -> HeldOutImages:
    """Open the validation split; nothing of it is read yet.

    Raises:
        InputError: data that cannot be used.
    """
    source = open_source(data, "val")
    images = ImageDataset(source, image_size, augmentation=None, seed=0, replace_unreadable=False)
    keys = [(index, 0) for index in spread(len(images), config.max_images or len(images))]
    batches = [keys[start : start + config.batch_size] for start in range(0, len(keys), config.batch_size)]
    return HeldOutImages(
        name=source.name,
        fingerprint=source.fingerprint(),
        preparation=f"upright, shorter side scaled to {image_size} pixels (Lanczos), middle square, 8 bits",
        available=len(images),
        count=len(keys),
        batches=DataLoader(images, batch_sampler=batches, num_workers=config.num_workers, collate_fn=collate),
    )
