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
from common.config import LoopConfig
from common.files import folder_written_whole
from common.measuring import machine
from common.randomness import Stream, generator_for
from common.runtime import check_can_compile, leave_signals_to_the_trainer, pick_dtype, send
from generator.config import ChannelGPTConfig, GeneratorConfig, GeneratorTrainingConfig, size_of
from generator.model import ChannelGPT, start_from
from generator.objective import GeneratorObjective, draw_flips, flops_per_token, position_weights
from generator.progress import REPORT, Baselines, Progress, draw_sheet, write_report
from generator.token_data import TokenBatch, TokenDataset, whole_batch
from generator.tokens import TokenStore
from training.distributed import Processes, make_accelerator
from training.loop import Loop, RunTasks, StepLoss, check_output_dir
from training.peak import peak_of
from training.schedule import Part, StepPlan, StepSampler

logger = logging.getLogger(__name__)
PRIOR_BATCH = 512


def train_generator(
    training: GeneratorTrainingConfig,
    size: GeneratorConfig,
    detokenizer: Callable[[torch.device], Callable[[Tensor], Tensor]],
    command: str,
) -> None:
    """Train a generator and write it to training.output_dir.

    The folder holds tokenizer/ and generator/ (the averaged weights), so `sample.py --model output_dir`
    draws with it; also checkpoints/, samples/step-NNNNNNNN.png, log.jsonl, and at the end report.md.

    Args:
        training: settings.
        size: of the transformer; with training.init_from the default, or that model's.
        detokenizer: given a device, the function tokens (b k) -> images (b 3 H W) in [-1, 1] of the store's tokenizer.
        command: as the user typed it, for the report.

    Raises:
        InputError: settings or a store that cannot be used.
    """
    run = GeneratorRun(training, size, command)
    if run.accelerator.is_main_process:
        run.detokenize = detokenizer(run.accelerator.device)
        begin_folder(Path(training.output_dir), run.store, training.resume, run.loop.step < training.steps)
    tasks = RunTasks(evaluate=run.evaluate, export=run.export, finish=run.finish, speed=run.speed)
    run.loop.run(run.batches(), run.loss, tasks)


