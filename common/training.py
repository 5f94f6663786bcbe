"""The training loop that both models share: optimizers, EMA, checkpoints, exact resume, one process or many."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.checkpoint import write_text
from common.errors import InputError
from common.players import OPPONENT_BETAS, Opponent, Player, make_optimizer
from common.resuming import Checkpoints
from common.runtime import has_fast_bfloat16, peak_memory_of_process, pick_device
from common.steps import LoopConfig, Part, StepPlan, StepSampler, generator_for, learning_rate_at

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")
REPORT_EVERY = 20  # steps
# the main process evaluates while the others wait for it, perhaps for longer than the ten minutes that NCCL grants
PATIENCE = timedelta(hours=6)
UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# settings that a resumed run may change; with other `steps` the schedule is the new one from there on
MAY_CHANGE = frozenset(
    {"steps", "output_dir", "resume", "num_workers", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
    | {"data_dir", "tokens", "strict", "compile", "validation_images", "trackers"}
    | {"learning_rate", "min_learning_rate", "max_grad_norm"}  # to get a run that went astray past that place
)


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What a micro-batch gives.

    Attributes:
        terms: named scalars; "loss" is minimised by the model, the others are logged.
        opponent: the opponent -> its named scalars, of which "loss" is minimised by it; None while it rests.
    """

    terms: dict[str, Tensor]
    opponent: Callable[[nn.Module], dict[str, Tensor]] | None = None


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The accelerator that `accelerate launch` or a plain start describes; seeds the global generators.

    Raises:
        InputError: a tracker that accelerate does not know, or whose package is not installed, or a launcher's
            settings that would be ignored.
    """
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in config.trackers:
        if name not in known:
            raise InputError(f"tracker {name!r} is unknown; allowed: {', '.join(known)}")
        if name not in available:
            raise InputError(f"tracker {name} is not installed; pip install {name}, or leave it out of --trackers")
    chosen: str = config.mixed_precision
    if chosen == "auto":
        device = pick_device("cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else "auto")
        chosen = "bf16" if has_fast_bfloat16(device) else "no"
    torch.manual_seed(config.seed)
    folders = ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "trackers"))
    accelerator = Accelerator(
        mixed_precision=chosen,
        log_with=list(config.trackers) or None,
        project_config=folders,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.distributed_type in UNSUPPORTED:
        kind = accelerator.distributed_type.value
        raise InputError(
            f"accelerate is set up for {kind}, which this script does not know; launch it with --multi_gpu"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError("accelerate is set up to compile with dynamo; launch it without, and give --compile true")
    return accelerator


class Loop:
    """One training run: `Loop(...).run(...)` takes a model from its first or its resumed step to its last.

    Args:
        model: trained in place.
        config: the shared settings.
        accelerator: from `make_accelerator`.
        identity: everything else that must not change on a resume, JSON values.
        opponent: trained against the model in the steps whose loss gives it something to do.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoopConfig,
        accelerator: Accelerator,
        identity: dict[str, Any],
        opponent: Opponent | None = None,
    ):
        self.config, self.accelerator = config, accelerator
        self.settings: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE} | identity
        self.checkpoints = Checkpoints(config.output_dir, config.keep_checkpoints)
        self.log = Path(config.output_dir) / "log.jsonl"
        self.step = 0
        self.plan = StepPlan(config, accelerator.process_index, accelerator.num_processes)
        if not config.resume and self.checkpoints.all():
            raise InputError(
                f"{config.output_dir} holds a run already; add --resume to go on, or choose another folder"
            )
        if not config.resume and accelerator.is_main_process:
            self.log.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        betas = (config.beta1, config.beta2)
        self.player = self._player("", model, config.learning_rate, betas, config.weight_decay)
        self.opponent: Player | None = None
        if opponent is not None:
            self.opponent = self._player("opponent.", opponent.model, opponent.learning_rate, OPPONENT_BETAS, 0.0)
        self.ema = AveragedModel(self.player.bare, multi_avg_fn=self._average)
        self.ema.requires_grad_(False).eval()
        # true while all losses and gradients have been finite; stays on the device, so that no step waits for it
        self._healthy = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self._reported = (self.step, time.perf_counter())
        if config.resume:
            self._restore()

    def _player(
        self, prefix: str, model: nn.Module, rate: float, betas: tuple[float, float], weight_decay: float
    ) -> Player:
        prepared, optimizer = self.accelerator.prepare(model, make_optimizer(model, rate, betas, weight_decay))
        return Player(prefix, prepared, self.accelerator.unwrap_model(prepared), optimizer)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, with a gradient that is right after gradients were averaged."""
        if self.accelerator.num_processes == 1:
            return value
        own = self.accelerator.num_processes * value
        total: Tensor = self.accelerator.reduce(value.detach().clone(), "sum")
        return total.add(own - own.detach())

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean of `value` over all processes, without a gradient."""
        mean: Tensor = self.accelerator.reduce(value.detach().clone(), "mean")
        return mean

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        # the count is read where it is kept, on the CPU: the argument is a copy on the device, to be waited for.
        # a young average follows quickly, so that early evaluations show the model and not its start
        count = int(self.ema.n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(self.config.ema_decay, (1 + count) / (10 + count)))

    def _state(self) -> dict[str, Tensor]:
        state = self.player.state()
        state |= {f"ema.{name}": value for name, value in self.ema.module.named_parameters()}
        state["ema_updates"] = self.ema.n_averaged
        if self.opponent is not None:
            state |= self.opponent.state()
        return {name: value.detach() for name, value in state.items()}

    @torch.no_grad()
    def _restore(self) -> None:
        self.step, state = self.checkpoints.load(self.settings)
        if self.step > self.config.steps:
            raise InputError(f"{self.checkpoints.folder} is at step {self.step}; give steps of that or more to go on")
        everyone = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(everyone)) > 1:
            raise InputError(
                f"processes find different newest checkpoints in {self.checkpoints.folder} (steps {everyone}); "
                "output_dir must be one folder that all machines see alike"
            )
        self.player.restore(state)
        if self.opponent is not None:
            self.opponent.restore(state)
        for name, parameter in self.ema.module.named_parameters():
            parameter.copy_(state[f"ema.{name}"])
        self.ema.n_averaged.copy_(state["ema_updates"])
        if self.accelerator.is_main_process and self.log.is_file():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            write_text(self.log, "".join(kept))
        self._reported = (self.step, time.perf_counter())
        logger.info("resumed at step %d of %d", self.step, self.config.steps)

    def sampler(self, length: int) -> StepSampler:
        """The micro-batches that are still to come, for a data set of `length` entries."""
        return StepSampler(length, self.plan, self.step)

    def run(
        self,
        batches: Iterable[Batch],
        loss: Callable[[nn.Module, Batch, Part], StepLoss],
        evaluate: Callable[[Any, int], dict[str, Any]],
        export: Callable[[Any], None],
    ) -> None:
        """Train to the last step.

        Args:
            batches: the micro-batches that are left, from `sampler`.
            loss: (model, micro-batch, its place in the step) -> what is to be minimised.
            evaluate: (averaged model, step) -> figures for the log; also writes pictures. Main process only.
            export: (averaged model) -> writes the model for its users. Main process only.
        """
        config, accelerator = self.config, self.accelerator
        main = accelerator.is_main_process
        if config.trackers:
            accelerator.init_trackers("channeltok", config={k: str(v) for k, v in self.settings.items()})
        self.player.model.train()
        stream = iter(batches)
        with (
            logging_redirect_tqdm(),
            tqdm(total=config.steps, initial=self.step, unit="step", disable=not main, smoothing=0.05) as bar,
        ):
            while self.step < config.steps:
                self._step(stream, loss, bar)
                last = self.step == config.steps
                if main and (self.step % config.evaluate_every == 0 or last):
                    figures = evaluate(self.ema.module, self.step)
                    self._append({"step": self.step, "evaluation": figures})
                    self._track({f"evaluation/{name}": value for name, value in figures.items()})
                    export(self.ema.module)
                if main and (self.step % config.checkpoint_every == 0 or last):
                    self.checkpoints.save(self.step, self._state(), self.settings)
                if self.step % config.evaluate_every == 0 or self.step % config.checkpoint_every == 0:
                    accelerator.wait_for_everyone()
                    self._reported = (self.step, time.perf_counter())  # images/s is that of training alone
        accelerator.wait_for_everyone()
        accelerator.end_training()

    def _step(self, stream: Iterator[Batch], loss: Callable[[nn.Module, Batch, Part], StepLoss], bar: Any) -> None:
        config, accelerator = self.config, self.accelerator
        rate = learning_rate_at(self.step, config)
        for group in self.player.optimizer.param_groups:
            group["lr"] = rate
        parts = self.plan.parts(self.step)
        found: list[dict[str, Tensor]] = []
        for i, part in enumerate(parts):
            dropout = generator_for(config.seed, 4, self.step, accelerator.process_index, i)
            torch.manual_seed(int(torch.randint(2**62, (), generator=dropout)))
            with self._synchronised(i == len(parts) - 1):
                with accelerator.autocast():
                    result = loss(self.player.model, next(stream), part)
                accelerator.backward(result.terms["loss"] / len(parts))
                terms = dict(result.terms)
                if self.opponent is not None and result.opponent is not None:
                    with accelerator.autocast():
                        theirs = result.opponent(self.opponent.model)
                    accelerator.backward(theirs["loss"] / len(parts))
                    terms |= {f"opponent_{name}": value for name, value in theirs.items()}
            found.append({name: value.detach() for name, value in terms.items()})
        terms = {name: torch.stack([entry[name] for entry in found]).mean() for name in found[0]}
        self._update(self.player, terms["loss"])
        if "opponent_loss" in terms and self.opponent is not None:
            self._update(self.opponent, terms["opponent_loss"])
        self.ema.update_parameters(self.player.bare)
        self.step += 1
        bar.update()
        # a checkpoint or an export is never written of a run that has gone astray: the report looks first
        due = (REPORT_EVERY, config.checkpoint_every, config.evaluate_every)
        if self.step == config.steps or any(self.step % every == 0 for every in due):
            self._report(terms, rate, bar)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Let gradients be averaged over the processes in the last micro-batch of a step only."""
        with ExitStack() as stack:
            players = [self.player] + ([self.opponent] if self.opponent else [])
            for player in () if last else players:
                stack.enter_context(self.accelerator.no_sync(player.model))
            yield

    def _update(self, player: Player, loss: Tensor) -> None:
        norm = self.accelerator.clip_grad_norm_(player.bare.parameters(), self.config.max_grad_norm)
        self._healthy &= torch.isfinite(norm) & torch.isfinite(loss)
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)

    def _report(self, terms: dict[str, Tensor], rate: float, bar: Any) -> None:
        values = {name: self.accelerator.reduce(value, "mean").item() for name, value in terms.items()}
        if self.accelerator.reduce((~self._healthy).float(), "sum").item():
            raise InputError(self._last_words(values["loss"]))
        step, before = self._reported
        self._reported = (self.step, time.perf_counter())
        speed = (self.step - step) * self.config.batch_size / max(1e-9, self._reported[1] - before)
        if self.accelerator.is_main_process:
            shown = {name: f"{value:.3f}" for name, value in values.items()}
            memory = peak_memory_of_process(self.accelerator.device)
            bar.set_postfix({"images/s": f"{speed:.0f}", **({"GB": f"{memory / 1e9:.1f}"} if memory else {}), **shown})
            self._append({"step": self.step, "learning_rate": rate, **values})
            self._track({"learning_rate": rate, "images_per_second": speed, **values})

    def _last_words(self, loss: float) -> str:
        saved: Sequence[Path] = self.checkpoints.all()
        where = f"--resume goes on from {saved[-1]}" if saved else "there is no checkpoint yet, so start anew"
        return (
            f"a loss or a gradient has become infinite or NaN by step {self.step} (loss {loss:.4g}); {where}; "
            "take a lower learning_rate or max_grad_norm"
        )

    def _track(self, values: dict[str, Any]) -> None:
        if self.config.trackers:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self.accelerator.log({k: v for k, v in numbers.items() if math.isfinite(v)}, step=self.step)

    def _append(self, record: dict[str, Any]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
