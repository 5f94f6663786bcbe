"""Training the tokenizer: images in, a folder with the averaged model out."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.checkpoint import save_pretrained_whole
from common.errors import InputError
from common.images import captioned_table, save_png, to_float, to_pil, to_uint8
from common.training import Loop, LoopConfig, make_accelerator
from tokenizer.config import TokenizerConfig
from tokenizer.data import AugmentationConfig, ImageBatch, ImageDataset, UnreadableFiles, collate
from tokenizer.losses import TokenizerLossConfig, tokenizer_loss
from tokenizer.sources import DataConfig, open_source
from tokenizer.tail_drop import TailDropConfig, draw_num_tokens, prefix_mask
from tokenizer.tokenizer import ChannelTokenizer

logger = logging.getLogger(__name__)
PICTURE_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(LoopConfig):
    """Settings of train_tokenizer.py beside the model's, the loss's and the tail drop's."""

    strict: bool = field(default=False, metadata={"help": "stop at an unreadable image instead of skipping it"})
    validation_images: int = field(default=2000, metadata={"help": "images of val/ that an evaluation uses"})
    compile: bool = field(default=False, metadata={"help": "compile the model with torch.compile"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_images < 1:
            raise InputError(f"validation_images is {self.validation_images}; it must be at least 1")


def evaluation_lengths(num_channels: int) -> list[int]:
    """1, 4, 16, 64, ... and num_channels: the k at which quality is reported."""
    lengths = []
    k = 1
    while k < num_channels:
        lengths.append(k)
        k *= 4
    return [*lengths, num_channels]


@torch.no_grad()
def psnr_by_length(tokenizer: ChannelTokenizer, images: Tensor, lengths: list[int]) -> dict[int, Tensor]:
    """Peak signal-to-noise ratio in dB of 8-bit reconstructions from the first k tokens, for each k: (b,).

    images: (b 3 H W) uint8. Each image is encoded once.
    """
    device = tokenizer.device
    tokens = tokenizer.tokenize(to_float(images.to(device)))
    ratios = {}
    for k in lengths:
        decoded = to_uint8(tokenizer.detokenize(tokens[:, :k]))
        error = (decoded.float() - images.to(device).float()).square().mean((1, 2, 3))
        ratios[k] = 10 * torch.log10(255**2 / error.clamp_min(1e-10))
    return ratios


def reconstruction_sheet(tokenizer: ChannelTokenizer, images: Tensor, path: Path) -> None:
    """Write a picture: a row for each image (b 3 H W) uint8, a column for each k, the original last."""
    lengths = evaluation_lengths(tokenizer.config.num_channels)
    tokens = tokenizer.tokenize(to_float(images.to(tokenizer.device)))
    columns = [to_uint8(tokenizer.detokenize(tokens[:, :k])) for k in lengths] + [images]
    rows = [[to_pil(column[i]) for column in columns] for i in range(len(images))]
    save_png(captioned_table(rows, column_labels=[f"k={k}" for k in lengths] + ["original"]), path)


def train_tokenizer(
    training: TokenizerTrainingConfig,
    model_config: TokenizerConfig,
    loss_config: TokenizerLossConfig,
    tail_drop: TailDropConfig,
    data: DataConfig,
    augmentation: AugmentationConfig,
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
    identity = {
        "model": model_config.architecture(),
        "loss": asdict(loss_config),
        "tail_drop": asdict(tail_drop),
        "augmentation": asdict(augmentation),
        "images": train_source.fingerprint(),
    }
    model = ChannelTokenizer(model_config)
    if training.compile:
        model.compile()
    loop = Loop(model, training, accelerator, identity)
    unreadable = UnreadableFiles(training.strict)

    size, seed = model_config.image_size, training.seed
    images = ImageDataset(train_source, size, augmentation=augmentation, seed=seed, replace_unreadable=True)
    batches = DataLoader(
        images,
        batch_sampler=loop.sampler(len(images)),
        num_workers=training.num_workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
    )
    # validation images spread evenly over the classes, the same ones every time
    held = ImageDataset(val_source, size, augmentation=None, seed=seed, replace_unreadable=False)
    count = min(training.validation_images, len(held))
    chosen = [(i * len(held) // count, 0) for i in range(count)]
    held_batches: Any = DataLoader(
        held, batch_sampler=[chosen[i : i + 64] for i in range(0, count, 64)], collate_fn=collate
    )

    def loss(model: nn.Module, batch: ImageBatch, rng: torch.Generator) -> dict[str, Tensor]:
        unreadable.note(batch)
        if not len(batch.images):
            raise InputError(f"no image of {train_source.name} can be read; see the lines above")
        inputs = to_float(batch.images.to(accelerator.device, non_blocking=True))
        lengths = draw_num_tokens(len(inputs), model_config.num_channels, tail_drop, rng)
        keep = prefix_mask(lengths, model_config.num_channels).to(accelerator.device)
        output = model(inputs, keep, loss_config.inverse_temperature, loss_config.entropy_group_bits)
        return tokenizer_loss(output, inputs, loss_config)

    def evaluate(averaged: ChannelTokenizer, step: int) -> dict[str, Any]:
        lengths = evaluation_lengths(model_config.num_channels)
        found: dict[int, list[Tensor]] = {k: [] for k in lengths}
        shown: list[Tensor] = []
        for batch in tqdm(held_batches, desc="evaluation", leave=False):
            unreadable.note(batch)
            if len(batch.images):
                shown += [batch.images[i] for i in range(0, len(batch.images), max(1, count // PICTURE_ROWS))]
                for k, values in psnr_by_length(averaged, batch.images, lengths).items():
                    found[k].append(values)
        if not shown:
            raise InputError(f"no image of {val_source.name} can be read; see the lines above")
        picture = output_dir / "reconstructions" / f"step-{step:08d}.png"
        reconstruction_sheet(averaged, torch.stack(shown[:PICTURE_ROWS]), picture)
        figures = {f"psnr_k{k}": round(torch.cat(values).mean().item(), 3) for k, values in found.items()}
        logger.info("step %d: PSNR by k, dB: %s", step, "  ".join(f"{k[6:]}: {v:.2f}" for k, v in figures.items()))
        return {**figures, "unreadable": unreadable.summary()["count"]}

    loop.run(batches, loss, evaluate, lambda averaged: save_pretrained_whole(averaged, output_dir))
