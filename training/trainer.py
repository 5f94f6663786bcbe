"""The base class of all trainers: optimizers, EMA, checkpoints, exact resume, one process or many."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common import runtime
from common.config import InputError, LoopConfig
from common.files import exclusive_folder
from common.randomness import Stream, generator_for
from training.checkpoints import CARD, MAY_CHANGE, Checkpoints, RunLog, write_card
from training.distributed import make_accelerator, whole
from training.model_state import EMA, AuxiliaryModel, ModelState, StepLoss, make_optimizer
from training.schedule import Part, StepSampler, learning_rate_at, split_batch

logger = logging.getLogger(__name__)
REPORT_EVERY = 20  # steps
# in the folder of a run that was killed before its first checkpoint
BEFORE_CHECKPOINTS = {".lock", CARD, "log.jsonl", "refined", "reconstructions", "samples", "tokenizer"}


class Trainer:
    """A training run.

    A subclass calls `prepare` at the end of its `__init__` and implements `data`, `loss`, `evaluate` and `export`;
    `run` then trains to the last step.

    Raises:
        InputError: settings that cannot be used, a folder that is not empty without `resume`, or another writer of it.
    """

    def __init__(self, config: LoopConfig, *, can_shard: bool = False):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.checkpoints = Checkpoints(config.output_dir, config.keep_checkpoints)
        if not config.resume and any(path.name not in BEFORE_CHECKPOINTS for path in self.output_dir.glob("*")):
            raise InputError(f"{config.output_dir} is not empty; add --resume to continue, or choose another folder")
        self.log = RunLog(config.output_dir)
        self.accelerator = make_accelerator(config, can_shard=can_shard)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self._held = ExitStack()  # the output folder, in the main process
        if config.compile:
            runtime.check_can_compile(self.device)
        # on the CPU, so that no process waits for a GPU; the main process may evaluate or save for hours
        several = self.accelerator.num_processes > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=6)) if several else None

    def prepare(
        self,
        model: nn.Module,
        identity: dict[str, Any],
        auxiliary: Mapping[str, AuxiliaryModel] | None = None,
        rate_scales: Mapping[str, float] | None = None,
    ) -> None:
        """Make optimizers and the EMA, and load the newest checkpoint of a resumed run.

        Args:
            model: trained in place.
            identity: everything besides the shared settings that must not change on a resume, JSON values.
            auxiliary: further models by name, each updated in the steps whose `StepLoss.auxiliary` contains it.
            rate_scales: of the main model's optimizer, see `make_optimizer`.
        """
        config, accelerator = self.config, self.accelerator
        self.settings = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE} | identity
        self.step, self._saved = 0, -1
        self.parts = split_batch(config, accelerator.process_index, accelerator.num_processes)
        if config.compile:
            model.compile()
        averaged = copy.deepcopy(model) if self.is_main else None  # before it is wrapped or sharded
        # in the main process, or in all if each has a shard; read before accelerator.prepare, which may change the type
        has_average = self.is_main or accelerator.distributed_type == DistributedType.FSDP
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        optimizer = make_optimizer(model, config.learning_rate, betas, decay, rate_scales or {})
        self.main = ModelState("", model, optimizer, accelerator)
        self.auxiliary: dict[str, ModelState] = {}
        for name, extra in (auxiliary or {}).items():
            optimizer = make_optimizer(extra.model, extra.learning_rate, extra.betas, 0.0, {})
            self.auxiliary[name] = ModelState(f"{name}.", extra.model, optimizer, accelerator)
        # peak learning rates of those that follow the schedule
        self._peaks = {k: extra.learning_rate for k, extra in (auxiliary or {}).items() if extra.follows_schedule}
        self.average = EMA(averaged, self.main.bare, config.ema_decay) if has_average else None
        averages = [self.average] if self.average else []
        self._states: list[ModelState | EMA] = [self.main, *averages, *self.auxiliary.values()]
        # true while all losses and gradients have been finite; stays on the device, so that no step waits for it
        self._healthy = torch.ones((), dtype=torch.bool, device=self.device)
        self._loss = torch.zeros(())
        if config.resume:
            self._restore()
        if self.is_main:
            self._held.enter_context(exclusive_folder(self.output_dir))
            self.log.cut(self.step)
        if config.resume:
            logger.info("resumed at step %d of %d", self.step, config.steps)
        self._reported = (self.step, time.perf_counter())

    def data(self) -> tuple[Any, Any, Callable[[Any], Any]]:
        """Data sets to train on and held out, indexed by (index, epoch), and the function that makes a batch."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any, part: Part) -> StepLoss:
        """Losses of a micro-batch, the rows `part.rows` of the step's batch."""
        raise NotImplementedError

    def evaluate(self, averaged: Any, step: int) -> dict[str, Any]:
        """Figures of the averaged model for the log; also writes pictures. Runs in the main process, without grad."""
        raise NotImplementedError

    def keeps_evaluated(self) -> bool:
        """Whether the model that was just evaluated is to be written; in the main process."""
        return True

    def export(self, averaged: Any) -> None:
        """Write the averaged model for its users; in the main process."""
        raise NotImplementedError

    def finish(self) -> None:
        """Run after the last step, in the main process."""

    def held_loader(self, count: int, size: int, num_workers: int) -> DataLoader[Any]:
        """At most `count` evenly spaced entries of the held-out data, always the same, in batches of `size`."""
        _, held, collate = self.data()
        count = min(count, len(held))
        chosen = [(i * len(held) // count, 0) for i in range(count)]
        return self._loader(held, [chosen[i : i + size] for i in range(0, count, size)], collate, num_workers)

    def _loader(self, data: Any, batches: Any, collate: Callable[[Any], Any], num_workers: int) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_sampler=batches,
            num_workers=num_workers,
            worker_init_fn=runtime.leave_signals_to_the_trainer,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, with a gradient that is right after gradients were averaged."""
        if self.accelerator.num_processes == 1:
            return value
        own = self.accelerator.num_processes * value
        total: Tensor = self.accelerator.reduce(value.detach().clone(), "sum")
        return total.add(own - own.detach())

    def any_process(self, asked: bool) -> bool:
        """Return whether it is true in any process; all processes must call and wait for each other."""
        if self._group is None:
            return asked
        flag = torch.tensor(float(asked))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def run(self) -> None:
        """Train to the last step, or until SIGTERM or Ctrl-C, after which a checkpoint is written."""
        config, accelerator = self.config, self.accelerator
        if config.trackers:
            accelerator.init_trackers("channeltok", config={k: str(v) for k, v in self.settings.items()})
        self.main.model.train()
        train, _, collate = self.data()
        sampler = StepSampler(len(train), config, self.parts, self.step)
        stream = iter(self._loader(train, sampler, collate, config.num_workers))
        with (
            runtime.StopOnSignal(ignore_repeats=accelerator.num_processes > 1) as stop,
            logging_redirect_tqdm(),
            tqdm(total=config.steps, initial=self.step, unit="step", disable=not self.is_main, smoothing=0.05) as bar,
        ):
            # a resumed run repeats an evaluation that was interrupted
            self._evaluate_if_due(stop)
            while not self.any_process(stop.requested) and self.step < config.steps:
                self._step(stream, bar)
                self._evaluate_if_due(stop)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._save()
                    self._reported = (self.step, time.perf_counter())  # images/s is that of training alone
            # none may end before all have saved
            if self.any_process(stop.requested):
                self._check_health()
                self._save()
                steps = self.step, config.steps
                logger.warning("stopped at step %d of %d, which is saved; continue with --resume", *steps)
            elif self.is_main:
                self.finish()
            self.any_process(False)
        self._held.close()
        accelerator.end_training()

    def _step(self, stream: Iterator[Any], bar: Any) -> None:
        config, accelerator = self.config, self.accelerator
        rate = learning_rate_at(self.step, config)
        self.main.set_learning_rate(rate)
        for name, peak in self._peaks.items():
            self.auxiliary[name].set_learning_rate(peak * rate / config.learning_rate)
        found: list[dict[str, Tensor]] = []
        for i, rows in enumerate(self.parts):
            part = Part(seed=config.seed, step=self.step, rows=rows, batch_size=config.batch_size)
            dropout = generator_for(config.seed, Stream.DROPOUT, self.step, accelerator.process_index, i)
            torch.manual_seed(int(torch.randint(2**62, (), generator=dropout)))
            with ExitStack() as stack:
                if i < len(self.parts) - 1:  # gradients are averaged over the processes in the last micro-batch only
                    for state in (self.main, *self.auxiliary.values()):
                        stack.enter_context(accelerator.no_sync(state.model))
                found.append(self._backward(next(stream), part))
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
        # reported before a checkpoint or an export, so that these are never written with NaN
        due = (REPORT_EVERY, config.checkpoint_every, config.evaluate_every)
        if self.step == config.steps or any(self.step % every == 0 for every in due):
            self._report(terms, rate, bar)

    def _backward(self, batch: Any, part: Part) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch, and return its figures."""
        with self.accelerator.autocast():
            result = self.loss(self.main.model, batch, part)
        self.accelerator.backward(result.terms["loss"] / len(self.parts))
        terms = dict(result.terms)
        for name, auxiliary_loss in result.auxiliary.items():
            with self.accelerator.autocast():
                auxiliary_terms = auxiliary_loss(self.auxiliary[name].model)
            self.accelerator.backward(auxiliary_terms["loss"] / len(self.parts))
            terms |= {f"{name}_{term}": value for term, value in auxiliary_terms.items()}
        return {name: value.detach() for name, value in terms.items()}

    def _update(self, state: ModelState, loss: Tensor) -> None:
        norm = whole(nn.utils.clip_grad_norm_(state.bare.parameters(), self.config.max_grad_norm))
        self._healthy &= torch.isfinite(norm) & torch.isfinite(loss)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)

    def _evaluate_if_due(self, stop: runtime.StopOnSignal) -> None:
        """Evaluate and export after every `evaluate_every` steps and the last; interrupted by a signal."""
        if self.step == 0 or (self.step % self.config.evaluate_every and self.step != self.config.steps):
            return
        averaged = self.average.model() if self.average is not None else None
        if self.is_main and self.step not in self.log.evaluations():
            try:
                with stop.interrupting(), torch.no_grad():
                    figures = self.evaluate(averaged, self.step)
                    if self.keeps_evaluated():
                        self.export(averaged)
                        write_card(self.output_dir, type(self).__name__, self.step, self.settings, figures)
                self.log.append({"step": self.step, "evaluation": figures})
                self._track({f"evaluation/{name}": value for name, value in figures.items()})
            except runtime.Interrupted:
                logger.warning("the evaluation at step %d was interrupted; --resume repeats it", self.step)
        if self.average is not None:
            self.average.release()
        self.any_process(False)
        self._reported = (self.step, time.perf_counter())

    def _report(self, terms: dict[str, Tensor], rate: float, bar: Any) -> None:
        values = {name: self.accelerator.reduce(value, "mean").item() for name, value in terms.items()}
        self._check_health()
        (step, before), now = self._reported, time.perf_counter()
        self._reported = (self.step, now)
        if self.is_main:
            speed = (self.step - step) * self.config.batch_size / (now - before)
            shown = {"images/s": f"{speed:,.0f}" if speed >= 1 else f"{speed:.3g}"}
            shown["GB"] = f"{runtime.peak_memory_of_process(self.device) / 1e9:.1f}"
            bar.set_postfix({**shown, **{name: f"{value:.3f}" for name, value in values.items()}})
            self.log.append({"step": self.step, "learning_rate": rate, **values})
            self._track({"learning_rate": rate, "images_per_second": speed, **values})

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

    @torch.no_grad()
    def _save(self) -> None:
        """Write a checkpoint; all processes must call, so that shards are gathered in the main one."""
        if self._saved == self.step:
            return
        self._saved = self.step
        state: dict[str, Tensor] = {}
        for name, value in chain.from_iterable(part.state() for part in self._states):
            full = whole(value)
            if self.is_main:
                state[name] = full.cpu()
        if self.is_main:
            self.checkpoints.save(self.step, state, self.settings)
        self.any_process(False)

    @torch.no_grad()
    def _restore(self) -> None:
        self.step, state = self.checkpoints.load(self.settings)
        if self.step > self.config.steps:
            raise InputError(f"{self.checkpoints.folder} is at step {self.step}; give at least as many steps")
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.device)).tolist()
        if len(set(steps)) > 1:
            raise InputError(f"machines find checkpoints of different steps {steps}; they must share output_dir")
        self._saved = self.step
        try:
            for part in self._states:
                part.restore(state)
        except KeyError as error:
            raise InputError(f"the checkpoint has no tensor {error}; remove it to resume from an older one") from error
