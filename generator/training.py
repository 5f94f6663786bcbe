"""Training the generator: a token store in, a folder that `sample.py --model` draws from out."""

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlamaForCausalLM

from common.checkpoint import folder_written_whole
from common.errors import InputError
from common.images import captioned_table, save_png, to_pil, to_uint8
from common.runtime import send
from common.steps import LoopConfig, Part
from common.training import Loop, StepLoss, make_accelerator
from generator.config import GeneratorConfig, TokenLayout
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import build_generator, save_generator
from generator.sampling import SamplingConfig
from generator.tokens import TokenBatch, TokenDataset, TokenStore, collate_tokens

logger = logging.getLogger(__name__)
PICTURE_CLASSES = 8


@dataclass(frozen=True, kw_only=True)
class GeneratorTrainingConfig(LoopConfig):
    """Settings of train_ar.py beside the model's size."""

    tokens: str = field(metadata={"help": "token store, from extract_tokens.py"})
    label_dropout: float = field(default=0.1, metadata={"help": "share of labels replaced by the null label"})
    position_weighting: Literal["none", "linear"] = field(
        default="none", metadata={"help": "linear: the loss weighs 2 at the first token, falling to 1 at the last"}
    )
    save_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the exported generator"}
    )
    validation_images: int = field(default=2000, metadata={"help": "images of val that an evaluation uses"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"label_dropout is {self.label_dropout}; it must be in [0, 1)")
        if self.validation_images < 1:
            raise InputError(f"validation_images is {self.validation_images}; it must be at least 1")


def position_weights(kind: str, num_channels: int) -> Tensor:
    """Weight of each position's loss, mean 1: (C,)."""
    if kind == "none":
        return torch.ones(num_channels)
    weights = torch.linspace(2, 1, num_channels)
    return weights / weights.mean()


def losses_by_position(model: nn.Module, layout: TokenLayout, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of every token, over all rows of the head: tokens (b c), labels (b,) -> (b c)."""
    logits = model(input_ids=layout.inputs(labels, tokens), use_cache=False).logits
    flat = F.cross_entropy(rearrange(logits, "b c v -> (b c) v").float(), tokens.flatten(), reduction="none")
    return rearrange(flat, "(b c) -> b c", b=len(tokens))


def unigram_loss(train_counts: Tensor, val_counts: Tensor) -> float:
    """Nats a token on val of the model that knows each position's token frequencies on train, and nothing else.

    Counts are (C, codebook_size); every token is counted once more than seen, so that none is impossible.
    """
    log_odds = ((train_counts + 1).double() / (train_counts + 1).sum(-1, keepdim=True)).log()
    return float(-(val_counts * log_odds).sum() / val_counts.sum())


def train_generator(
    training: GeneratorTrainingConfig, size: GeneratorConfig, detokenize: Callable[[Tensor], Tensor]
) -> None:
    """Train a generator and write it to training.output_dir.

    The folder holds tokenizer/ and generator/ (the averaged weights), so `sample.py --model output_dir`
    draws with it; also checkpoints/, samples/step-NNNNNNNN.png and log.jsonl.

    Args:
        training: settings.
        size: the model's.
        detokenize: tokens (b k) -> images (b 3 H W) in [-1, 1], with the store's tokenizer.

    Raises:
        InputError: settings or a store that cannot be used.
    """
    store = TokenStore.open(training.tokens)
    header = store.header
    layout = TokenLayout(
        num_channels=header.num_channels,
        num_bits=header.num_bits,
        class_names=header.class_names,
        tokenizer_fingerprint=header.tokenizer_fingerprint,
        has_null_label=training.label_dropout > 0,
    )
    accelerator = make_accelerator(training)
    output_dir = Path(training.output_dir)
    train_set = TokenDataset(store, "train", training.seed)
    val_set = TokenDataset(store, "val", None)
    unigram = unigram_loss(train_set.counts(), val_set.counts())
    loop = Loop(build_generator(size, layout), training, accelerator, {"size": asdict(size), "store": asdict(header)})
    if accelerator.is_main_process and not (output_dir / "tokenizer").exists():
        with folder_written_whole(output_dir / "tokenizer") as temporary:
            shutil.copytree(store.tokenizer_folder, temporary, dirs_exist_ok=True)
    batches = DataLoader(
        train_set,
        batch_sampler=loop.sampler(len(train_set)),
        num_workers=training.num_workers,
        collate_fn=collate_tokens,
        pin_memory=accelerator.device.type == "cuda",
    )
    count = min(training.validation_images, len(val_set))
    chosen = [(i * len(val_set) // count, 0) for i in range(count)]
    held_batches: Any = DataLoader(
        val_set, batch_sampler=[chosen[i : i + 64] for i in range(0, count, 64)], collate_fn=collate_tokens
    )
    weights = position_weights(training.position_weighting, header.num_channels).to(accelerator.device)

    def loss(model: nn.Module, batch: TokenBatch, part: Part) -> StepLoss:
        tokens = batch.tokens.to(accelerator.device, non_blocking=True)
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        dropped = torch.rand(part.batch_size, generator=part.rng())[list(part.rows)] < training.label_dropout
        labels = torch.where(send(dropped, labels.device), layout.null_label, labels)
        nats = losses_by_position(model, layout, tokens, labels)
        return StepLoss(terms={"loss": (nats * weights).mean(), "nats": nats.mean(), "first": nats[:, 0].mean()})

    @torch.no_grad()
    def evaluate(averaged: LlamaForCausalLM, step: int) -> dict[str, Any]:
        found = []
        for batch in tqdm(held_batches, desc="evaluation", leave=False):
            with accelerator.autocast():
                tokens, labels = batch.tokens.to(accelerator.device), batch.labels.to(accelerator.device)
                found.append(losses_by_position(averaged, layout, tokens, labels))
        by_position = torch.cat(found).double().mean(0)
        nats = float(by_position.mean())
        logger.info(
            "step %d: validation %.3f nats a token (unigram %.3f, uniform %.3f); first token %.3f, last %.3f",
            step, nats, unigram, math.log(layout.codebook_size), float(by_position[0]), float(by_position[-1]),
        )  # fmt: skip
        draw_sheet(averaged, layout, detokenize, output_dir / "samples" / f"step-{step:08d}.png")
        rounded = [round(value, 4) for value in by_position.tolist()]
        return {"nats": nats, "unigram_nats": unigram, "nats_by_position": rounded}

    def export(averaged: LlamaForCausalLM) -> None:
        save_generator(averaged, layout, output_dir / "generator", training.save_dtype)

    loop.run(batches, loss, evaluate, export)


def draw_sheet(
    model: LlamaForCausalLM, layout: TokenLayout, detokenize: Callable[[Tensor], Tensor], path: Path
) -> None:
    """Write a picture of samples with fixed seeds: a row for each of a few classes, a column for each k."""
    shown = min(PICTURE_CLASSES, layout.num_classes)
    labels = [i * layout.num_classes // shown for i in range(shown)]
    lengths = [k for k in (4, 16, 64, 128, 256) if k < layout.num_channels] + [layout.num_channels]
    engine = Engine(CachedDecoder.from_llama(model, layout))
    *_, last = stream(engine, labels, labels, layout.num_channels, SamplingConfig())
    columns = [to_uint8(detokenize(last.tokens[:, :k])) for k in lengths]
    rows = [[to_pil(column[i]) for column in columns] for i in range(len(labels))]
    names = [layout.class_names[label].split(",")[0][:20] for label in labels]
    save_png(captioned_table(rows, names, [f"k={k}" for k in lengths]), path)
