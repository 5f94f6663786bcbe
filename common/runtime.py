"""Devices, number formats, signals, and processes that share work."""

import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from common.config import DTYPES, InputError

M = TypeVar("M", bound=nn.Module)
TIMEOUT = timedelta(days=2)  # of one process that waits for another, whose device may be slower or share larger


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else Apple MPS, else the CPU; one that is not there is an `InputError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:1 or mps") from error
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= available.get(device.type, 0):
        raise InputError(f"device {name!r} is not available here; use auto or cpu; CUDA devices: {available['cuda']}")
    return device


def pick_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as a torch type."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def move(model: M, device: torch.device | None = None, dtype: torch.dtype | None = None) -> M:
    """`model.to(...)`, in place; transformers' own hides its types from a type checker."""
    return nn.Module.to(model, device=device, dtype=dtype)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether matrix products in bfloat16 run in hardware on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))
    return False


def check_can_compile(device: torch.device) -> None:
    """Refuse to compile for a CPU where there is no C++ compiler, before anything has begun."""
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise InputError("compile needs a C++ compiler (g++, clang++ or $CXX); install one, or omit --compile")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def peak_memory_of_process(device: torch.device) -> int:
    """The most bytes that this process has held: on CUDA those of torch's allocator, elsewhere resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting there for what is still being computed."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Interrupted(BaseException):
    """Raised where a signal may break work off; see `StopOnSignal.interrupting`."""


class StopOnSignal:
    """Context in which SIGINT (Ctrl-C) and SIGTERM (of a scheduler that ends a job) only set `.requested`.

    Args:
        ignore_repeats: whether a second Ctrl-C has no effect either; otherwise it interrupts. Where a launcher passes
            signals on, one Ctrl-C arrives twice. A second SIGTERM never interrupts.
    """

    def __init__(self, *, ignore_repeats: bool):
        self.requested = False
        self._ignore_repeats = ignore_repeats
        self._previous: dict[signal.Signals, Any] = {}
        self._interrupting = False

    def __enter__(self) -> Self:
        # signal handlers can be set in the main thread only; elsewhere nobody presses Ctrl-C
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within it a signal raises `Interrupted`, at once if there has been one: for work that can be done again."""
        self._interrupting = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    def _handle(self, number: int, _: object) -> None:
        self.requested = True
        if number == signal.SIGINT and not self._ignore_repeats:
            signal.signal(number, signal.default_int_handler)
        if self._interrupting:
            raise Interrupted


def leave_signals_to_the_trainer(worker: int) -> None:
    """For the processes that read data: the one that trains decides what a signal to all of them means."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes of a launcher: this one is `index` of `count` and uses `device`; the main one writes files."""

    index: int
    count: int
    device: torch.device
    _state: Any

    @property
    def is_main(self) -> bool:
        """Return whether this is the first process."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until every process has called this; that another process has ended is an `InputError`."""
        if self._state is None:
            return
        try:
            self._state.wait_for_everyone()
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or "onnection" in str(error)):
                raise
            raise InputError("another process has ended early; see its own message") from error


@contextmanager
def launched_workers(device_name: str) -> Iterator[Workers]:
    """The processes that a launcher started, or this one alone, on the device of a name that `pick_device` takes."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = pick_device("cpu" if on_cpu else device_name)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Workers(index=0, count=1, device=device, _state=None)
        return
    from accelerate import PartialState

    # accelerate starts processes of CUDA devices; those of other devices communicate as CPU processes
    state = PartialState(cpu=device.type != "cuda", timeout=TIMEOUT)
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"device is {device_name!r}, one GPU for {state.num_processes} processes; omit --device")
        device = state.device
    try:
        yield Workers(index=state.process_index, count=state.num_processes, device=device, _state=state)
    finally:
        state.destroy_process_group()
