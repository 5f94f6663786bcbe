"""Training the tokenizer: images in, a folder with the averaged model out."""

import copy
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.errors import InputError
from common.images import captioned_table, save_png, to_float, to_pil, to_uint8
from common.runtime import check_can_compile, leave_signals_to_the_trainer, move, pick_dtype
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
from training.distributed import make_accelerator
from training.loop import Loop, RunTasks, StepLoss
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
        InputError: a tokenizer that cannot be read, or of another size than was asked for.
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


def train_tokenizer(
    training: TokenizerTrainingConfig,
    data: DataConfig,
    augmentation: AugmentationConfig,
    model_config: TokenizerConfig,
    loss_config: TokenizerLossConfig,
    tail_drop: TailDropConfig,
    gan: GanConfig,
    rate: RateConfig,
) -> None:
    """Train a `ChannelTokenizer` and write it to training.output_dir.

    The folder holds the averaged model (`ChannelTokenizer.from_pretrained(output_dir)`), checkpoints/,
    reconstructions/step-NNNNNNNN.png and log.jsonl.

    Raises:
        InputError: settings or data that cannot be used; nothing is written then.
    """
    run = TokenizerRun(training, data, augmentation, model_config, loss_config, tail_drop, gan, rate)
    run.loop.run(run.batches(), run.loss, RunTasks(evaluate=run.evaluate, export=run.export))
    if run.unreadable.names:
        logger.warning("%d unreadable images were skipped, see above", len(run.unreadable.names))


class TokenizerRun:
    """A training run: its data, model and loop, and what is evaluated and written on the way."""

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
        self.training, self.augmentation = training, augmentation
        self.train_source, self.val_source = open_source(data, "train"), open_source(data, "val")
        self.accelerator = make_accelerator(training)
        self.device = self.accelerator.device
        self.unreadable = UnreadableFiles(training.strict)
        model = self._model(model_config, rate)
        self.config = model.config
        gan.check_image_size(self.config.image_size)
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        nn.Module.to(model, memory_format=self.memory_format)
        self.rate_term: RateTerm | None = None
        if rate.has_rate:
            check_same_classes(self.train_source, self.val_source)
            classes = len(self.train_source.classes)
            self.rate_term = RateTerm(rate, self.config.num_channels, self.config.num_bits, classes)
        self.objective = TokenizerObjective(loss_config, tail_drop, gan, rate.bit_noise, self.rate_term, self.device)
        if training.compile:
            check_can_compile(self.device)
            if gan.gan_weighting == "adaptive":
                # the adaptive weight runs the compiled backward pass twice, which must then not reuse its buffers
                torch._functorch.config.donated_buffer = False  # noqa: SLF001
            model.compile()
        identity = {
            "model": asdict(self.config),
            "loss": {name: value for name, value in asdict(loss_config).items() if name != "perceptual_weights"},
            "tail_drop": asdict(tail_drop),
            "gan": asdict(gan),
            "rate": asdict(rate),
            "augmentation": asdict(augmentation),
            "images": self.train_source.fingerprint(),
        }
        auxiliary = self.objective.auxiliary_models(self.memory_format)
        self.loop = Loop(model, training, self.accelerator, identity, auxiliary)

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

    def _loader(self, images: ImageDataset, batches: Any) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.training.num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )

    def batches(self) -> DataLoader[Any]:
        """The micro-batches that are left."""
        images = ImageDataset(
            self.train_source, self.config.image_size,
            augmentation=self.augmentation, seed=self.training.seed, replace_unreadable=True,
        )  # fmt: skip
        return self._loader(images, self.loop.sampler(len(images)))

    def loss(self, model: nn.Module, batch: ImageBatch, part: Part) -> StepLoss:
        """Loss of a micro-batch."""
        self.unreadable.note(batch)
        if not len(batch.images):
            raise InputError(f"no image of {self.train_source.name} can be read; see the lines above")
        images = to_float(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        return self.objective(self.loop, model, images.contiguous(memory_format=self.memory_format), labels, part)

    def evaluate(self, averaged: ChannelTokenizer, step: int) -> dict[str, Any]:
        """PSNR and rate on validation images, and a picture; in the main process."""
        held = ImageDataset(
            self.val_source, self.config.image_size,
            augmentation=None, seed=self.training.seed, replace_unreadable=False,
        )  # fmt: skip
        # spread evenly over the classes, the same ones every time
        chosen = [(index, 0) for index in spread(len(held), self.training.validation_images)]
        pictured = set(spread(len(chosen), PICTURE_ROWS))
        parts = [chosen[i : i + EVALUATION_BATCH] for i in range(0, len(chosen), EVALUATION_BATCH)]
        lengths = evaluation_lengths(self.config.num_channels)
        found: dict[int, list[Tensor]] = {k: [] for k in lengths}
        nats: list[Tensor] = []
        shown: list[Tensor] = []
        seen = damaged = 0
        for batch in tqdm(self._loader(held, parts), desc="evaluation", leave=False):
            self.unreadable.note(batch)
            damaged += len(batch.unreadable)
            shown += [image for place, image in enumerate(batch.images, seen) if place in pictured]
            seen += len(batch.images)
            if len(batch.images):
                tokens = averaged.tokenize(to_float(batch.images.to(averaged.device)))
                for k, values in psnr_by_length(averaged, tokens, batch.images, lengths).items():
                    found[k].append(values)
                if self.rate_term is not None:
                    nats.append(self.rate_term.nats(tokens, batch.labels))
        if not seen:
            raise InputError(f"no image of {self.val_source.name} can be read; see the lines above")
        picture = Path(self.training.output_dir) / "reconstructions" / f"step-{step:08d}.png"
        reconstruction_sheet(averaged, torch.stack(shown), picture)
        figures = {f"psnr_k{k}": round(torch.cat(values).mean().item(), 3) for k, values in found.items()}
        logger.info("step %d: PSNR by k, dB: %s", step, "  ".join(f"{k[6:]}: {v:.2f}" for k, v in figures.items()))
        if nats:
            rates = {name: round(value.item(), 3) for name, value in rate_figures(torch.cat(nats)).items()}
            totals = rates["nats_per_token"], rates["bits_per_image"]
            logger.info("step %d: %.3f nats per token, %.0f bits per image", step, *totals)
            figures |= rates
        return {**figures, "unreadable": damaged}

    def export(self, averaged: ChannelTokenizer) -> None:
        """Write the averaged model."""
        averaged.save_pretrained(self.training.output_dir, pick_dtype(self.training.save_dtype))
