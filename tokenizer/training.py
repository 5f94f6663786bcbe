"""Training of the tokenizer: images in, a folder with the averaged model out."""

import copy
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.files import read_json
from common.images import captioned_table, save_png, to_float, to_pil, to_uint8
from common.runtime import move, pick_dtype
from tokenizer.config import TokenizerConfig, evaluation_lengths
from tokenizer.data import ImageBatch, ImageDataset, UnreadableFiles, collate, spread
from tokenizer.metrics import psnr_by_length
from tokenizer.objective import TokenizerObjective
from tokenizer.rate import RateTerm, rate_figures
from tokenizer.settings import (
    AugmentationConfig,
    DataConfig,
    GanConfig,
    RateConfig,
    TailDropConfig,
    TokenizerLossConfig,
    TokenizerTrainingConfig,
)
from tokenizer.sources import check_same_classes, open_source
from tokenizer.tokenizer import ChannelTokenizer
from training.images import ImageTrainer, LabelledImages
from training.model_state import StepLoss
from training.schedule import Part

logger = logging.getLogger(__name__)
PICTURE_ROWS = 8
EVALUATION_BATCH = 64


def start_from(init_from: str, size: TokenizerConfig) -> ChannelTokenizer:
    """A trained tokenizer.

    Args:
        init_from: a folder that `train_tokenizer.py` wrote, or a name on the Hugging Face hub.
        size: as the user gave it; must be the tokenizer's own, or the default.

    Raises:
        InputError: a tokenizer that cannot be read, or of another size than requested.
    """
    model = ChannelTokenizer.from_pretrained(init_from)
    given, found, default = (asdict(config) for config in (size, model.config, TokenizerConfig()))
    if given not in (found, default):
        different = [name for name in found if given[name] != found[name]]
        # what the user gave, and not what was left at its default
        wrong = next((name for name in different if given[name] != default[name]), different[0])
        raise InputError(f"{wrong} is {given[wrong]}, but init_from {init_from} has {found[wrong]}; omit the size")
    return model


def check_tokens_stay(tokenizer: ChannelTokenizer, training: TokenizerTrainingConfig) -> None:
    """Refuse to round an encoder whose tokens are to be kept."""
    saved = move(move(copy.deepcopy(tokenizer), dtype=pick_dtype(training.save_dtype)), dtype=torch.float32)
    if saved.token_fingerprint() != tokenizer.token_fingerprint():
        raise InputError(
            f"frozen_encoder keeps the tokens of {training.init_from}, and save_dtype {training.save_dtype} would "
            "round its encoder; take float32"
        )


def reconstruction_sheet(tokenizer: ChannelTokenizer, images: Tensor, path: Path) -> None:
    """Write a picture: a row for each image (b 3 H W) uint8, a column for each k, the original last."""
    lengths = evaluation_lengths(tokenizer.config.num_channels)
    tokens = tokenizer.tokenize(to_float(images.to(tokenizer.device)))
    columns = [to_uint8(tokenizer.detokenize(tokens[:, :k])) for k in lengths] + [images]
    rows = [[to_pil(column[i]) for column in columns] for i in range(len(images))]
    save_png(captioned_table(rows, column_labels=[f"k={k}" for k in lengths] + ["original"]), path)


def open_images(
    data: DataConfig,
    augmentation: AugmentationConfig,
    image_size: int,
    *,
    seed: int,
    strict: bool,
    names_file: str | None = None,
    same_classes: bool = True,
) -> LabelledImages:
    """Open train and val of a data set for a trainer.

    Args:
        data: where the images are.
        augmentation: of the training images.
        image_size: pixels of a side.
        seed: of the augmentation.
        strict: refuse unreadable images instead of skipping them.
        names_file: JSON file, class folder -> name for people.
        same_classes: refuse splits with different classes.

    Raises:
        InputError: data that cannot be used.
    """
    train, val = open_source(data, "train"), open_source(data, "val")
    if same_classes:
        check_same_classes(train, val)
    names = read_json(names_file) if names_file else {}
    return LabelledImages(
        train=ImageDataset(train, image_size, augmentation=augmentation, seed=seed, replace_unreadable=True),
        val=ImageDataset(val, image_size, augmentation=None, seed=seed, replace_unreadable=False),
        class_names=[str(names.get(name, name)) for name in train.classes],
        collate=collate,
        unreadable=UnreadableFiles(strict),
    )


