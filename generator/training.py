"""Training the generator: a token store in, a folder that `sample.py --model` draws from out."""

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.checkpoint import folder_written_whole
from common.errors import InputError
from common.measuring import machine
from common.peak import peak_of
from common.processes import make_accelerator
from common.randomness import Stream, generator_for
from common.runtime import check_can_compile, leave_signals_to_the_trainer, send
from common.steps import LoopConfig, Part
from common.training import Loop, RunTasks, StepLoss
from generator.config import GeneratorConfig, TokenLayout
from generator.model import build_generator, save_generator, start_from
from generator.objective import WEIGHTINGS, NextTokenNats, Weighting, flops_per_token, position_weights
from generator.positions import check_can_count
from generator.progress import REPORT, Baselines, Progress, draw_sheet, write_report
from generator.token_data import TokenBatch, TokenDataset, whole_batch
from generator.tokens import TokenStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GeneratorTrainingConfig(LoopConfig):
    """Settings of train_ar.py beside the model's size."""

    tokens: str = field(metadata={"help": "token store, from extract_tokens.py"})
    init_from: str | None = field(
        default=None,
        metadata={"help": "begin with the weights of a trained generator; the rows of its classes are replaced"},
    )
    label_dropout: float = field(default=0.1, metadata={"help": "share of labels replaced by the null label"})
    dropout: float = field(
        default=0.0, metadata={"help": "share of entries zeroed after the embedding, every attention and every MLP"}
    )
    position_weighting: Weighting = field(
        default="none",
        metadata={"help": "weight of the first token's loss over the last's: none 1, linear 2, exponential 16"},
    )
    prefixes: bool = field(
        default=False,
        metadata={"help": "each step sees the first k tokens only, k drawn evenly from 1..C: half the work, and first "
                  "tokens learn the most"},
    )  # fmt: skip
    bit_vectors: bool = field(
        default=True,
        metadata={"help": "tokens share a vector for each bit, in embedding and head: learns much faster, and is one "
                  "plain embedding when saved"},
    )  # fmt: skip
    position_vectors: bool = field(
        default=False,
        metadata={"help": "the model learns with a vector for each position, and is saved with one block more, which "
                  "makes them: learns very much faster where steps are few"},
    )  # fmt: skip
    loss_chunk: int = field(
        default=8192, metadata={"help": "tokens whose logits exist at a time, to save memory; 0 = all at once"}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "compute blocks again in the backward pass: less memory, a third more time"},
    )
    compile: bool = field(default=False, metadata={"help": "compile the blocks and the loss with torch.compile"})
    save_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the exported generator"}
    )
    keep_best: bool = field(
        default=False, metadata={"help": "export the weights of the lowest validation loss, not those of the last step"}
    )
    validation_images: int = field(default=2000, metadata={"help": "images of val that an evaluation uses"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.position_weighting not in WEIGHTINGS:
            raise InputError(f"position_weighting is {self.position_weighting!r}; allowed: {', '.join(WEIGHTINGS)}")
        if self.position_vectors and self.init_from is not None:
            raise InputError(
                "position_vectors are for a fresh model; a trained one (init_from) has its own, leave them out"
            )
        if self.loss_chunk < 0:
            raise InputError(f"loss_chunk is {self.loss_chunk}; it must be 0 (off) or above")
        if self.validation_images < 1:
            raise InputError(f"validation_images is {self.validation_images}; it must be at least 1")


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
        size: the model's; with training.init_from the default, or that model's.
        detokenizer: given a device, the function tokens (b k) -> images (b 3 H W) in [-1, 1] of the store's tokenizer.
        command: as the user typed it, for the report.

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
    accelerator = make_accelerator(training, can_shard=True)
    if training.compile:
        check_can_compile(accelerator.device)
    output_dir = Path(training.output_dir)
    train_set = TokenDataset(store, "train", training.seed)
    val_set = TokenDataset(store, "val", None)
    vectors = None
    if training.init_from is None:
        llama = build_generator(size, layout)
    else:
        llama, size, vectors = start_from(training.init_from, layout, size)
    with_positions = training.position_vectors or vectors is not None
    layout = replace(layout, first_block_counts=with_positions)
    if training.position_vectors:
        check_can_count(llama.config, layout.num_channels)
    model = NextTokenNats(
        llama,
        layout,
        chunk=training.loss_chunk,
        dropout=training.dropout,
        gradient_checkpointing=training.gradient_checkpointing,
        bit_vectors=training.bit_vectors,
        position_vectors=with_positions,
    )
    if model.positions is not None and vectors is not None:
        model.positions.vectors.data.copy_(vectors)
    if training.init_from is None:
        model.begin_with_bits()
    if training.compile:
        model.compile_blocks()
    seen = (1 + header.num_channels) / 2 if training.prefixes else header.num_channels  # tokens of a sequence, mean
    flops, parameters = flops_per_token(llama, seen), llama.num_parameters()
    loop = Loop(
        model, training, accelerator, {"size": asdict(size), "store": asdict(header), "positions": with_positions}
    )
    main = accelerator.is_main_process
    # only the main process looks at the model; what it looks with need not take room elsewhere
    baselines = Baselines.of(train_set.counts(), val_set.counts()) if main else None
    detokenize = detokenizer(accelerator.device) if main else None
    if main:
        begin_folder(output_dir, store, training.resume, loop.step < training.steps)
    batches = DataLoader(
        train_set,
        batch_sampler=loop.sampler(len(train_set)),
        num_workers=training.num_workers,
        worker_init_fn=leave_signals_to_the_trainer,
        collate_fn=whole_batch,
        pin_memory=accelerator.device.type == "cuda",
    )
    count = min(training.validation_images, len(val_set))
    chosen = [(i * len(val_set) // count, 0) for i in range(count)]
    held_batches: Any = DataLoader(
        val_set, batch_sampler=[chosen[i : i + 64] for i in range(0, count, 64)], collate_fn=whole_batch
    )
    weights = position_weights(training.position_weighting, header.num_channels).to(accelerator.device)
    dtype = "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"
    accelerator.wait_for_everyone()  # so that processes which share a processor measure what they then have of it
    peak = peak_of(accelerator.device, dtype)
    all_flops = accelerator.reduce(torch.tensor(peak.flops, device=accelerator.device), "sum").item()

    def loss(model: nn.Module, batch: TokenBatch, part: Part) -> StepLoss:
        tokens = batch.tokens.to(accelerator.device, non_blocking=True)
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        dropped = send(part.drops(training.label_dropout), labels.device)
        labels = torch.where(dropped, layout.null_label, labels)
        kept = (
            prefix_length(training.seed, part.step, layout.num_channels) if training.prefixes else layout.num_channels
        )
        nats = model(labels, tokens[:, :kept])
        # a token weighs the same in every prefix that has it
        weighted = (nats * weights[:kept]).sum(1).mean() / layout.num_channels
        return StepLoss(terms={"loss": weighted, "nats": nats.mean(), "first": nats[:, 0].mean()})

    latest = math.nan

    @torch.no_grad()
    def evaluate(averaged: NextTokenNats, step: int) -> dict[str, Any]:
        nonlocal latest
        assert baselines is not None and detokenize is not None
        by_position = validation_nats(averaged, held_batches, accelerator)
        figures = baselines.beside(by_position)
        logger.info("step %d: validation %s", step, figures.line())
        draw_sheet(averaged.plain(), layout, detokenize, output_dir / "samples" / f"step-{step:08d}.png")
        record = figures.record()
        latest = record["nats"]
        return record

    def export(averaged: NextTokenNats) -> None:
        best = min((found["nats"] for found in loop.journal.evaluations().values()), default=math.inf)
        if training.keep_best and latest >= best:
            logger.info("generator/ stays that of %.4f nats, the lowest so far", best)
            return
        save_generator(averaged.plain(), layout, output_dir / "generator", training.save_dtype)

    def speed(images_per_second: float) -> dict[str, float]:
        tokens = images_per_second * seen
        return {"tokens_per_second": tokens, "mfu": tokens * flops / all_flops}

    def finish() -> None:
        assert baselines is not None
        timed = not math.isnan(loop.images_per_second)
        if not timed and (output_dir / REPORT).exists():
            return  # a finished run that was started once more
        progress = Progress(
            command=command,
            machine={**machine(accelerator.device), "processes": accelerator.num_processes, "dtype": dtype},
            speed=speed(loop.images_per_second) if timed else None,
            peak=peak,
            flops_per_token=flops,
            parameters=parameters,
            sequences=len(train_set),
            steps=training.steps,
            batch_size=training.batch_size,
            keep_best=training.keep_best,
        )
        write_report(output_dir, loop.journal, baselines, progress)

    loop.run(batches, loss, RunTasks(evaluate=evaluate, export=export, finish=finish, speed=speed))


def prefix_length(seed: int, step: int, num_channels: int) -> int:
    """How many tokens a step sees, evenly from 1..C; the same in all processes."""
    return int(torch.randint(1, num_channels + 1, (), generator=generator_for(seed, Stream.PREFIX_LENGTH, step)))


def validation_nats(model: NextTokenNats, batches: Any, accelerator: Accelerator) -> Tensor:
    """Mean nats of each position, (C,) float64 on the CPU."""
    found = []
    for batch in tqdm(batches, desc="evaluation", leave=False):
        with accelerator.autocast():
            found.append(model(batch.labels.to(accelerator.device), batch.tokens.to(accelerator.device)))
    return torch.cat(found).cpu().double().mean(0)


def begin_folder(output_dir: Path, store: TokenStore, resume: bool, unfinished: bool) -> None:
    """Put the store's tokenizer beside the model to be, and take away what an earlier run said of its end."""
    folder = output_dir / "tokenizer"
    if folder.exists() and not resume:
        shutil.rmtree(folder)  # of a run that ended before its first checkpoint, perhaps with another tokenizer
    if not folder.exists():
        with folder_written_whole(folder) as temporary:
            shutil.copytree(store.tokenizer_folder, temporary, dirs_exist_ok=True)
    if unfinished:
        (output_dir / REPORT).unlink(missing_ok=True)
