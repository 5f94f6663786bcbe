"""Training the small classifier of `common.classifier` on photographs with classes."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.checkpoint import read_json
from common.classifier import PictureClassifier
from common.config import ClassifierConfig
from common.errors import InputError
from common.images import to_float
from common.runtime import check_can_compile, leave_signals_to_the_trainer
from tokenizer.data import ImageBatch, ImageDataset, UnreadableFiles, collate
from tokenizer.settings import AugmentationConfig, ClassifierTrainingConfig, DataConfig
from tokenizer.sources import check_same_classes, open_source
from training.distributed import make_accelerator
from training.loop import Loop, RunTasks, StepLoss
from training.schedule import Part

logger = logging.getLogger(__name__)
WEIGHTS = "features.safetensors"
EVALUATION_BATCH = 64


def train_classifier(
    training: ClassifierTrainingConfig,
    data: DataConfig,
    augmentation: AugmentationConfig,
    config: ClassifierConfig,
) -> None:
    """Train a classifier; training.output_dir gets features.safetensors (averaged weights), checkpoints/ and log.jsonl.

    Raises:
        InputError: settings or data that cannot be used, or classes that differ between the two splits.
    """
    train_source, val_source = open_source(data, "train"), open_source(data, "val")
    check_same_classes(train_source, val_source)
    names = read_json(training.class_names) if training.class_names else {}
    accelerator = make_accelerator(training)
    model = PictureClassifier(config, [str(names.get(name, name)) for name in train_source.classes])
    identity = {
        "model": asdict(config),
        "augmentation": asdict(augmentation),
        "images": train_source.fingerprint(),
    }
    if training.compile:
        check_can_compile(accelerator.device)
        model.compile()
    loop = Loop(model, training, accelerator, identity)
    unreadable = UnreadableFiles(training.strict)

    def loader(images: ImageDataset, batches: Any) -> Any:
        return DataLoader(
            images,
            batch_sampler=batches,
            num_workers=training.num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
        )

    size, seed = config.classifier_size, training.seed
    images = ImageDataset(train_source, size, augmentation=augmentation, seed=seed, replace_unreadable=True)
    held = ImageDataset(val_source, size, augmentation=None, seed=seed, replace_unreadable=False)
    keys = [(index, 0) for index in range(len(held))]
    held_batches = loader(held, [keys[i : i + EVALUATION_BATCH] for i in range(0, len(keys), EVALUATION_BATCH)])

    def loss(model: nn.Module, batch: ImageBatch, part: Part) -> StepLoss:
        unreadable.note(batch)
        if not len(batch.images):
            raise InputError(f"no image of {train_source.name} can be read; see the lines above")
        pictures = to_float(batch.images.to(accelerator.device, non_blocking=True))
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        logits = model(pictures).float()
        hits = (logits.argmax(1) == labels).float().mean()
        smooth = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
        return StepLoss(terms={"loss": smooth, "accuracy": hits})

    @torch.no_grad()
    def evaluate(averaged: PictureClassifier, step: int) -> dict[str, Any]:
        nats: list[Tensor] = []
        hits: list[Tensor] = []
        for batch in tqdm(held_batches, desc="evaluation", leave=False):
            unreadable.note(batch)
            if len(batch.images):
                logits = averaged(to_float(batch.images.to(accelerator.device))).float().cpu()
                nats.append(F.cross_entropy(logits, batch.labels, reduction="none"))
                hits.append(logits.argmax(1) == batch.labels)
        if not nats:
            raise InputError(f"no image of {val_source.name} can be read; see the lines above")
        figures = {"nats": torch.cat(nats).mean().item(), "accuracy": torch.cat(hits).float().mean().item()}
        figures = {name: round(value, 4) for name, value in figures.items()}
        logger.info(
            "step %d: %.1f%% of held-out images right, %.3f nats", step, 100 * figures["accuracy"], figures["nats"]
        )
        return figures

    def export(averaged: PictureClassifier) -> None:
        averaged.save(Path(training.output_dir) / WEIGHTS)

    loop.run(loader(images, loop.sampler(len(images))), loss, RunTasks(evaluate=evaluate, export=export))
    if unreadable.names:
        logger.warning("%d unreadable images were skipped, see above", len(unreadable.names))
