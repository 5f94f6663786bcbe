"""Training on images with class labels: what the trainers of tokenizer, refiner and classifier share."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.config import InputError
from common.images import to_float
from training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images of a run, from `tokenizer.training.open_images`.

    Attributes:
        train, val: data sets with a `source`, indexed by (index, epoch).
        class_names: for people, one for each label.
        collate: makes a batch with images (b 3 H W) uint8, labels (b,) and names of unreadable files.
        unreadable: collects these names.
    """

    train: Any
    val: Any
    class_names: list[str]
    collate: Callable[[Any], Any]
    unreadable: Any


class ImageTrainer(Trainer):
    """A trainer whose batches are images; a subclass sets `images` in its `__init__`."""

    images: LabelledImages

    def data(self) -> tuple[Any, Any, Callable[[Any], Any]]:
        """Images to train on and held-out ones, and the function that makes a batch."""
        return self.images.train, self.images.val, self.images.collate

    def to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images (b 3 H W) in [-1, 1] and labels (b,) of a batch; an `InputError` if none can be read."""
        self.images.unreadable.note(batch)
        self._check_some(len(batch.images), self.images.train)
        images = to_float(batch.images.to(self.device, non_blocking=True))
        return images, batch.labels.to(self.device, non_blocking=True)

    def held_batches(self, count: int, size: int) -> Iterator[Any]:
        """At most `count` validation images in batches of up to `size`; an `InputError` if none can be read."""
        found, loader = 0, self.held_loader(count, size, self.config.num_workers)
        for batch in tqdm(loader, desc="evaluation", delay=2, leave=False):
            self.images.unreadable.note(batch)
            found += len(batch.images)
            if len(batch.images):
                yield batch
        self._check_some(found, self.images.val)

    def _check_some(self, count: int, data: Any) -> None:
        if not count:
            raise InputError(f"no image of {data.source.name} can be read; see the lines above")

    def run(self) -> None:
        """Train, then report how many images were unreadable."""
        super().run()
        if self.images.unreadable.names:
            logger.warning("%d unreadable images were skipped, see above", len(self.images.unreadable.names))
