"""What happens at which step of a run: settings, schedule, data order, draws.

Everything random is a function of (seed, step), and the data order one of (seed, epoch), so a run that is
killed and resumed, or that is spread over more processes, goes through the same numbers as one that is not;
no state of any random generator is kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from common.config import LoopConfig
from common.errors import InputError
from common.randomness import Stream, generator_for


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up to the peak; from there on the peak, or half a cosine down to the minimum at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    swing = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + swing * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One micro-batch of a step: which rows of the step's whole batch this process has before it.

    What is random about a row is drawn for the whole batch and the rows are picked from it, so that it
    depends on neither the number of processes nor the size of a micro-batch.
    """

    seed: int
    step: int
    rows: range
    batch_size: int

    def drops(self, share: float, stream: Stream = Stream.STEP) -> Tensor:
        """For each of `rows` whether something is dropped, with probability `share`: bool, on the CPU."""
        return torch.rand(self.batch_size, generator=self.rng(stream))[list(self.rows)] < share

    def rng(self, stream: Stream = Stream.STEP) -> torch.Generator:
        """A fresh CPU generator, the same for all parts of a step: draw `batch_size` rows, then pick `rows`."""
        return generator_for(self.seed, stream, self.step)


class StepPlan:
    """How a step's batch is shared: process r of n takes each n-th row from r on, in micro-batches.

    Raises:
        InputError: a batch that does not divide among the processes, or their shares into micro-batches.
    """

    def __init__(self, config: LoopConfig, rank: int, world_size: int):
        share, rest = divmod(config.batch_size, world_size)
        if rest:
            raise InputError(f"batch_size {config.batch_size} does not divide among {world_size} processes")
        micro = min(config.micro_batch_size or share, share)
        if share % micro:
            raise InputError(
                f"micro_batch_size {micro} does not divide the {share} images of a process "
                f"(batch_size {config.batch_size}, {world_size} processes)"
            )
        rows = range(rank, config.batch_size, world_size)
        self.config = config
        self.shares = [rows[start : start + micro] for start in range(0, share, micro)]

    def parts(self, step: int) -> list[Part]:
        """This process's micro-batches of a step."""
        seed, size = self.config.seed, self.config.batch_size
        return [Part(seed=seed, step=step, rows=rows, batch_size=size) for rows in self.shares]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """This process's micro-batches of all steps to come, as lists of (index, epoch).

    The stream of all epochs' permutations is cut into steps of `batch_size` rows. So the order depends on
    (seed, epoch, position) only: not on the number of processes, and not on where a run was resumed.
    """

    def __init__(self, length: int, plan: StepPlan, first_step: int):
        self.length, self.plan, self.first_step = length, plan, first_step

    def __len__(self) -> int:
        return (self.plan.config.steps - self.first_step) * len(self.plan.shares)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        config = self.plan.config
        shares = [np.asarray(rows, dtype=np.int64) for rows in self.plan.shares]
        current, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, config.steps):
            for rows in shares:
                epochs, offsets = np.divmod(step * config.batch_size + rows, self.length)
                indices = np.empty_like(offsets)
                for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                    if epoch != current:
                        current = epoch
                        rng = generator_for(config.seed, Stream.ORDER, epoch)
                        order = torch.randperm(self.length, generator=rng).numpy()
                    there = epochs == epoch
                    indices[there] = order[offsets[there]]
                yield list(zip(indices.tolist(), epochs.tolist(), strict=True))
