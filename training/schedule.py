"""What happens at which step of a run: learning rate, data order, random draws.

Everything random is a function of (seed, step), and the data order one of (seed, epoch), so a run that is killed and
resumed, or spread over more processes, sees the same numbers; no state of a random generator is kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from common.config import InputError, LoopConfig
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
    """One micro-batch of a step: the rows of the step's whole batch that this process has in it.

    Random numbers are drawn for the whole batch and `rows` picked from them, so that they depend on neither the number
    of processes nor the size of a micro-batch.
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


def split_batch(config: LoopConfig, rank: int, world_size: int) -> list[range]:
    """Rows of each micro-batch of a process: every `world_size`-th row of the step's batch, from `rank` on."""
    share, rest = divmod(config.batch_size, world_size)
    micro = min(config.micro_batch_size or share, share)
    if rest or share % (micro or 1):
        raise InputError(
            f"batch_size {config.batch_size} does not divide among {world_size} processes, or their shares into "
            f"micro_batch_size {micro}"
        )
    rows = range(rank, config.batch_size, world_size)
    return [rows[start : start + micro] for start in range(0, share, micro)]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """This process's micro-batches of all steps from `first_step` on, as lists of (index, epoch).

    The permutations of all epochs, one after the other, are cut into steps of `batch_size` rows, of which `parts` from
    `split_batch` are the micro-batches. So the order depends on (seed, epoch, position) only: not on the number of
    processes, nor on the step at which a run was resumed.
    """

    def __init__(self, length: int, config: LoopConfig, parts: list[range], first_step: int):
        self.length, self.config, self.parts, self.first_step = length, config, parts, first_step

    def __len__(self) -> int:
        return (self.config.steps - self.first_step) * len(self.parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=2)  # a step may span two epochs
        def order(epoch: int) -> Any:
            rng = generator_for(self.config.seed, Stream.ORDER, epoch)
            return torch.randperm(self.length, generator=rng).numpy()

        for step in range(self.first_step, self.config.steps):
            for rows in self.parts:
                places = [divmod(step * self.config.batch_size + row, self.length) for row in rows]
                yield [(int(order(epoch)[offset]), epoch) for epoch, offset in places]
