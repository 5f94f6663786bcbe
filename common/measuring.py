"""What every benchmark needs: waiting for a device, memory at its peak, and what was measured on."""

import ctypes
import gc
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

PACKAGES = ("torch", "transformers", "channeltok")
RESET_PEAK = "5"  # written to clear_refs, it sets the peak resident set to the present one (Linux, proc(5))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on: the device's name as people know it, and how many threads torch uses on the CPU."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": name, "gpu": gpu, "threads": torch.get_num_threads(), "system": platform.system()}


def versions(others: Sequence[str] = ()) -> dict[str, str]:
    """Of Python and of the packages that a measurement depends on; `others` are those that not all do."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in (*PACKAGES, *others)}}


def version_of(package: str) -> str:
    """Of an installed package; a script also runs from a folder that nobody has installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def held_bytes(*holders: object) -> int:
    """Bytes of all tensors that objects hold, in their attributes and containers; shared storage counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(holders)
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, Tensor):
            storage = holder.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(holder, nn.Module):
            waiting += [*holder.parameters(), *holder.buffers()]
        elif isinstance(holder, dict):
            waiting += holder.values()
        elif isinstance(holder, list | tuple | set):
            waiting += holder
        elif hasattr(holder, "__dict__") and not isinstance(holder, type | ModuleType | FunctionType):
            waiting += vars(holder).values()
    return sum(storages.values())


def _resident(name: str) -> int:
    """A line of this process's status, VmRSS (now) or VmHWM (peak), in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


class MemoryWatch:
    """Context that tells how far memory grows in it: afterwards `.growth` is bytes at the peak, above the start.

    On CUDA it is what torch's allocator has given out, on a CPU with Linux the resident set; None on
    any other device.
    """

    def __init__(self, device: torch.device):
        self.growth: int | None = None
        self._device = device
        self._before: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu" and sys.platform == "linux" and _forget_resident_peak():
            self._before = _resident("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            on_gpu = self._device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else _resident("VmHWM")
            self.growth = max(0, peak - self._before)


def _forget_resident_peak() -> bool:
    """Begin anew with this process's peak; False where the system does not allow it."""
    try:
        # memory that earlier runs freed goes back to the system, so that using it again counts as growth
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    except (AttributeError, OSError):
        return False
    return True


def peak_memory(device: torch.device, holder: object, run: Callable[[], object]) -> int | None:
    """Bytes at the peak of a run: the weights that `holder` holds, cache and activations.

    All samplers live in one process, so the peak of the process says nothing; this is what one of them
    would need alone. The run happens twice, the first time to warm up (compile, capture).
    On CUDA: weights, and the growth of what torch's allocator has given out, from before the warm-up to the
    peak of the second run. On a CPU with Linux: weights, and the growth of the resident set in the second
    run. None on any other device.
    """
    if device.type == "cuda":
        held, before = held_bytes(holder), torch.cuda.memory_allocated(device)
        run()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return held + torch.cuda.max_memory_allocated(device) - before
    run()
    with MemoryWatch(device) as watch:
        run()
    return None if watch.growth is None else held_bytes(holder) + watch.growth