class GeneratorRun:
    """A training run: its data, model and loop, and what is evaluated and written on the way."""

    detokenize: Callable[[Tensor], Tensor]

    def __init__(self, training: GeneratorTrainingConfig, size: GeneratorConfig, command: str):
        self.training, self.command = training, command
        check_output_dir(training)  # before the prior is fitted, which takes minutes
        self.store = TokenStore.open(training.tokens)
        self.output_dir = Path(training.output_dir)
        self.accelerator = make_accelerator(training, can_shard=True)
        device = self.accelerator.device
        if training.compile:
            check_can_compile(device)
        self.train_set = TokenDataset(self.store, "train", training.seed)
        self.val_set = TokenDataset(self.store, "val", None)
        is_main = self.accelerator.is_main_process
        self.baselines = Baselines.of(self.train_set.counts(), self.val_set.counts()) if is_main else None
        model = self._model(size)
        self.config = model.config
        mean_length = (1 + self.config.num_channels) / 2 if training.prefixes else self.config.num_channels
        self.mean_length, self.flops = mean_length, flops_per_token(model, mean_length)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        identity = {"size": asdict(size_of(self.config)), "store": asdict(self.store.header)}
        objective = GeneratorObjective(model)
        if training.compile:
            objective.compile_blocks()
        scales = {"generator.prior.": training.prior_learning_rate}
        self.loop = Loop(objective, training, self.accelerator, identity, rate_scales=scales)
        self.weights = position_weights(training.position_weighting, self.config.num_channels).to(device)
        self.latest = math.nan
        self.dtype = "bfloat16" if self.accelerator.mixed_precision == "bf16" else "float32"
        self.accelerator.wait_for_everyone()  # so that processes that share a processor measure their share of it
        self.peak = peak_of(device, self.dtype)
        self.peak_flops = self.accelerator.reduce(torch.tensor(self.peak.flops, device=device), "sum").item()

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
        training, device = self.training, self.accelerator.device
        prior = model.prior.to(device)
        if self.accelerator.is_main_process:
            loop = LoopConfig(output_dir="", steps=training.prior_steps, batch_size=PRIOR_BATCH, seed=training.seed)
            sampler = StepSampler(len(self.train_set), StepPlan(loop, 0, 1), 0)
            fit_bit_prior(
                prior,
                self._prior_batches(DataLoader(self.train_set, batch_sampler=sampler, collate_fn=whole_batch)),
                steps=training.prior_steps,
                l2_weight=training.prior_l2_weight,
                label_dropout=training.label_dropout,
                seed=training.seed,
            )
        Processes(self.accelerator).wait()  # for longer than a broadcast does
        for parameter in prior.parameters():
            broadcast(parameter.data)
        model.to("cpu")

    def _prior_batches(self, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            tokens = batch.tokens.to(self.accelerator.device)
            yield token_bits(tokens, self.store.header.num_bits), batch.labels.to(self.accelerator.device)

    def batches(self) -> DataLoader[TokenBatch]:
        """The micro-batches that are left."""
        return DataLoader(
            self.train_set,
            batch_sampler=self.loop.sampler(len(self.train_set)),
            num_workers=self.training.num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            collate_fn=whole_batch,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def loss(self, model: nn.Module, batch: TokenBatch, part: Part) -> StepLoss:
        """Loss of a micro-batch."""
        training, config, device = self.training, self.config, self.accelerator.device
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

    @torch.no_grad()
    def evaluate(self, averaged: GeneratorObjective, step: int) -> dict[str, Any]:
        """Validation loss by position, and a picture of samples; in the main process."""
        assert self.baselines is not None
        by_position = validation_nats(averaged, self._held_batches(), self.accelerator)
        figures = self.baselines.beside(by_position)
        logger.info("step %d: validation %s", step, figures.line())
        draw_sheet(averaged.generator, self.detokenize, self.output_dir / "samples" / f"step-{step:08d}.png")
        record = figures.record()
        self.latest = record["nats"]
        return record

    def _held_batches(self) -> Any:
        count = min(self.training.validation_images, len(self.val_set))
        chosen = [(i * len(self.val_set) // count, 0) for i in range(count)]
        return DataLoader(
            self.val_set, batch_sampler=[chosen[i : i + 64] for i in range(0, count, 64)], collate_fn=whole_batch
        )

    def export(self, averaged: GeneratorObjective) -> None:
        """Write generator/, with keep_best only if the validation loss is the lowest so far."""
        best = min((found["nats"] for found in self.loop.log.evaluations().values()), default=math.inf)
        if self.training.keep_best and self.latest >= best:
            logger.info("generator/ keeps the weights with %.4f nats, the lowest so far", best)
            return
        averaged.generator.save_pretrained(self.output_dir / "generator", pick_dtype(self.training.save_dtype))

    def speed(self, images_per_second: float) -> dict[str, float]:
        """Tokens per second and MFU."""
        tokens = images_per_second * self.mean_length
        return {"tokens_per_second": tokens, "mfu": tokens * self.flops / self.peak_flops}

    def finish(self) -> None:
        """Write the report."""
        assert self.baselines is not None
        timed = not math.isnan(self.loop.images_per_second)
        if not timed and (self.output_dir / REPORT).exists():
            return  # a finished run that was started once more
        progress = Progress(
            command=self.command,
            machine={
                **machine(self.accelerator.device), "processes": self.accelerator.num_processes, "dtype": self.dtype
            },
            speed=self.speed(self.loop.images_per_second) if timed else None,
            peak=self.peak,
            flops_per_token=self.flops,
            parameters=self.parameters,
            sequences=len(self.train_set),
            steps=self.training.steps,
            batch_size=self.training.batch_size,
            keep_best=self.training.keep_best,
        )  # fmt: skip
        write_report(self.output_dir, self.loop.log, self.baselines, progress)


def prefix_length(seed: int, step: int, num_channels: int) -> int:
    """How many tokens a step sees, evenly from 1..C; the same in all processes."""
    return int(torch.randint(1, num_channels + 1, (), generator=generator_for(seed, Stream.PREFIX_LENGTH, step)))


def validation_nats(model: GeneratorObjective, batches: Any, accelerator: Any) -> Tensor:
    """Mean nats of each position, (C,) float64 on the CPU."""
    found = []
    for batch in tqdm(batches, desc="evaluation", leave=False):
        with accelerator.autocast():
            found.append(model(batch.labels.to(accelerator.device), batch.tokens.to(accelerator.device)).nats)
    return torch.cat(found).cpu().double().mean(0)


def begin_folder(output_dir: Path, store: TokenStore, resume: bool, unfinished: bool) -> None:
    """Copy the store's tokenizer beside the future model, and remove the report of an earlier run."""
    folder = output_dir / "tokenizer"
    if folder.exists() and not resume:
        shutil.rmtree(folder)  # of a run that ended before its first checkpoint, perhaps with another tokenizer
    if not folder.exists():
        with folder_written_whole(folder) as temporary:
            shutil.copytree(store.tokenizer_folder, temporary, dirs_exist_ok=True)
    if unfinished:
        (output_dir / REPORT).unlink(missing_ok=True)
