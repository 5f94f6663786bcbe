"""Train the small classifier of `tokenizer.classifier` on images with classes."""

import logging
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.images import to_float
from tokenizer.classifier import PictureClassifier
from tokenizer.data import ImageBatch
from tokenizer.settings import AugmentationConfig, ClassifierConfig, ClassifierTrainingConfig, DataConfig
from tokenizer.training import open_images
from training.images import ImageTrainer
from training.model_state import StepLoss
from training.schedule import Part

logger = logging.getLogger(__name__)
EVALUATION_BATCH = 64


class ClassifierTrainer(ImageTrainer):
    """Trains a classifier and writes it to training.output_dir: features.safetensors, checkpoints/ and log.jsonl.

    Raises:
        InputError: settings or data that cannot be used, or classes that differ between the two splits.
    """

    def __init__(
        self,
        training: ClassifierTrainingConfig,
        data: DataConfig,
        augmentation: AugmentationConfig,
        config: ClassifierConfig,
    ):
        super().__init__(training)
        self.label_smoothing = training.label_smoothing
        self.images = open_images(
            data, augmentation, config.classifier_size,
            seed=training.seed, strict=training.strict, names_file=training.class_names,
        )  # fmt: skip
        images = self.images.train.source.fingerprint()
        identity = {"model": asdict(config), "augmentation": asdict(augmentation), "images": images}
        self.prepare(PictureClassifier(config, self.images.class_names), identity)

    def loss(self, model: nn.Module, batch: ImageBatch, part: Part) -> StepLoss:
        """Cross-entropy and accuracy of a micro-batch."""
        images, labels = self.to_device(batch)
        logits = model(images).float()
        smooth = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepLoss(terms={"loss": smooth, "accuracy": (logits.argmax(1) == labels).float().mean()})

    def evaluate(self, averaged: PictureClassifier, step: int) -> dict[str, Any]:
        """Cross-entropy and accuracy of all validation images."""
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in self.held_batches(len(self.images.val), EVALUATION_BATCH):
            parts.append((averaged(to_float(batch.images.to(self.device))).float().cpu(), batch.labels))
        logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        nats = F.cross_entropy(logits, labels, reduction="none").mean().item()
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        logger.info("step %d: %.1f%% of held-out images correct, %.3f nats", step, 100 * accuracy, nats)
        return {"nats": round(nats, 4), "accuracy": round(accuracy, 4)}

    def export(self, averaged: PictureClassifier) -> None:
        """Write features.safetensors."""
        averaged.save(self.output_dir / "features.safetensors")
