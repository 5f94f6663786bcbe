"""The training loop that all models share: optimizers, EMA, checkpoints, exact resume, one process or many."""

import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.config import LoopConfig
from common.errors import InputError
from common.randomness import Stream, generator_for
from common.runtime import Interrupted, StopOnSignal, peak_memory_of_process
from training.checkpoints import Checkpoints
from training.distributed import Processes, whole
from training.log import JsonlLog
from training.model_state import EMA, AuxiliaryModel, ModelState, State, make_optimizer
from training.schedule import Part, StepPlan, StepSampler, learning_rate_at

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")
REPORT_EVERY = 20  # steps
# settings that a resumed run may change; with other `steps` the schedule is the new one from there on
MAY_CHANGE = frozenset(
    {"steps", "output_dir", "resume", "num_workers", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
    | {"data_dir", "tokens", "tokenizer", "class_names", "strict", "compile", "validation_images", "trackers"}
    | {"gradient_checkpointing", "micro_batch_size", "save_dtype", "init_from"}
    | {"learning_rate", "min_learning_rate", "max_grad_norm"}  # to get a run that went astray past that place
)


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """Losses of a micro-batch.

    Attributes:
        terms: named scalars; "loss" is minimised by the model, the others are logged.
        auxiliary: for each auxiliary model that is updated in this step, by name: the model -> its named scalars, of
            which it minimises "loss"; all are logged with the model's name in front.
    """

    terms: dict[str, Tensor]
    auxiliary: Mapping[str, Callable[[nn.Module], dict[str, Tensor]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunTasks:
    """What the main process does beside training: look at the averaged model, and write it for its users.

    Attributes:
        evaluate: (averaged model, step) -> figures for the log; also writes pictures.
        export: (averaged model) -> writes the model for its users.
        finish: called after the last step.
        speed: images a second over all processes -> figures for the progress bar and the trackers.
    """

    evaluate: Callable[[Any, int], dict[str, Any]]
    export: Callable[[Any], None]
    finish: Callable[[], None] = lambda: None
    speed: Callable[[float], dict[str, float]] = lambda rate: {"images_per_second": rate}


def check_output_dir(config: LoopConfig) -> None:
    """Refuse, by an `InputError`, to start a run in a folder with checkpoints unless `resume` is set."""
    if not config.resume and Checkpoints(config.output_dir, config.keep_checkpoints).all():
        raise InputError(f"{config.output_dir} contains a run; add --resume to continue it, or choose another folder")


class Loop:
    """One training run: `Loop(...).run(...)` takes a model from its first or its resumed step to its last.

    Args:
        model: trained in place.
        config: the shared settings.
        accelerator: from `make_accelerator`.
        identity: everything else that must not change on a resume, JSON values.
        auxiliary: further models by name, each updated in the steps whose `StepLoss.auxiliary` contains it.
        rate_scales: of the main model's optimizer, see `make_optimizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoopConfig,
        accelerator: Accelerator,
        identity: dict[str, Any],
        auxiliary: Mapping[str, AuxiliaryModel] | None = None,
        rate_scales: Mapping[str, float] | None = None,
    ):
        self.config, self.accelerator = config, accelerator
        self.settings: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE} | identity
        self.checkpoints = Checkpoints(config.output_dir, config.keep_checkpoints)
        self.log = JsonlLog(config.output_dir)
        self.step, self._saved = 0, -1
        self.images_per_second = math.nan  # mean over this session's reports, without the first one if there are more
        self.plan = StepPlan(config, accelerator.process_index, accelerator.num_processes)
        check_output_dir(config)
        if not config.resume and accelerator.is_main_process:
            self.log.begin()
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        averaged = copy.deepcopy(model) if accelerator.is_main_process else None  # before it is wrapped or sharded
        rate, betas, decay = config.learning_rate, (config.beta1, config.beta2), config.weight_decay
        self.main = self._prepare("", model, rate, betas, decay, rate_scales or {})
        self.auxiliary: dict[str, ModelState] = {}
        self._scheduled_rates: dict[str, float] = {}  # peak learning rates of those that follow the schedule
        for name, extra in (auxiliary or {}).items():
            self.auxiliary[name] = self._prepare(f"{name}.", extra.model, extra.learning_rate, extra.betas, 0.0, {})
            if extra.follows_schedule:
                self._scheduled_rates[name] = extra.learning_rate
        self.average: EMA | None = None  # kept where it is looked at, or by all who hold a shard
        if averaged is not None or self.sharded:
            self.average = EMA(averaged, self.main.bare, config.ema_decay, sharded=self.sharded)
        # true while all losses and gradients have been finite; stays on the device, so that no step waits for it
        self._healthy = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self._loss = torch.zeros(())
        self._processes = Processes(accelerator)
        self._windows: list[tuple[int, float]] = []  # steps and seconds between reports
        if config.resume:
            self._restore()
        self._reported = (self.step, time.perf_counter())

    def _prepare(
        self,
        prefix: str,
        model: nn.Module,
        rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        rate_scales: Mapping[str, float],
    ) -> ModelState:
        optimizer = make_optimizer(model, rate, betas, weight_decay, rate_scales)
        prepared, optimizer = self.accelerator.prepare(model, optimizer)
        return ModelState(prefix, prepared, self.accelerator.unwrap_model(prepared), optimizer)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, with a gradient that is right after gradients were averaged."""
        if self.accelerator.num_processes == 1:
            return value
        own = self.accelerator.num_processes * value
        total: Tensor = self.accelerator.reduce(value.detach().clone(), "sum")
        return total.add(own - own.detach())

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean of `value` over all processes, without a gradient."""
        return torch.as_tensor(self.accelerator.reduce(value.detach().clone(), "mean"))

    def _parts(self) -> list[ModelState | EMA]:
        return [self.main, *([self.average] if self.average else []), *self.auxiliary.values()]

    def _state(self) -> State:
        return (entry for part in self._parts() for entry in part.state())

    @torch.no_grad()
    def _save(self) -> None:
        """Write a checkpoint; all processes must call, so that shards come together in the main one."""
        if self._saved == self.step:
            return
        self._saved = self.step
        state: dict[str, Tensor] = {}
        if self.sharded:
            for name, value in self._state():
                full = whole(value)
                if self.accelerator.is_main_process:
                    state[name] = full.cpu()
        elif self.accelerator.is_main_process:
            state |= self._state()
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.step, state, self.settings)
        self._processes.wait()

    @torch.no_grad()
    def _restore(self) -> None:
        self.step, state = self.checkpoints.load(self.settings)
        if self.step > self.config.steps:
            raise InputError(f"{self.checkpoints.folder} is at step {self.step}; give at least as many steps")
        everyone = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(everyone)) > 1:
            raise InputError(
                f"processes find different newest checkpoints in {self.checkpoints.folder} (steps {everyone}); "
                "output_dir must be one folder that all machines see alike"
            )
        self._saved = self.step
        for part in self._parts():
            part.restore(state)
        if self.accelerator.is_main_process:
            self.log.cut(self.step)
        logger.info("resumed at step %d of %d", self.step, self.config.steps)

    def sampler(self, length: int) -> StepSampler:
        """The micro-batches that are still to come, for a data set of `length` entries."""
        return StepSampler(length, self.plan, self.step)

    def run(
        self, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch, Part], StepLoss], tasks: RunTasks
    ) -> None:
        """Train to the last step, or until the process is asked to stop (SIGTERM, Ctrl-C): then a checkpoint is left.

        Args:
            batches: the micro-batches that are left, from `sampler`.
            loss: (model, micro-batch, its place in the step) -> what is to be minimised.
            tasks: evaluation, export and the like.
        """
        config, accelerator = self.config, self.accelerator
        main = accelerator.is_main_process
        if config.trackers:
            accelerator.init_trackers("channeltok", config={k: str(v) for k, v in self.settings.items()})
        self.main.model.train()
        stream = iter(batches)
        with (
            StopOnSignal(signal.SIGTERM, signal.SIGINT, patient=accelerator.num_processes > 1) as stop,
            logging_redirect_tqdm(),
            tqdm(total=config.steps, initial=self.step, unit="step", disable=not main, smoothing=0.05) as bar,
        ):
            # the evaluation of the step that a run was resumed at, where that was cut short
            self._evaluate_if_due(tasks, stop)
            while not self._processes.any(stop.requested) and self.step < config.steps:
                self._step(stream, loss, tasks, bar)
                self._evaluate_if_due(tasks, stop)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._save()
                    self._reported = (self.step, time.perf_counter())  # images/s is that of training alone
            # signals to other processes may still come: none of them may end before all have saved
            if self._processes.any(stop.requested):
                self._check_health()
                self._save()
                logger.warning(
                    "stopped at step %d of %d, which is saved; continue with --resume", self.step, config.steps
                )
            elif main:
                tasks.finish()
            self._processes.wait()
        accelerator.end_training()

    def _step(
        self, stream: Iterator[Batch], loss: Callable[[nn.Module, Batch, Part], StepLoss], tasks: RunTasks, bar: Any
    ) -> None:
        config, accelerator = self.config, self.accelerator
        rate = learning_rate_at(self.step, config)
        self.main.set_learning_rate(rate)
        for name, peak in self._scheduled_rates.items():
            self.auxiliary[name].set_learning_rate(peak * rate / config.learning_rate)
        parts = self.plan.parts(self.step)
        found: list[dict[str, Tensor]] = []
        for i, part in enumerate(parts):
            dropout = generator_for(config.seed, Stream.DROPOUT, self.step, accelerator.process_index, i)
            torch.manual_seed(int(torch.randint(2**62, (), generator=dropout)))
            with self._synchronised(i == len(parts) - 1):
                with accelerator.autocast():
                    result = loss(self.main.model, next(stream), part)
                accelerator.backward(result.terms["loss"] / len(parts))
                terms = dict(result.terms)
                for name, auxiliary_loss in result.auxiliary.items():
                    with accelerator.autocast():
                        auxiliary_terms = auxiliary_loss(self.auxiliary[name].model)
                    accelerator.backward(auxiliary_terms["loss"] / len(parts))
                    terms |= {f"{name}_{term}": value for term, value in auxiliary_terms.items()}
            found.append({name: value.detach() for name, value in terms.items()})
        terms = {name: torch.stack([entry[name] for entry in found]).mean() for name in found[0]}
        self._loss = terms["loss"]
        self._update(self.main, terms["loss"])
        for name, state in self.auxiliary.items():
            if f"{name}_loss" in terms:
                self._update(state, terms[f"{name}_loss"])
        if self.average is not None:
            self.average.update()
        self.step += 1
        bar.update()
        # a checkpoint or an export is never written of a run that has gone astray: the report looks first
        due = (REPORT_EVERY, config.checkpoint_every, config.evaluate_every)
        if self.step == config.steps or any(self.step % every == 0 for every in due):
            self._report(terms, rate, tasks, bar)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Let gradients be averaged over the processes in the last micro-batch of a step only."""
        with ExitStack() as stack:
            for state in () if last else (self.main, *self.auxiliary.values()):
                stack.enter_context(self.accelerator.no_sync(state.model))
            yield

    def _update(self, state: ModelState, loss: Tensor) -> None:
        norm = whole(nn.utils.clip_grad_norm_(state.bare.parameters(), self.config.max_grad_norm))
        self._healthy &= torch.isfinite(norm) & torch.isfinite(loss)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)

    def _evaluate_if_due(self, tasks: RunTasks, stop: StopOnSignal) -> None:
        """Evaluate and export after every `evaluate_every` steps and the last; given up where the run is to stop."""
        if self.step == 0 or (self.step % self.config.evaluate_every and self.step != self.config.steps):
            return
        averaged = self.average.model() if self.average is not None else None
        if self.accelerator.is_main_process and self.step not in self.log.evaluations():
            try:
                with stop.interrupting():
                    figures = tasks.evaluate(averaged, self.step)
                    tasks.export(averaged)
                self.log.append({"step": self.step, "evaluation": figures})
                self._track({f"evaluation/{name}": value for name, value in figures.items()})
            except Interrupted:
                logger.warning("the evaluation at step %d was given up; --resume makes up for it", self.step)
        if self.average is not None:
            self.average.release()
        self._processes.wait()
        self._reported = (self.step, time.perf_counter())

    def _report(self, terms: dict[str, Tensor], rate: float, tasks: RunTasks, bar: Any) -> None:
        values = {name: self.accelerator.reduce(value, "mean").item() for name, value in terms.items()}
        self._check_health()
        step, before = self._reported
        self._reported = (self.step, time.perf_counter())
        self._windows.append((self.step - step, self._reported[1] - before))
        # the first one has compilation and the start of the workers in it
        counted = self._windows[1:] or self._windows
        self.images_per_second = self.config.batch_size * sum(n for n, _ in counted) / sum(s for _, s in counted)
        if self.accelerator.is_main_process:
            speed = tasks.speed(self._windows[-1][0] * self.config.batch_size / self._windows[-1][1])
            shown = {
                name.replace("_per_second", "/s"): f"{value:.3g}" if value < 1 else f"{value:,.0f}"
                for name, value in speed.items()
            }
            if memory := peak_memory_of_process(self.accelerator.device):
                shown["GB"] = f"{memory / 1e9:.1f}"
            bar.set_postfix({**shown, **{name: f"{value:.3f}" for name, value in values.items()}})
            self.log.append({"step": self.step, "learning_rate": rate, **values})
            self._track({"learning_rate": rate, **speed, **values})

    def _check_health(self) -> None:
        if not self.accelerator.reduce((~self._healthy).float(), "sum").item():
            return
        saved = self.checkpoints.all()
        where = f"--resume continues from {saved[-1]}" if saved else "there is no checkpoint yet, so start again"
        raise InputError(
            f"a loss or a gradient has become infinite or NaN by step {self.step} (loss {self._loss.item():.4g}); "
            f"{where}; take a lower learning_rate or max_grad_norm"
        )

    def _track(self, values: dict[str, Any]) -> None:
        if self.config.trackers:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
            self.accelerator.log(numbers, step=self.step)
