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
        raise InputError(
            f"{wrong} is {given[wrong]}, but init_from {init_from} has {found[wrong]}; "
            "leave the size out, it is the tokenizer's"
        )
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
    train_source, val_source = open_source(data, "train"), open_source(data, "val")
    accelerator = make_accelerator(training)
    output_dir = Path(training.output_dir)
    if training.init_from is None:
        model = ChannelTokenizer(model_config)
    else:
        model = start_from(training.init_from, model_config)
        model_config = model.config
    if training.frozen_encoder:
        check_tokens_stay(model, training)
        if rate.has_rate:
            raise InputError("frozen_encoder keeps the tokens, so a rate term changes nothing; leave rate_weight out")
    identity = {
        "model": asdict(model_config),
        "loss": {name: value for name, value in asdict(loss_config).items() if name != "perceptual_weights"},
        "tail_drop": asdict(tail_drop),
        "gan": asdict(gan),
        "rate": asdict(rate),
        "augmentation": asdict(augmentation),
        "images": train_source.fingerprint(),
    }
    gan.check_image_size(model_config.image_size)
    memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
    nn.Module.to(model, memory_format=memory_format)
    model.reader.requires_grad_(not training.frozen_encoder)
    rate_term = None
    if rate.has_rate:
        check_same_classes(train_source, val_source)
        rate_term = RateTerm(rate, model_config.num_channels, model_config.num_bits, len(train_source.classes))
    objective = TokenizerObjective(loss_config, tail_drop, gan, rate.bit_noise, rate_term, accelerator.device)
    if training.compile:
        check_can_compile(accelerator.device)
        if gan.gan_weighting == "adaptive":
            # the adaptive weight runs the compiled backward pass twice, which must then not reuse its buffers
            torch._functorch.config.donated_buffer = False  # noqa: SLF001
        model.compile()
    loop = Loop(model, training, accelerator, identity, objective.auxiliary_models(memory_format))
    unreadable = UnreadableFiles(training.strict)

    size, seed = model_config.image_size, training.seed
    images = ImageDataset(train_source, size, augmentation=augmentation, seed=seed, replace_unreadable=True)
    batches = DataLoader(
        images,
        batch_sampler=loop.sampler(len(images)),
        num_workers=training.num_workers,
        worker_init_fn=leave_signals_to_the_trainer,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
    )
    # validation images spread evenly over the classes, the same ones every time
    held = ImageDataset(val_source, size, augmentation=None, seed=seed, replace_unreadable=False)
    chosen = [(index, 0) for index in spread(len(held), training.validation_images)]
    pictured = set(spread(len(chosen), PICTURE_ROWS))
    held_batches: Any = DataLoader(
        held,
        batch_sampler=[chosen[i : i + 64] for i in range(0, len(chosen), 64)],
        num_workers=training.num_workers,
        worker_init_fn=leave_signals_to_the_trainer,
        collate_fn=collate,
    )

    def loss(model: nn.Module, batch: ImageBatch, part: Part) -> StepLoss:
        unreadable.note(batch)
        if not len(batch.images):
            raise InputError(f"no image of {train_source.name} can be read; see the lines above")
        inputs = to_float(batch.images.to(accelerator.device, non_blocking=True))
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        return objective(loop, model, inputs.contiguous(memory_format=memory_format), labels, part)

    def evaluate(averaged: ChannelTokenizer, step: int) -> dict[str, Any]:
        lengths = evaluation_lengths(model_config.num_channels)
        found: dict[int, list[Tensor]] = {k: [] for k in lengths}
        nats: list[Tensor] = []
        shown: list[Tensor] = []
        seen = damaged = 0
        for batch in tqdm(held_batches, desc="evaluation", leave=False):
            unreadable.note(batch)
            damaged += len(batch.unreadable)
            shown += [image for place, image in enumerate(batch.images, seen) if place in pictured]
            seen += len(batch.images)
            if len(batch.images):
                tokens = averaged.tokenize(to_float(batch.images.to(averaged.device)))
                for k, values in psnr_by_length(averaged, tokens, batch.images, lengths).items():
                    found[k].append(values)
                if rate_term is not None:
                    nats.append(rate_term.nats(tokens, batch.labels))
        if not seen:
            raise InputError(f"no image of {val_source.name} can be read; see the lines above")
        picture = output_dir / "reconstructions" / f"step-{step:08d}.png"
        reconstruction_sheet(averaged, torch.stack(shown), picture)
        figures = {f"psnr_k{k}": round(torch.cat(values).mean().item(), 3) for k, values in found.items()}
        logger.info("step %d: PSNR by k, dB: %s", step, "  ".join(f"{k[6:]}: {v:.2f}" for k, v in figures.items()))
        if nats:
            rates = {name: round(value.item(), 3) for name, value in rate_figures(torch.cat(nats)).items()}
            totals = rates["nats_per_token"], rates["bits_per_image"]
            logger.info("step %d: %.3f nats per token, %.0f bits per image", step, *totals)
            figures |= rates
        return {**figures, "unreadable": damaged}

    def export(averaged: ChannelTokenizer) -> None:
        averaged.save_pretrained(output_dir, pick_dtype(training.save_dtype))

    loop.run(batches, loss, RunTasks(evaluate=evaluate, export=export))
    if unreadable.names:
        logger.warning("%d unreadable images were skipped, see above", len(unreadable.names))
