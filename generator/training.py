"""Training of the generator: a token store in, a folder that `sample.py --model` draws from out."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.bit_prior import fit_bit_prior, token_bits
from common.checkpoint import files_fingerprint
from common.config import InputError, LoopConfig
from common.files import folder_written_whole
from common.images import captioned_table, save_line_plot, save_png, to_pil, to_uint8
from common.runtime import pick_dtype, send
from generator.config import ChannelGPTConfig, GeneratorConfig, GeneratorTrainingConfig, SamplingConfig, size_of
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import ChannelGPT, start_from
from generator.objective import GeneratorObjective, position_weights
from generator.token_data import TokenBatch, TokenDataset, whole_batch
from generator.tokens import TokenStore
from training.model_state import StepLoss
from training.schedule import Part, StepSampler, split_batch
from training.trainer import Trainer

logger = logging.getLogger(__name__)
PRIOR_BATCH = 512
EVALUATION_BATCH = 64
SHEET_CLASSES = 8
LOSS_PLOT = "loss.png"


class GeneratorTrainer(Trainer):
    """Trains a generator and writes it to training.output_dir.

    The folder holds tokenizer/ and generator/ (the averaged weights), so `sample.py --model output_dir` draws with it;
    also checkpoints/, samples/step-NNNNNNNN.png, log.jsonl, and when the run is complete loss.png.

    With training.init_from, `size` is the default or that model's. `detokenizer` maps a device to a function from
    tokens (b k) to images (b 3 H W) in [-1, 1] of the store's tokenizer.

    Raises:
        InputError: settings or a store that cannot be used.
    """

    def __init__(
        self,
        training: GeneratorTrainingConfig,
        size: GeneratorConfig,
        detokenizer: Callable[[torch.device], Callable[[Tensor], Tensor]],
    ):
        super().__init__(training, can_shard=True)
        self.training = training
        self.store = TokenStore.open(training.tokens)
        self.train_set = TokenDataset(self.store, "train", training.seed)
        self.val_set = TokenDataset(self.store, "val", None)
        model = self._model(size)
        self.model_config = model.config
        self.weights = position_weights(training.position_weighting, model.config.num_channels).to(self.device)
        self.latest = math.nan
        identity = {"size": asdict(size_of(model.config)), "store": asdict(self.store.header)}
        scales = {"generator.prior.": training.prior_learning_rate}
        self.prepare(GeneratorObjective(model), identity, rate_scales=scales)
        if self.is_main:
            self.detokenize = detokenizer(self.device)
            self.unigram = unigram_nats(self.train_set.counts(), self.val_set.counts())
            self._begin_folder()

    def _model(self, size: GeneratorConfig) -> ChannelGPT:
        """A new model with a fitted prior, or the one of init_from."""
        training, header = self.training, self.store.header
        config = ChannelGPTConfig(
            **asdict(size),
            num_channels=header.num_channels,
            num_bits=header.num_bits,
            class_names=header.class_names,
            tokenizer_fingerprint=header.tokenizer_fingerprint,
            has_null_label=training.label_dropout > 0,
        )
        dropouts = {"dropout": training.dropout, "attention_dropout": training.attention_dropout}
        if training.init_from is not None:
            model = start_from(training.init_from, config, **dropouts)
        else:
            model = ChannelGPT(config, **dropouts)
            if training.prior_steps and not training.resume:
                self._fit_prior(model)
        model.prior.requires_grad_(training.prior_learning_rate > 0)
        model.checkpoints_blocks = training.gradient_checkpointing
        return model

    def _fit_prior(self, model: ChannelGPT) -> None:
        """Fit the linear prior on the main process and send it to the others."""
        training = self.training
        prior = model.prior.to(self.device)
        if self.is_main:
            config = LoopConfig(output_dir="", steps=training.prior_steps, batch_size=PRIOR_BATCH, seed=training.seed)
            collate: Any = whole_batch
            sampler = StepSampler(len(self.train_set), config, split_batch(config, 0, 1), 0)
            fit_bit_prior(
                prior,
                self._prior_batches(DataLoader(self.train_set, batch_sampler=sampler, collate_fn=collate)),
                steps=training.prior_steps,
                l2_weight=training.prior_l2_weight,
                label_dropout=training.label_dropout,
                seed=training.seed,
            )
        self.any_process(False)  # waits for longer than a broadcast does
        for parameter in prior.parameters():
            broadcast(parameter.data)
        model.to("cpu")

    def _prior_batches(self, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            yield token_bits(batch.tokens.to(self.device), self.store.header.num_bits), batch.labels.to(self.device)

    def _begin_folder(self) -> None:
        """Copy the store's tokenizer, and remove the plot of an earlier run.

        Raises:
            InputError: the folder has another tokenizer.
        """
        folder = self.output_dir / "tokenizer"
        if folder.exists() and files_fingerprint(folder) != files_fingerprint(self.store.tokenizer_folder):
            raise InputError(f"{folder} is not the tokenizer of {self.training.tokens}; take another output_dir")
        if not folder.exists():
            with folder_written_whole(folder) as temporary:
                shutil.copytree(self.store.tokenizer_folder, temporary, dirs_exist_ok=True)
        if self.step < self.training.steps:
            (self.output_dir / LOSS_PLOT).unlink(missing_ok=True)

    def data(self) -> tuple[TokenDataset, TokenDataset, Callable[[Any], Any]]:
        """The two splits of the store, and the function that makes a batch."""
        return self.train_set, self.val_set, whole_batch

    def loss(self, model: nn.Module, batch: TokenBatch, part: Part) -> StepLoss:
        """Loss of a micro-batch."""
        training, config, device = self.training, self.model_config, self.device
        tokens = batch.tokens.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        dropped = send(part.drops(training.label_dropout), device)
        labels = torch.where(dropped, config.null_label, labels)
        nats, penalty = model(labels, tokens)
        loss = (nats * self.weights).sum(1).mean() / config.num_channels + training.prior_l2_weight * penalty
        return StepLoss(terms={"loss": loss, "nats": nats.mean(), "first": nats[:, 0].mean()})

    def evaluate(self, averaged: GeneratorObjective, step: int) -> dict[str, Any]:
        """Validation loss by position, and a picture of samples."""
        found = []
        loader = self.held_loader(self.training.validation_images, EVALUATION_BATCH, num_workers=0)
        for batch in tqdm(loader, desc="evaluation", leave=False):
            with self.accelerator.autocast():
                found.append(averaged(batch.labels.to(self.device), batch.tokens.to(self.device)).nats)
        by_position = torch.cat(found).cpu().double().mean(0).tolist()
        nats = sum(by_position) / len(by_position)
        figures = {
            "nats": nats,
            "bits": nats / math.log(2),
            "first_nats": by_position[0],
            "last_nats": by_position[-1],
            "unigram_nats": sum(self.unigram) / len(self.unigram),
            "uniform_nats": math.log(self.store.header.codebook_size),
            "nats_by_position": [round(value, 4) for value in by_position],
        }
        logger.info(
            "step %d: validation %.3f nats a token, %.3f bits (unigram %.3f, uniform %.3f nats)",
            step, *(figures[name] for name in ("nats", "bits", "unigram_nats", "uniform_nats")),
        )  # fmt: skip
        draw_sheet(averaged.generator, self.detokenize, self.output_dir / "samples" / f"step-{step:08d}.png")
        self.latest = nats
        return figures

    def keeps_evaluated(self) -> bool:
        """With keep_best only weights with the lowest validation loss so far are written."""
        best = min((found["nats"] for found in self.log.evaluations().values()), default=math.inf)
        if self.training.keep_best and self.latest >= best:
            logger.info("generator/ keeps the weights with %.4f nats, the lowest so far", best)
            return False
        return True

    def export(self, averaged: GeneratorObjective) -> None:
        """Write generator/."""
        averaged.generator.save_pretrained(self.output_dir / "generator", pick_dtype(self.training.save_dtype))

    def finish(self) -> None:
        """Plot training and validation loss over the run, with both baselines."""
        trained = [(record["step"], record["nats"]) for record in self.log.records() if "nats" in record]
        evaluations = self.log.evaluations()
        lines = {
            "training": trained,
            "validation": [(step, figures["nats"]) for step, figures in evaluations.items()],
        }
        for name in ("unigram", "uniform"):
            level = evaluations[max(evaluations)][f"{name}_nats"]
            lines[name] = [(trained[0][0], level), (trained[-1][0], level)]
        title = "Cross-entropy over the run; validation with averaged weights"
        save_line_plot({"nats per token": lines}, self.output_dir / LOSS_PLOT, title=title, x_label="step")


def unigram_nats(train_counts: Tensor, val_counts: Tensor) -> list[float]:
    """Nats on val of the frequency of each token at each position of train, from counts (C, codebook_size).

    Every token of train counts once more, so that none is impossible.
    """
    seen = (train_counts + 1).double()
    nats = -(val_counts * (seen / seen.sum(-1, keepdim=True)).log()).sum(-1) / val_counts.sum(-1)
    return [float(value) for value in nats]


def draw_sheet(model: ChannelGPT, detokenize: Callable[[Tensor], Tensor], path: Path) -> None:
    """Write a picture of samples with fixed seeds: a row for each of a few classes, a column for each k."""
    config = model.config
    shown = min(SHEET_CLASSES, config.num_classes)
    labels = [i * config.num_classes // shown for i in range(shown)]
    lengths = [k for k in (4, 16, 64, 128, 256) if k < config.num_channels] + [config.num_channels]
    engine = Engine(CachedDecoder.from_model(model))
    *_, last = stream(engine, labels, labels, config.num_channels, SamplingConfig())
    columns = [map(to_pil, to_uint8(detokenize(last.tokens[:, :k]))) for k in lengths]
    names = [config.class_names[label].split(",")[0][:20] for label in labels]
    save_png(captioned_table(list(zip(*columns, strict=True)), names, [f"k={k}" for k in lengths]), path)
