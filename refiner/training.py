"""Training of the refiner: photographs and a frozen tokenizer in, a folder for `sample.py` out."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.errors import InputError
from common.images import captioned_table, save_png, to_float, to_pil, to_uint8
from common.randomness import Stream, generator_for, normals
from common.runtime import check_can_compile, leave_signals_to_the_trainer, pick_dtype, send
from refiner.config import RefinerConfig, RefinerSize, RefinerTrainingConfig, size_of
from refiner.flow import flow_loss, integrate, scale_table, times
from refiner.model import Refiner
from training.distributed import make_accelerator
from training.loop import Loop, RunTasks, StepLoss, check_output_dir
from training.schedule import Part

logger = logging.getLogger(__name__)
SCALE_IMAGES = 256  # images that the scales of the residual are measured on
SHEET_ROWS, SHEET_STEPS = 8, 8
EVALUATION_BATCH = 32
Continue = Callable[[Tensor, list[int], list[int], list[int], list[int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A frozen tokenizer on a device, as the refiner needs it.

    Attributes:
        fingerprint: of all its weights.
        image_size, num_channels, num_bits: of its images and tokens.
        lengths: the k at which images are evaluated, rising, the last C.
        tokenize: images (b 3 H W) in [-1, 1] -> tokens (b C).
        decode: tokens (b C) and lengths (b,) on the CPU -> images (b 3 H W) uint8.
        continue_tokens: tokens (b C), lengths kept, lengths wanted, labels, seeds -> tokens (b k) whose last ones a
            generator has drawn; None without one.
    """

    fingerprint: str
    image_size: int
    num_channels: int
    num_bits: int
    lengths: list[int]
    tokenize: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    continue_tokens: Continue | None = None


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Data of a run: `train` and `val` give (image, label) by (index, epoch); `collate` makes a batch of them.

    A batch has images (b 3 H W) uint8 and labels (b,); `note` is called with each one, to report unreadable files.
    """

    name: str
    fingerprint: str
    class_names: list[str]
    train: Dataset[Any]
    val: Dataset[Any]
    collate: Callable[[Any], Any]
    note: Callable[[Any], None]


def train_refiner(
    training: RefinerTrainingConfig,
    size: RefinerSize,
    photographs: Photographs,
    codec_on: Callable[[torch.device], Codec],
    identity: dict[str, Any],
) -> None:
    """Train a refiner and write it to training.output_dir.

    The folder holds refiner/ (the averaged weights; copy it into a model folder to draw with it), checkpoints/,
    refined/step-NNNNNNNN.png and log.jsonl.

    Args:
        training: settings.
        size: of the network; with training.init_from the default, or that refiner's.
        photographs: the data.
        codec_on: the tokenizer on a device.
        identity: what else must not change when a run is resumed, JSON values.

    Raises:
        InputError: settings or data that cannot be used.
    """
    run = RefinerRun(training, size, photographs, codec_on, identity)
    run.loop.run(run.batches(), run.loss, RunTasks(evaluate=run.evaluate, export=run.export))


class RefinerRun:
    """A training run: its data, model and loop, and what is evaluated and written on the way."""

    def __init__(
        self,
        training: RefinerTrainingConfig,
        size: RefinerSize,
        photographs: Photographs,
        codec_on: Callable[[torch.device], Codec],
        identity: dict[str, Any],
    ):
        check_output_dir(training)
        self.training, self.photographs = training, photographs
        self.accelerator = make_accelerator(training)
        self.device = self.accelerator.device
        self.codec = codec_on(self.device)
        self.output_dir = Path(training.output_dir)
        self.held = list(self._held_batches())
        if not self.held:
            raise InputError(f"no validation image of {photographs.name} can be read")
        model = self._model(size)
        self.config = model.config
        self.scales = scale_table(self.config).to(self.device)
        if training.compile:
            check_can_compile(self.device)
            model.compile()
        identity = identity | {
            "model": asdict(self.config), "images": photographs.fingerprint, "tokenizer_weights": self.codec.fingerprint
        }  # fmt: skip
        self.loop = Loop(model, training, self.accelerator, identity)

    def _model(self, size: RefinerSize) -> Refiner:
        """A new model, or the one of init_from."""
        codec, training = self.codec, self.training
        config = RefinerConfig(
            **asdict(size),
            image_size=codec.image_size,
            num_channels=codec.num_channels,
            class_names=self.photographs.class_names,
            tokenizer_fingerprint=codec.fingerprint,
            scale_lengths=codec.lengths,
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

    def _measured_scales(self) -> list[float]:
        """Root mean square of photograph - decoded image at each of codec.lengths."""
        images = torch.cat([batch.images for batch in self.held])[:SCALE_IMAGES]
        found = []
        for k in self.codec.lengths:
            squares = [
                (to_float(part) - self._decoded(part, torch.full((len(part),), k)).cpu()).square().mean((1, 2, 3))
                for part in images.split(EVALUATION_BATCH)
            ]
            found.append(max(round(torch.cat(squares).mean().sqrt().item(), 3), 0.001))
        return found

    @torch.no_grad()
    def _decoded(self, images: Tensor, num_tokens: Tensor) -> Tensor:
        """Images (b 3 H W) uint8 decoded from their first k tokens, in [-1, 1], on the device."""
        tokens = self.codec.tokenize(to_float(images.to(self.device)))
        return to_float(self.codec.decode(tokens, num_tokens))

    def _held_batches(self) -> Any:
        """Validation images, spread evenly over the classes, the same ones every time."""
        val: Any = self.photographs.val
        count = min(len(val), self.training.validation_images)
        chosen = [(i * len(val) // count, 0) for i in range(count)]
        batches = DataLoader(
            val,
            batch_sampler=[chosen[i : i + EVALUATION_BATCH] for i in range(0, count, EVALUATION_BATCH)],
            collate_fn=self.photographs.collate,
        )
        for batch in batches:
            self.photographs.note(batch)
            if len(batch.images):
                yield batch

    def batches(self) -> DataLoader[Any]:
        """The micro-batches that are left."""
        train: Any = self.photographs.train
        return DataLoader(
            train,
            batch_sampler=self.loop.sampler(len(train)),
            num_workers=self.training.num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            collate_fn=self.photographs.collate,
            pin_memory=self.device.type == "cuda",
        )

    def loss(self, model: nn.Module, batch: Any, part: Part) -> StepLoss:
        """Loss of a micro-batch."""
        self.photographs.note(batch)
        if not len(batch.images):
            raise InputError(f"no image of {self.photographs.name} can be read; see the lines above")
        images = to_float(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        num_tokens = draw_lengths(part, self.codec.num_channels)
        with torch.no_grad():
            tokens = self.codec.tokenize(images)
            tokens = self._with_errors(tokens, num_tokens, batch.labels, part)
            decoded = to_float(self.codec.decode(tokens, num_tokens))
        dropped = send(part.drops(self.training.label_dropout), self.device)
        labels = torch.where(dropped, self.config.null_label, labels)
        # the loop has seeded torch for this micro-batch
        noise = torch.randn_like(images)
        time = draw_times(torch.randn(len(images), device=self.device))
        losses = flow_loss(model, images, decoded, send(num_tokens, self.device), labels, self.scales, noise, time)
        return StepLoss(terms={"loss": losses.mean()})

    def _with_errors(self, tokens: Tensor, num_tokens: Tensor, labels: Tensor, part: Part) -> Tensor:
        """Tokens (b C) of photographs with what a generator gets wrong: flipped bits, and tokens that it has drawn."""
        training, codec = self.training, self.codec
        if training.bit_flips:
            tokens = tokens ^ send(draw_flips(part, codec, training.bit_flips), self.device)
        if codec.continue_tokens is None:
            return tokens
        rng = part.rng(Stream.CONTINUED)
        uniform = torch.rand(part.batch_size, 2, generator=rng)[list(part.rows)]
        kept = (num_tokens * (0.5 + 0.5 * uniform[:, 1])).ceil().long()
        rows = ((uniform[:, 0] < training.continued_share) & (kept < num_tokens)).nonzero()[:, 0]
        if not len(rows):
            return tokens
        first = part.step * part.batch_size
        seeds = [first + part.rows[row] for row in rows.tolist()]
        drawn = codec.continue_tokens(
            tokens[rows.to(tokens.device)], kept[rows].tolist(), num_tokens[rows].tolist(), labels[rows].tolist(), seeds
        )
        tokens = tokens.clone()
        tokens[rows.to(tokens.device), : drawn.shape[1]] = drawn.to(tokens)
        return tokens

    @torch.no_grad()
    def evaluate(self, averaged: Refiner, step: int) -> dict[str, Any]:
        """Validation loss at each of codec.lengths, and a picture; in the main process."""
        found: dict[int, list[Tensor]] = {k: [] for k in self.codec.lengths}
        seen = 0
        for batch in tqdm(self.held, desc="evaluation", leave=False):
            rng = generator_for(seen, Stream.STEP)
            noise = torch.randn(batch.images.shape, generator=rng)
            time = draw_times(torch.randn(len(noise), generator=rng))
            tokens = self.codec.tokenize(to_float(batch.images.to(self.device)))
            for k, losses in found.items():
                num_tokens = torch.full((len(noise),), k)
                decoded = to_float(self.codec.decode(tokens, num_tokens))
                with self.accelerator.autocast():
                    loss = flow_loss(
                        averaged, to_float(batch.images.to(self.device)), decoded, num_tokens.to(self.device),
                        batch.labels.to(self.device), self.scales, noise.to(self.device), time.to(self.device),
                    )  # fmt: skip
                losses.append(loss.cpu())
            seen += len(noise)
        figures = {f"loss_k{k}": round(torch.cat(losses).mean().item(), 4) for k, losses in found.items()}
        figures["loss"] = round(math.fsum(figures.values()) / len(figures), 4)
        logger.info("step %d: validation loss %.4f", step, figures["loss"])
        self._draw_sheet(averaged, self.output_dir / "refined" / f"step-{step:08d}.png")
        return figures

    def _draw_sheet(self, averaged: Refiner, path: Path) -> None:
        """A row for each photograph: decoded and refined at some k, the photograph last."""
        images = torch.cat([batch.images for batch in self.held])
        labels = torch.cat([batch.labels for batch in self.held])
        rows = [i * len(images) // SHEET_ROWS for i in range(min(SHEET_ROWS, len(images)))]
        images, labels = images[rows], labels[rows].to(self.device)
        noise = normals(range(len(images)), *images.shape[1:]).to(self.device)
        columns, names = [], []
        for k in self.codec.lengths[1::2]:
            num_tokens = torch.full((len(images),), k)
            decoded = self._decoded(images, num_tokens)
            with self.accelerator.autocast():
                refined = integrate(
                    averaged, decoded, num_tokens.to(self.device), labels, noise, times(SHEET_STEPS), 1.0, self.scales
                )
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


def draw_flips(part: Part, codec: Codec, most: float) -> Tensor:
    """Bits to flip, as integers to combine with tokens by exclusive or: (b C) int64."""
    rng = part.rng(Stream.BIT_NOISE)
    shape = part.batch_size, codec.num_channels, codec.num_bits
    share = most * torch.rand(part.batch_size, 1, 1, generator=rng)
    flips = (torch.rand(shape, generator=rng) < share)[list(part.rows)]
    weights = 2 ** torch.arange(codec.num_bits)
    return (flips * weights).sum(-1)