class TokenizerTrainer(ImageTrainer):
    """Trains a `ChannelTokenizer` and writes it to training.output_dir.

    The folder holds the averaged model (`ChannelTokenizer.from_pretrained(output_dir)`), checkpoints/,
    reconstructions/step-NNNNNNNN.png and log.jsonl.

    Raises:
        InputError: settings or data that cannot be used; nothing is written then.
    """

    def __init__(
        self,
        training: TokenizerTrainingConfig,
        data: DataConfig,
        augmentation: AugmentationConfig,
        model_config: TokenizerConfig,
        loss_config: TokenizerLossConfig,
        tail_drop: TailDropConfig,
        gan: GanConfig,
        rate: RateConfig,
    ):
        super().__init__(training, compiles=training.compile)
        self.training = training
        model = self._model(model_config, rate)
        self.model_config = model.config
        gan.check_image_size(model.config.image_size)
        self.images = open_images(
            data, augmentation, model.config.image_size,
            seed=training.seed, strict=training.strict, same_classes=rate.has_rate,
        )  # fmt: skip
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        nn.Module.to(model, memory_format=self.memory_format)
        self.rate_term: RateTerm | None = None
        if rate.has_rate:
            classes = len(self.images.class_names)
            self.rate_term = RateTerm(rate, model.config.num_channels, model.config.num_bits, classes)
        self.objective = TokenizerObjective(loss_config, tail_drop, gan, rate.bit_noise, self.rate_term, self.device)
        if training.compile and gan.gan_weighting == "adaptive":
            # the adaptive weight runs the compiled backward pass twice, which must then not reuse its buffers
            torch._functorch.config.donated_buffer = False  # noqa: SLF001
        identity = {
            "model": asdict(model.config),
            "loss": {name: value for name, value in asdict(loss_config).items() if name != "perceptual_weights"},
            "tail_drop": asdict(tail_drop),
            "gan": asdict(gan),
            "rate": asdict(rate),
            "augmentation": asdict(augmentation),
            "images": self.images.train.source.fingerprint(),
        }
        self.prepare(model, identity, self.objective.auxiliary_models(self.memory_format))

    def _model(self, config: TokenizerConfig, rate: RateConfig) -> ChannelTokenizer:
        """A new model, or the one of init_from."""
        training = self.training
        model = ChannelTokenizer(config) if training.init_from is None else start_from(training.init_from, config)
        if training.frozen_encoder:
            check_tokens_stay(model, training)
            if rate.has_rate:
                raise InputError("frozen_encoder keeps the tokens, so a rate term changes nothing; omit rate_weight")
        model.reader.requires_grad_(not training.frozen_encoder)
        return model

    def loss(self, model: nn.Module, batch: ImageBatch, part: Part) -> StepLoss:
        """Losses of a micro-batch."""
        images, labels = self.to_device(batch)
        return self.objective(self, model, images.contiguous(memory_format=self.memory_format), labels, part)

    def evaluate(self, averaged: ChannelTokenizer, step: int) -> dict[str, Any]:
        """PSNR and rate on validation images, and a picture."""
        count = min(self.training.validation_images, len(self.images.val))
        pictured = spread(count, PICTURE_ROWS)
        lengths = evaluation_lengths(self.model_config.num_channels)
        found: dict[int, list[Tensor]] = {k: [] for k in lengths}
        nats: list[Tensor] = []
        shown: list[Tensor] = []
        seen = 0
        for batch in self.held_batches(count, EVALUATION_BATCH):
            shown += [image for place, image in enumerate(batch.images, seen) if place in pictured]
            seen += len(batch.images)
            tokens = averaged.tokenize(to_float(batch.images.to(self.device)))
            for k, values in psnr_by_length(averaged, tokens, batch.images, lengths).items():
                found[k].append(values)
            if self.rate_term is not None:
                nats.append(self.rate_term.nats(tokens, batch.labels))
        picture = self.output_dir / "reconstructions" / f"step-{step:08d}.png"
        reconstruction_sheet(averaged, torch.stack(shown), picture)
        figures = {f"psnr_k{k}": round(torch.cat(values).mean().item(), 3) for k, values in found.items()}
        logger.info("step %d: PSNR by k, dB: %s", step, "  ".join(f"{k[6:]}: {v:.2f}" for k, v in figures.items()))
        if nats:
            rates = {name: round(value.item(), 3) for name, value in rate_figures(torch.cat(nats)).items()}
            totals = rates["nats_per_token"], rates["bits_per_image"]
            logger.info("step %d: %.3f nats per token, %.0f bits per image", step, *totals)
            figures |= rates
        return {**figures, "unreadable": count - seen}

    def export(self, averaged: ChannelTokenizer) -> None:
        """Write the averaged model."""
        averaged.save_pretrained(self.output_dir, pick_dtype(self.training.save_dtype))
