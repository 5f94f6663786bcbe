"""The training loop that both models share: data order, schedule, EMA, checkpoints, exact resume.

Everything random is a function of (seed, step, process), and the data order one of (seed, epoch), so a
run that is killed and resumed goes through the same numbers as one that never stopped; no state of any
random generator is kept.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Sampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.checkpoint import folder_written_whole, load_tensors, read_json, save_tensors, write_text
from common.errors import InputError
from common.runtime import has_fast_bfloat16, pick_device

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")
REPORT_EVERY = 20  # steps
# settings that a resumed run may change; with other `steps` the schedule is the new one from there on
MAY_CHANGE = frozenset(
    {"steps", "output_dir", "resume", "num_workers", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
    | {"data_dir", "tokens", "strict", "compile", "validation_images"}
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings that both training scripts share. A step is one optimizer step over `batch_size` images."""

    output_dir: str = field(metadata={"help": "folder for the model, checkpoints, pictures and log.jsonl"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in output_dir"})
    steps: int = field(default=100_000, metadata={"help": "optimizer steps in all"})
    batch_size: int = field(default=256, metadata={"help": "images a step, over all processes together"})
    learning_rate: float = field(default=4e-4, metadata={"help": "peak learning rate"})
    min_learning_rate: float = field(default=0.0, metadata={"help": "learning rate at the last step"})
    warmup_steps: int = field(default=1000, metadata={"help": "steps of linear warm-up, before the cosine"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay, on matrices only"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW beta1"})
    beta2: float = field(default=0.95, metadata={"help": "AdamW beta2"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.9999, metadata={"help": "decay of the averaged weights; 0 = the last ones"})
    mixed_precision: Literal["auto", "no", "bf16"] = field(
        default="auto", metadata={"help": "auto = bf16 where the device computes it in hardware"}
    )
    seed: int = field(default=0, metadata={"help": "decides initial weights, data order and every draw"})
    num_workers: int = field(default=1, metadata={"help": "processes that read data, for each training process"})
    evaluate_every: int = field(default=1000, metadata={"help": "steps between evaluations, each with a picture"})
    checkpoint_every: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of the newest checkpoints stay"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("min_learning_rate", "warmup_steps", "weight_decay", "num_workers", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up to the peak, then half a cosine down to the minimum at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    swing = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + swing * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def generator_for(*key: int) -> torch.Generator:
    """A CPU random generator that is a function of these numbers alone."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


class StepSampler(Sampler[list[tuple[int, int]]]):
    """This process's share of each step's batch, as (index, epoch) pairs.

    The stream of all epochs' permutations is cut into steps of `batch_size`; process r of n takes each
    n-th entry from r on. So the order depends on (seed, epoch, position) only: not on the number of
    processes, and not on where a run was resumed.
    """

    def __init__(self, length: int, config: LoopConfig, first_step: int, rank: int, world_size: int):
        if config.batch_size % world_size:
            raise InputError(f"batch_size {config.batch_size} does not divide among {world_size} processes")
        self.length, self.config = length, config
        self.first_step, self.rank, self.world_size = first_step, rank, world_size

    def __len__(self) -> int:
        return self.config.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.config.batch_size
        current, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.first_step, self.config.steps):
            share: list[tuple[int, int]] = []
            for position in range(step * size + self.rank, (step + 1) * size, self.world_size):
                epoch, offset = divmod(position, self.length)
                if epoch != current:
                    current = epoch
                    order = torch.randperm(self.length, generator=generator_for(self.config.seed, 1, epoch))
                share.append((int(order[offset]), epoch))
            yield share


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The accelerator that `accelerate launch` or a plain start describes; seeds the global generators."""
    chosen: str = config.mixed_precision
    if chosen == "auto":
        chosen = "bf16" if has_fast_bfloat16(pick_device("auto")) else "no"
    torch.manual_seed(config.seed)
    return Accelerator(mixed_precision=chosen)


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        # a young average follows quickly, so that early evaluations show the model and not its start
        now = min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        torch._foreach_lerp_(averaged, current, 1 - now)

    return update


def _make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


class Checkpoints:
    """The folders checkpoints/step-NNNNNNNN of a run; each is complete or absent."""

    def __init__(self, output_dir: str | Path, keep: int):
        self.folder = Path(output_dir) / "checkpoints"
        self.keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))

    def save(self, step: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        """Write the state after `step` steps and remove those beyond the newest `keep`."""
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return
        with folder_written_whole(path) as temporary:
            save_tensors(temporary / "training.safetensors", tensors)
            write_text(temporary / "training.json", json.dumps({"step": step, "settings": settings}, indent=1))
        for partial in self.folder.glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)

    def load(self, settings: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
        """The newest state; its settings must be those of this run."""
        found = self.all()
        if not found:
            raise InputError(f"nothing to resume in {self.folder}; leave --resume away to start anew")
        record = read_json(found[-1] / "training.json")
        for name, value in settings.items():
            if record["settings"].get(name) != value:
                raise InputError(
                    f"{found[-1]} was trained with {name} = {record['settings'].get(name)}, now it is {value}; "
                    "resume with the same settings or choose another output_dir"
                )
        return record["step"], load_tensors(found[-1] / "training.safetensors")


class Loop:
    """One training run: `Loop(...).run(...)` takes a model from its first or its resumed step to its last.

    Args:
        model: trained in place.
        config: the shared settings.
        accelerator: from `make_accelerator`.
        identity: everything else that must not change on a resume, JSON values.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, accelerator: Accelerator, identity: dict[str, Any]):
        self.config, self.accelerator = config, accelerator
        self.settings: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE} | identity
        self.checkpoints = Checkpoints(config.output_dir, config.keep_checkpoints)
        self.log = Path(config.output_dir) / "log.jsonl"
        self.step = 0
        if not config.resume and self.checkpoints.all():
            raise InputError(
                f"{config.output_dir} holds a run already; add --resume to go on, or choose another folder"
            )
        optimizer = _make_optimizer(model, config)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        self.ema = AveragedModel(self.bare, multi_avg_fn=_average(config.ema_decay))
        self.ema.requires_grad_(False).eval()
        if config.resume:
            self._restore()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.bare.named_parameters())

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {f"model.{name}": value for name, value in self._parameters().items()}
        state |= {f"ema.{name}": value for name, value in self.ema.module.named_parameters()}
        state["ema_updates"] = self.ema.n_averaged
        moments = self.optimizer.state
        for name, parameter in self._parameters().items():
            state |= {f"optimizer.{name}.{key}": value for key, value in moments[parameter].items()}
        return {name: value.detach() for name, value in state.items()}

    @torch.no_grad()
    def _restore(self) -> None:
        self.step, state = self.checkpoints.load(self.settings)
        if self.step > self.config.steps:
            raise InputError(f"{self.checkpoints.folder} is at step {self.step}; give steps of that or more to go on")
        averaged: dict[str, Tensor] = dict(self.ema.module.named_parameters())
        for name, parameter in self._parameters().items():
            parameter.copy_(state[f"model.{name}"])
            averaged[name].copy_(state[f"ema.{name}"])
            # fused AdamW keeps all of its state beside the parameter
            self.optimizer.state[parameter] = {
                key: state[f"optimizer.{name}.{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.ema.n_averaged.copy_(state["ema_updates"])
        if self.accelerator.is_main_process and self.log.is_file():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            write_text(self.log, "".join(kept))
        logger.info("resumed at step %d of %d", self.step, self.config.steps)

    def sampler(self, length: int) -> StepSampler:
        """The batches that are still to come, for a data set of `length` entries."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return StepSampler(length, self.config, self.step, rank, world_size)

    def run(
        self,
        batches: Iterable[Batch],
        loss: Callable[[nn.Module, Batch, torch.Generator], dict[str, Tensor]],
        evaluate: Callable[[Any, int], dict[str, Any]],
        export: Callable[[Any], None],
    ) -> None:
        """Train to the last step.

        Args:
            batches: one for each step that is left, from `sampler`.
            loss: (model, batch, rng) -> named scalars; "loss" is minimised, the others are logged.
            evaluate: (averaged model, step) -> figures for the log; also writes pictures. Main process only.
            export: (averaged model) -> writes the model for its users. Main process only.
        """
        config, accelerator = self.config, self.accelerator
        main = accelerator.is_main_process
        self.model.train()
        with (
            logging_redirect_tqdm(),
            tqdm(total=config.steps, initial=self.step, unit="step", disable=not main, smoothing=0.05) as bar,
        ):
            for batch in batches:
                self._step(batch, loss, bar)
                last = self.step == config.steps
                if main and (self.step % config.evaluate_every == 0 or last):
                    self._append({"step": self.step, "evaluation": evaluate(self.ema.module, self.step)})
                    export(self.ema.module)
                if main and (self.step % config.checkpoint_every == 0 or last):
                    self.checkpoints.save(self.step, self._state(), self.settings)
                if self.step % config.evaluate_every == 0 or self.step % config.checkpoint_every == 0:
                    accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()
        accelerator.end_training()

    def _step(
        self, batch: Batch, loss: Callable[[nn.Module, Batch, torch.Generator], dict[str, Tensor]], bar: Any
    ) -> None:
        config, accelerator = self.config, self.accelerator
        rate = learning_rate_at(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = generator_for(config.seed, 2, self.step, accelerator.process_index)
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))  # dropout inside the model
        with accelerator.autocast():
            terms = loss(self.model, batch, rng)
        accelerator.backward(terms["loss"])
        accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.bare)
        self.step += 1
        bar.update()
        # a checkpoint or an export is never written of a run that has gone astray: the report looks first
        due = (REPORT_EVERY, config.checkpoint_every, config.evaluate_every)
        if self.step == config.steps or any(self.step % every == 0 for every in due):
            self._report(terms, rate, bar)

    def _report(self, terms: dict[str, Tensor], rate: float, bar: Any) -> None:
        values = {name: self.accelerator.reduce(value.detach(), "mean").item() for name, value in terms.items()}
        if not math.isfinite(values["loss"]):
            raise InputError(
                f"the loss is {values['loss']} at step {self.step}; lower learning_rate and --resume "
                "from the last checkpoint"
            )
        if self.accelerator.is_main_process:
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            self._append({"step": self.step, "learning_rate": rate, **values})

    def _append(self, record: dict[str, Any]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
