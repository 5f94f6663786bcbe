"""Training on images with class labels: what the trainers of tokenizer, refiner and classifier share."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.errors import InputError
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

    def batches(self) -> DataLoader[Any]:
        """The remaining micro-batches of training."""
        return self.train_loader(self.images.train, self.images.collate)

    def to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images (b 3 H W) in [-1, 1] and labels (b,) of a batch.

        Raises:
            InputError: no image can be read, or with --strict one cannot.
        """
        self.images.unreadable.note(batch)
        if not len(batch.images):
            raise InputError(f"no image of {self.images.train.source.name} can be read; see the lines above")
        images = to_float(batch.images.to(self.device, non_blocking=True))
        return images, batch.labels.to(self.device, non_blocking=True)

    def held_batches(self, count: int, size: int) -> Iterator[Any]:
        """At most `count` validation images in batches of at most `size`, without the unreadable ones.

        Raises:
            InputError: none can be read, or with --strict one cannot.
        """
        found = False
        for batch in tqdm(
            self.held_loader(self.images.val, count, size, self.images.collate), desc="evaluation", delay=2, leave=False
        ):
            self.images.unreadable.note(batch)
            if len(batch.images):
                found = True
                yield batch
        if not found:
            raise InputError(f"no image of {self.images.val.source.name} can be read; see the lines above")

    def run(self) -> None:
        """Train, then report how many images were unreadable."""
        super().run()
        if self.images.unreadable.names:
            logger.warning("%d unreadable images were skipped, see above", len(self.images.unreadable.names))
