"""Training of the tokenizer: images in, a folder with the averaged model out."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import InputError
from common.files import read_json
from common.images import captioned_table, save_png, to_float, to_pil, to_uint8
from common.runtime import pick_dtype, send
from tokenizer.config import TokenizerConfig, evaluation_lengths
from tokenizer.data import ImageBatch, ImageDataset, UnreadableFiles, collate, spread
from tokenizer.losses import PatchDiscriminator, discriminator_loss, tokenizer_loss
from tokenizer.metrics import psnr_by_length
from tokenizer.perceptual import PerceptualDistance
from tokenizer.rate import RateTerm, bit_flips, rate_figures
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
from tokenizer.tail_drop import draw_num_tokens, prefix_mask
from tokenizer.tokenizer import ChannelTokenizer
from training.images import ImageTrainer, LabelledImages
from training.model_state import AuxiliaryModel, StepLoss, call_frozen
from training.schedule import Part

logger = logging.getLogger(__name__)
PICTURE_ROWS = 8
EVALUATION_BATCH = 64
DISCRIMINATOR, PRIOR = "discriminator", "prior"  # names of the auxiliary models in checkpoints and logs
DISCRIMINATOR_BETAS = (0.5, 0.9)  # as Esser et al. (arXiv 2012.09841)
PRIOR_BETAS = (0.9, 0.99)


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
    """Open train and val of a data set for a trainer; seed and augmentation are of train.

    Args:
        data: where the images are.
        augmentation: random changes of the images.
        image_size: pixels of a side.
        seed: of these changes.
        strict: refuse unreadable images instead of skipping them.
        names_file: JSON file, class folder -> name for people.
        same_classes: refuse splits with different classes.
    """
    train, val = open_source(data, "train"), open_source(data, "val")
    if same_classes:
        check_same_classes(train, val)
    names = read_json(names_file) if names_file else {}
    return LabelledImages(
        train=ImageDataset(train, image_size, augmentation, seed=seed, replace_unreadable=True),
        val=ImageDataset(val, image_size),
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
        super().__init__(training)
        self.training, self.loss_config, self.tail_drop, self.gan = training, loss_config, tail_drop, gan
        self.bit_noise = rate.bit_noise
        model = self._model(model_config, rate)
        self.model_config = model.config
        gan.check_image_size(model.config.image_size)
        self.images = open_images(
            data, augmentation, model.config.image_size,
            seed=training.seed, strict=training.strict, same_classes=rate.has_rate,
        )  # fmt: skip
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        nn.Module.to(model, memory_format=self.memory_format)
        self.perceptual: PerceptualDistance | None = None
        if loss_config.perceptual == "lpips":
            self.perceptual = PerceptualDistance(loss_config.perceptual_weights).to(self.device)
        auxiliary: dict[str, AuxiliaryModel] = {}
        if gan.gan_weight > 0:
            discriminator = PatchDiscriminator(gan).to(memory_format=self.memory_format)
            auxiliary[DISCRIMINATOR] = AuxiliaryModel(
                model=discriminator, learning_rate=gan.gan_learning_rate, betas=DISCRIMINATOR_BETAS
            )
        self.rate_term: RateTerm | None = None
        if rate.has_rate:
            channels, bits = model.config.num_channels, model.config.num_bits
            self.rate_term = RateTerm(rate, channels, bits, len(self.images.class_names))
            peak = rate.prior_learning_rate
            auxiliary[PRIOR] = AuxiliaryModel(
                model=self.rate_term.prior, learning_rate=peak, betas=PRIOR_BETAS, follows_schedule=True
            )
        identity = {
            "model": asdict(model.config),
            "loss": {name: value for name, value in asdict(loss_config).items() if name != "perceptual_weights"},
            "tail_drop": asdict(tail_drop),
            "gan": asdict(gan),
            "rate": asdict(rate),
            "augmentation": asdict(augmentation),
            "images": self.images.train.source.fingerprint(),
        }
        self.prepare(model, identity, auxiliary)

    def _model(self, config: TokenizerConfig, rate: RateConfig) -> ChannelTokenizer:
        """A new model, or that of init_from, whose size must not be given or be the same."""
        training, dtype = self.training, pick_dtype(self.training.save_dtype)
        if training.init_from is None:
            return ChannelTokenizer(config)
        model = ChannelTokenizer.from_pretrained(training.init_from)
        given, found, default = (asdict(size) for size in (config, model.config, TokenizerConfig()))
        if given not in (found, default):
            different = [name for name in given if given[name] != found[name]]
            wrong = min(different, key=lambda name: given[name] == default[name])  # first those that were given
            raise InputError(
                f"{wrong} is {given[wrong]}, but init_from {training.init_from} has {found[wrong]}; omit the size"
            )
        if training.frozen_encoder and any(
            bool((value != value.to(dtype)).any()) for value in model.token_layers.parameters()
        ):
            raise InputError(
                f"frozen_encoder keeps the tokens of {training.init_from}, and save_dtype {training.save_dtype} would "
                "round its encoder; take float32"
            )
        if training.frozen_encoder and rate.has_rate:
            raise InputError("frozen_encoder keeps the tokens, so a rate term changes nothing; omit rate_weight")
        model.token_layers.requires_grad_(not training.frozen_encoder)
        return model

    def loss(self, model: nn.Module, batch: ImageBatch, part: Part) -> StepLoss:
        """Losses of a micro-batch."""
        images, labels = self.to_device(batch)
        images = images.contiguous(memory_format=self.memory_format)
        channels, bits = self.model_config.num_channels, self.model_config.num_bits
        lengths = draw_num_tokens(part.batch_size, channels, self.tail_drop, part.rng())
        keep = send(prefix_mask(lengths[list(part.rows)], channels), self.device)
        flips = bit_flips(channels, bits, self.bit_noise, part, self.device) if self.bit_noise > 0 else None
        reconstructed, vectors = model(images, keep, flips)
        terms = tokenizer_loss(
            reconstructed, images, vectors, keep, self.loss_config, self.perceptual, self.sum_over_processes
        )
        losses: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {}
        if DISCRIMINATOR in self.auxiliary and part.step >= self.gan.gan_start_step:
            terms["adversarial"] = -call_frozen(self.auxiliary[DISCRIMINATOR].bare, reconstructed).float().mean()
            terms["loss"] = terms["loss"] + self.gan.gan_weight * terms["adversarial"]
            losses[DISCRIMINATOR] = partial(discriminator_loss, images=images, reconstructed=reconstructed)
        if self.rate_term is not None:
            rate, losses[PRIOR] = self.rate_term.losses(vectors, keep, labels, part)
            terms |= rate
            terms["loss"] = terms["loss"] + rate["rate"]
        return StepLoss(terms=terms, auxiliary=losses)

    def evaluate(self, averaged: ChannelTokenizer, step: int) -> dict[str, Any]:
        """PSNR and rate on validation images, and a picture."""
        count = min(self.training.validation_images, len(self.images.val))
        pictured, lengths = spread(count, PICTURE_ROWS), evaluation_lengths(self.model_config.num_channels)
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
