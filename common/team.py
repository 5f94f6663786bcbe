"""Processes that share work without training: drawing, extraction, evaluation. A single one needs no accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from common.errors import InputError
from common.runtime import pick_device

TIMEOUT = timedelta(days=2)  # of one process that waits for another, whose device may be slower or share larger


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a launcher: this one is `index` of `count` and uses `device`."""

    index: int
    count: int
    device: torch.device
    _state: Any

    @property
    def is_main(self) -> bool:
        """Whether this process writes what exists once."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until every process has called this.

        Raises:
            InputError: another process has ended.
        """
        if self._state is None:
            return
        try:
            self._state.wait_for_everyone()
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or "onnection" in str(error)):
                raise
            raise InputError("another process has ended before its time; see its own message") from error


@contextmanager
def team(device_name: str) -> Iterator[Team]:
    """The processes that a launcher started, or this one alone.

    Args:
        device_name: auto, cpu, cuda, cuda:1 or mps.

    Raises:
        InputError: a single GPU for several processes.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = pick_device("cpu" if on_cpu else device_name)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Team(index=0, count=1, device=device, _state=None)
        return
    from accelerate import PartialState

    # accelerate starts processes of CUDA devices; those of other devices communicate as CPU processes
    state = PartialState(cpu=device.type != "cuda", timeout=TIMEOUT)
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"device is {device_name!r}, one GPU for {state.num_processes} processes; omit --device")
        device = state.device
    try:
        yield Team(index=state.process_index, count=state.num_processes, device=device, _state=state)
    finally:
        state.destroy_process_group()
