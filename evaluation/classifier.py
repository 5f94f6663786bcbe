"""Train the small classifier of `common.classifier` on photographs with classes."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.classifier import PictureClassifier
from common.config import ClassifierConfig
from common.errors import InputError
from common.files import read_json
from common.images import to_float
from common.runtime import check_can_compile, leave_signals_to_the_trainer
from tokenizer.data import ImageBatch, ImageDataset, UnreadableFiles, collate
from tokenizer.settings import AugmentationConfig, ClassifierTrainingConfig, DataConfig
from tokenizer.sources import check_same_classes, open_source
from training.distributed import make_accelerator
from training.loop import Loop, RunTasks, StepLoss
from training.schedule import Part

logger = logging.getLogger(__name__)
EVALUATION_BATCH = 64


def train_classifier(
    training: ClassifierTrainingConfig, data: DataConfig, augmentation: AugmentationConfig, config: ClassifierConfig
) -> None:
    """Train a classifier; training.output_dir gets features.safetensors (averaged weights), checkpoints/ and log.jsonl.

    Raises:
        InputError: settings or data that cannot be used, or classes that differ between the two splits.
    """
    train_source, val_source = open_source(data, "train"), open_source(data, "val")
    check_same_classes(train_source, val_source)
    names = read_json(training.class_names) if training.class_names else {}
    accelerator = make_accelerator(training)
    device = accelerator.device
    model = PictureClassifier(config, [str(names.get(name, name)) for name in train_source.classes])
    if training.compile:
        check_can_compile(device)
        model.compile()
    identity = {"model": asdict(config), "augmentation": asdict(augmentation), "images": train_source.fingerprint()}
    loop, unreadable = Loop(model, training, accelerator, identity), UnreadableFiles(training.strict)

    size, seed = config.classifier_size, training.seed
    images = ImageDataset(train_source, size, augmentation=augmentation, seed=seed, replace_unreadable=True)
    held = ImageDataset(val_source, size, augmentation=None, seed=seed, replace_unreadable=False)
    options: dict[str, Any] = {
        "num_workers": training.num_workers,
        "worker_init_fn": leave_signals_to_the_trainer,
        "collate_fn": collate,
        "pin_memory": device.type == "cuda",
    }
    batches = DataLoader(images, batch_sampler=loop.sampler(len(images)), **options)
    held_batches = DataLoader(held, batch_size=EVALUATION_BATCH, sampler=[(i, 0) for i in range(len(held))], **options)

    def loss(network: nn.Module, batch: ImageBatch, part: Part) -> StepLoss:
        unreadable.note(batch)
        if not len(batch.images):
            raise InputError(f"no image of {train_source.name} can be read; see the lines above")
        labels = batch.labels.to(device, non_blocking=True)
        logits = network(to_float(batch.images.to(device, non_blocking=True))).float()
        smooth = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
        return StepLoss(terms={"loss": smooth, "accuracy": (logits.argmax(1) == labels).float().mean()})

    @torch.no_grad()
    def evaluate(averaged: PictureClassifier, step: int) -> dict[str, Any]:
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in tqdm(held_batches, desc="evaluation", leave=False):
            unreadable.note(batch)
            if len(batch.images):
                parts.append((averaged(to_float(batch.images.to(device))).float().cpu(), batch.labels))
        if not parts:
            raise InputError(f"no image of {val_source.name} can be read; see the lines above")
        logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        nats = F.cross_entropy(logits, labels, reduction="none").mean().item()
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        logger.info("step %d: %.1f%% of held-out images correct, %.3f nats", step, 100 * accuracy, nats)
        return {"nats": round(nats, 4), "accuracy": round(accuracy, 4)}

    path = Path(training.output_dir) / "features.safetensors"
    loop.run(batches, loss, RunTasks(evaluate=evaluate, export=lambda averaged: averaged.save(path)))
    if unreadable.names:
        logger.warning("%d unreadable images were skipped, see above", len(unreadable.names))
