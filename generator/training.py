"""Training of the generator: a token store in, a folder that `sample.py --model` draws from out."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.bit_prior import fit_bit_prior, token_bits
from common.checkpoint import files_fingerprint
from common.config import LoopConfig
from common.errors import InputError
from common.files import folder_written_whole
from common.randomness import Stream, generator_for
from common.runtime import pick_dtype, send
from generator.config import ChannelGPTConfig, GeneratorConfig, GeneratorTrainingConfig, size_of
from generator.model import ChannelGPT, start_from
from generator.objective import GeneratorObjective, draw_flips, position_weights
from generator.progress import draw_sheet, evaluation_figures, plot_loss, unigram_nats
from generator.token_data import TokenBatch, TokenDataset, whole_batch
from generator.tokens import TokenStore
from training.model_state import StepLoss
from training.schedule import Part, StepSampler, split_batch
from training.trainer import Trainer

logger = logging.getLogger(__name__)
PRIOR_BATCH = 512
EVALUATION_BATCH = 64
LOSS_PLOT = "loss.png"


class GeneratorTrainer(Trainer):
    """Trains a generator and writes it to training.output_dir.

    The folder holds tokenizer/ and generator/ (the averaged weights), so `sample.py --model output_dir` draws with it;
    also checkpoints/, samples/step-NNNNNNNN.png, log.jsonl, and when the run is complete loss.png.

    Args:
        training: settings.
        size: of the transformer; with training.init_from the default, or that model's.
        detokenizer: given a device, the function tokens (b k) -> images (b 3 H W) in [-1, 1] of the store's tokenizer.

    Raises:
        InputError: settings or a store that cannot be used.
    """

    def __init__(
        self,
        training: GeneratorTrainingConfig,
        size: GeneratorConfig,
        detokenizer: Callable[[torch.device], Callable[[Tensor], Tensor]],
    ):
        super().__init__(training, compiles=training.compile, can_shard=True)
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

    def batches(self) -> DataLoader[TokenBatch]:
        """The remaining micro-batches of training."""
        return self.train_loader(self.train_set, whole_batch)

    def loss(self, model: nn.Module, batch: TokenBatch, part: Part) -> StepLoss:
        """Loss of a micro-batch."""
        training, config, device = self.training, self.model_config, self.device
        tokens = batch.tokens.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        dropped = send(part.drops(training.label_dropout), device)
        labels = torch.where(dropped, config.null_label, labels)
        kept = config.num_channels
        if training.prefixes:
            kept = prefix_length(training.seed, part.step, kept)
        flips = None
        if training.bit_flips:
            flips = draw_flips(part.batch_size, kept, config.num_bits, training.bit_flips, part.rng(Stream.BIT_NOISE))
            flips = send(flips[list(part.rows)], device)
        nats, penalty = model(labels, tokens[:, :kept], flips)
        # a token has the same weight in every prefix that contains it
        weighted = (nats * self.weights[:kept]).sum(1).mean() / config.num_channels
        loss = weighted + training.prior_l2_weight * penalty
        return StepLoss(terms={"loss": loss, "nats": nats.mean(), "first": nats[:, 0].mean()})

    def evaluate(self, averaged: GeneratorObjective, step: int) -> dict[str, Any]:
        """Validation loss by position, and a picture of samples."""
        found = []
        loader = self.held_loader(
            self.val_set, self.training.validation_images, EVALUATION_BATCH, whole_batch, num_workers=0
        )
        for batch in tqdm(loader, desc="evaluation", leave=False):
            with self.accelerator.autocast():
                found.append(averaged(batch.labels.to(self.device), batch.tokens.to(self.device)).nats)
        by_position = torch.cat(found).cpu().double().mean(0).tolist()
        figures = evaluation_figures(by_position, self.unigram, self.store.header.codebook_size)
        logger.info(
            "step %d: validation %.3f nats a token, %.3f bits (unigram %.3f, uniform %.3f nats)",
            step, *(figures[name] for name in ("nats", "bits", "unigram_nats", "uniform_nats")),
        )  # fmt: skip
        draw_sheet(averaged.generator, self.detokenize, self.output_dir / "samples" / f"step-{step:08d}.png")
        self.latest = figures["nats"]
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
        """Plot the loss."""
        plot_loss(self.log, self.output_dir / LOSS_PLOT)


def prefix_length(seed: int, step: int, num_channels: int) -> int:
    """How many tokens a step sees, evenly from 1..C; the same in all processes."""
    return int(torch.randint(1, num_channels + 1, (), generator=generator_for(seed, Stream.PREFIX_LENGTH, step)))
