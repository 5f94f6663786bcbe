"""Training of the refiner: images and a frozen tokenizer in, a folder for `sample.py` out."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoint import fingerprint
from common.config import InputError
from common.images import captioned_table, save_png, to_float, to_pil, to_uint8
from common.randomness import Stream, generator_for, normals
from common.runtime import move, pick_dtype, send
from refiner.config import RefinerConfig, RefinerSize, RefinerTrainingConfig, size_of
from refiner.flow import flow_loss, integrate, scale_table
from refiner.model import Refiner
from training.images import ImageTrainer, LabelledImages
from training.model_state import StepLoss
from training.schedule import Part

logger = logging.getLogger(__name__)
SCALE_IMAGES = 256  # images that the scales of the residual are measured on
SHEET_ROWS, SHEET_STEPS = 8, 8
EVALUATION_BATCH = 32
Continue = Callable[[Tensor, list[int], list[int], list[int], list[int]], Tensor]


class RefinerTrainer(ImageTrainer):
    """Trains a refiner and writes it to training.output_dir.

    The folder holds refiner/ (the averaged weights; copy it into a model folder to draw with it), checkpoints/,
    refined/step-NNNNNNNN.png and log.jsonl.

    With training.init_from, `size` is the default or that refiner's. `tokenizer` is a `ChannelTokenizer`, `lengths`
    are the k at which images are evaluated, rising, the last C. `decoder` makes a function from tokens and lengths to
    uint8 images of a tokenizer; `load_generator` a `ChannelTokPipeline` of a folder and a device. `identity` has
    further values that must not change when a run is resumed.

    Raises:
        InputError: settings or data that cannot be used.
    """

    def __init__(
        self,
        training: RefinerTrainingConfig,
        size: RefinerSize,
        images: LabelledImages,
        tokenizer: Any,
        lengths: list[int],
        decoder: Callable[[Any], Callable[[Tensor, Tensor], Tensor]],
        load_generator: Callable[[str, str], Any],
        identity: dict[str, Any],
    ):
        super().__init__(training)
        self.training, self.images, self.lengths = training, images, lengths
        self.weights = fingerprint(tokenizer)
        self.tokenizer = move(tokenizer, self.device).requires_grad_(False)
        self.decode = decoder(self.tokenizer)
        self.pipeline = None
        if training.generator is not None:
            self.pipeline = load_generator(training.generator, str(self.device))
            if fingerprint(self.pipeline.tokenizer) != self.weights:
                raise InputError(f"generator {training.generator} has another tokenizer than {training.tokenizer}")
        self.held = list(self.held_batches(training.validation_images, EVALUATION_BATCH))
        model = self._model(size)
        self.model_config = model.config
        self.scales = scale_table(model.config).to(self.device)
        identity = identity | {
            "model": asdict(model.config),
            "images": images.train.source.fingerprint(),
            "tokenizer_weights": self.weights,
        }
        self.prepare(model, identity)

    def _model(self, size: RefinerSize) -> Refiner:
        """A new model, or the one of init_from."""
        training = self.training
        config = RefinerConfig(
            **asdict(size),
            image_size=self.tokenizer.config.image_size,
            num_channels=self.tokenizer.config.num_channels,
            class_names=self.images.class_names,
            tokenizer_fingerprint=self.weights,
            scale_lengths=self.lengths,
            scales=self._measured_scales(),
            has_null_label=training.label_dropout > 0,
        )
        if training.init_from is None:
            model = Refiner(config)
        else:
            model = Refiner.from_pretrained(training.init_from).train()
            found = model.config
            if size not in (RefinerSize(), size_of(found)):
                raise InputError(f"the size differs from that of init_from {training.init_from}; omit the size")
            # the scales belong to the weights
            expected = replace(config, **asdict(size_of(found)), scale_lengths=found.scale_lengths, scales=found.scales)
            for name, value in asdict(expected).items():
                if getattr(found, name) != value:
                    raise InputError(
                        f"{name} differs between init_from {training.init_from} and this run; give the tokenizer and "
                        "the classes that it was trained on"
                    )
        nn.Module.to(model, memory_format=torch.channels_last)
        return model

    @torch.no_grad()
    def _measured_scales(self) -> list[float]:
        """Root mean square of image - decoded image at each of `lengths`."""
        images = torch.cat([batch.images for batch in self.held])[:SCALE_IMAGES]
        found = []
        for k in self.lengths:
            squares = [
                (to_float(part) - self._decoded(self._tokens(part), k).cpu()).square().mean((1, 2, 3))
                for part in images.split(EVALUATION_BATCH)
            ]
            found.append(max(round(torch.cat(squares).mean().sqrt().item(), 3), 0.001))
        return found

    def _tokens(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.tokenizer.tokenize(to_float(images.to(self.device)))
        return tokens

    def _decoded(self, tokens: Tensor, k: int) -> Tensor:
        """Images (b 3 H W) in [-1, 1], decoded from the first k tokens of each."""
        return to_float(self.decode(tokens, torch.full((len(tokens),), k)))

    def loss(self, model: nn.Module, batch: Any, part: Part) -> StepLoss:
        """Loss of a micro-batch."""
        training, sizes = self.training, self.tokenizer.config
        images, labels = self.to_device(batch)
        num_tokens = draw_lengths(part, sizes.num_channels)
        with torch.no_grad():
            tokens = self.tokenizer.tokenize(images)
            if training.bit_flips:
                flips = draw_flips(part, sizes.num_channels, sizes.num_bits, training.bit_flips)
                tokens = tokens ^ send(flips, self.device)
            if self.pipeline is not None:
                share = training.continued_share
                tokens = continue_some(tokens, num_tokens, batch.labels, part, share, self._continue_tokens)
            decoded = to_float(self.decode(tokens, num_tokens))
        dropped = send(part.drops(training.label_dropout), self.device)
        labels = torch.where(dropped, self.model_config.null_label, labels)
        # the trainer has seeded torch for this micro-batch
        noise = torch.randn_like(images)
        time = draw_times(torch.randn(len(images), device=self.device))
        losses = flow_loss(model, images, decoded, send(num_tokens, self.device), labels, self.scales, noise, time)
        return StepLoss(terms={"loss": losses.mean()})

    def _continue_tokens(
        self, tokens: Tensor, kept: list[int], wanted: list[int], labels: list[int], seeds: list[int]
    ) -> Tensor:
        assert self.pipeline is not None
        drawn: Tensor = self.pipeline(labels, wanted, seeds, prefix=tokens, prefix_lengths=kept).tokens
        return drawn

    def evaluate(self, averaged: Refiner, step: int) -> dict[str, Any]:
        """Validation loss at each of `lengths`, and a picture."""
        found: dict[int, list[Tensor]] = {k: [] for k in self.lengths}
        seen = 0
        for batch in tqdm(self.held, desc="evaluation", leave=False):
            rng = generator_for(seen, Stream.STEP)
            noise = torch.randn(batch.images.shape, generator=rng).to(self.device)
            time = draw_times(torch.randn(len(noise), generator=rng)).to(self.device)
            images, labels = to_float(batch.images.to(self.device)), batch.labels.to(self.device)
            tokens = self._tokens(batch.images)
            for k, losses in found.items():
                num_tokens = torch.full((len(noise),), k, device=self.device)
                decoded = self._decoded(tokens, k)
                with self.accelerator.autocast():
                    loss = flow_loss(averaged, images, decoded, num_tokens, labels, self.scales, noise, time)
                losses.append(loss.cpu())
            seen += len(noise)
        figures = {f"loss_k{k}": round(torch.cat(losses).mean().item(), 4) for k, losses in found.items()}
        figures["loss"] = round(math.fsum(figures.values()) / len(figures), 4)
        logger.info("step %d: validation loss %.4f", step, figures["loss"])
        self._draw_sheet(averaged, self.output_dir / "refined" / f"step-{step:08d}.png")
        return figures

    def _draw_sheet(self, averaged: Refiner, path: Path) -> None:
        """Write a picture: a row for each of a few images, decoded and refined at some k, the photograph last."""
        images = torch.cat([batch.images for batch in self.held])
        labels = torch.cat([batch.labels for batch in self.held])
        rows = [i * len(images) // SHEET_ROWS for i in range(min(SHEET_ROWS, len(images)))]
        images, labels = images[rows], labels[rows].to(self.device)
        noise = normals(range(len(images)), *images.shape[1:]).to(self.device)
        tokens = self._tokens(images)
        columns, names = [], []
        for k in self.lengths[1::2]:
            num_tokens, decoded = torch.full((len(images),), k, device=self.device), self._decoded(tokens, k)
            with self.accelerator.autocast():
                refined = integrate(averaged, decoded, num_tokens, labels, noise, SHEET_STEPS, 1.0, self.scales)
            columns += [to_uint8(decoded), to_uint8(refined)]
            names += [f"k={k}", "refined"]
        table = [[to_pil(image) for image in row] for row in zip(*columns, images, strict=True)]
        save_png(captioned_table(table, column_labels=[*names, "photograph"]), path)

    def export(self, averaged: Refiner) -> None:
        """Write refiner/."""
        averaged.save_pretrained(self.output_dir / "refiner", pick_dtype(self.training.save_dtype))


def draw_times(normal: Tensor) -> Tensor:
    """Times in [0, 1] from standard normal numbers; logit-normal, more of them near the noise."""
    return (normal - 0.5).sigmoid()


def draw_lengths(part: Part, num_channels: int) -> Tensor:
    """Draw k for each row of a micro-batch: (b,) int64 in [1, C], evenly in log k, so that small k are frequent."""
    uniform = torch.rand(part.batch_size, generator=part.rng(Stream.NUM_TOKENS), dtype=torch.float64)
    return torch.exp(uniform[list(part.rows)] * math.log(num_channels + 1)).long().clamp(1, num_channels)


def draw_flips(part: Part, num_channels: int, num_bits: int, most: float) -> Tensor:
    """Bits to flip, as integers to combine with tokens by exclusive or: (b C) int64."""
    rng = part.rng(Stream.BIT_NOISE)
    share = most * torch.rand(part.batch_size, 1, 1, generator=rng)
    flips = (torch.rand(part.batch_size, num_channels, num_bits, generator=rng) < share)[list(part.rows)]
    return (flips * 2 ** torch.arange(num_bits)).sum(-1)


def continue_some(
    tokens: Tensor, num_tokens: Tensor, labels: Tensor, part: Part, share: float, continue_tokens: Continue
) -> Tensor:
    """Replace the last tokens of some images by tokens that a generator draws.

    Of tokens (b C), num_tokens (b,) are used; both num_tokens and labels (b,) are on the CPU. At most a `share` of the
    images is changed, none of those with one token. `continue_tokens` maps tokens (b C), lengths kept, lengths wanted,
    labels and seeds to tokens (b k); the number kept is log-uniform from 1 to all that are used.
    """
    uniform = torch.rand(part.batch_size, 2, generator=part.rng(Stream.CONTINUED))[list(part.rows)]
    kept = torch.exp(uniform[:, 1] * torch.log(num_tokens + 1)).long().clamp(min=1).minimum(num_tokens)
    rows = ((uniform[:, 0] < share) & (kept < num_tokens)).nonzero()[:, 0]
    if not len(rows):
        return tokens
    seeds = [part.step * part.batch_size + part.rows[row] for row in rows.tolist()]
    there = rows.to(tokens.device)
    drawn = continue_tokens(tokens[there], kept[rows].tolist(), num_tokens[rows].tolist(), labels[rows].tolist(), seeds)
    tokens = tokens.clone()
    tokens[there, : drawn.shape[1]] = drawn.to(tokens)
    return tokens
