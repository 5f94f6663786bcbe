"""What bounds a sampler: the bytes that a token must read, how fast memory gives them, and memory itself."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from generator.config import TokenLayout

PROBE_BYTES = 512 * 2**20  # well beyond any cache
PASSES = 3  # of each way in one probe
STREAMS = 4
RESET_PEAK = "5"  # written to clear_refs, it sets the peak resident set to the present one (Linux, proc(5))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# -------------------------------------------------------------------------------------- bytes of a token


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """Bytes that a step cannot do without reading, however it is written.

    `fixed`: the blocks, the last norm, the code rows of the head, one embedding row for each sequence.
    `per_position`: keys and values of one earlier position, all layers and sequences.
    """

    fixed: int
    per_position: int

    def mean(self, num_tokens: int) -> float:
        """Mean over the first `num_tokens` steps; step i, counted from 0, reads i earlier positions."""
        return self.fixed + self.per_position * (num_tokens - 1) / 2


def token_bytes(model: LlamaForCausalLM, layout: TokenLayout, sequences: int) -> TokenBytes:
    """Count for `sequences` rows side by side (with guidance, two for each image), in the model's own dtype."""
    blocks = [*model.model.layers.parameters(), *model.model.norm.parameters()]
    width, size = model.config.hidden_size, model.dtype.itemsize
    fixed = sum(parameter.nbytes for parameter in blocks)
    fixed += (layout.codebook_size + sequences) * width * size
    return TokenBytes(fixed=fixed, per_position=2 * model.config.num_hidden_layers * sequences * width * size)


# -------------------------------------------------------------------------------------- bandwidth


def _product_and_sum(blocks: Tensor, vector: Tensor) -> Tensor:
    """Blocks (4 rows n), vector (n,) -> (rows,): one loop that reads four places of memory at a time."""
    return (blocks[0] * vector + blocks[1] * vector + blocks[2] * vector + blocks[3] * vector).sum(-1)


@dataclass(kw_only=True)
class BandwidthProbe:
    """Measures how fast this machine reads memory, in GB/s (10**9), by several plain ways.

    Call it before, between and after what is judged by it: a shared machine does not give the same all
    the time. No way is the truth; the best of all is the nearest to what the memory can give.
    """

    device: torch.device
    compiled: bool
    found: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vector = torch.ones(2048, device=self.device)
        values = torch.ones(PROBE_BYTES // 4, device=self.device)
        matrix = values.view(-1, 2048)
        blocks = values.view(STREAMS, -1, 2048)
        self._ways: dict[str, Callable[[], Tensor]] = {"sum": values.sum, "matrix-vector": lambda: matrix @ vector}
        if self.compiled:
            read = torch.compile(_product_and_sum)
            self._ways["compiled product and sum"] = lambda: read(blocks, vector)
        for name, way in self._ways.items():
            way()
            self.found[name] = []

    def measure(self) -> None:
        """Read the whole memory block a few times by each way; the fastest pass of each is noted."""
        for name, way in self._ways.items():
            seconds = []
            for _ in range(PASSES):
                synchronize(self.device)
                start = time.perf_counter()
                way()
                synchronize(self.device)
                seconds.append(time.perf_counter() - start)
            self.found[name].append(PROBE_BYTES / min(seconds) / 1e9)

    @property
    def best(self) -> float:
        """The fastest read of all ways and times, GB/s."""
        return max(max(values) for values in self.found.values())

    @property
    def median(self) -> float:
        """The median over times of the best way of each time, GB/s."""
        return statistics.median(max(values) for values in zip(*self.found.values(), strict=True))


# -------------------------------------------------------------------------------------- memory


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


def _resident_growth(run: Callable[[], object]) -> int | None:
    """How far the resident set grows in a run, in bytes; None where the system does not tell (not Linux)."""
    gc.collect()
    try:
        # memory that earlier runs freed goes back to the system, so that using it again counts as growth
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


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
    growth = _resident_growth(run) if device.type == "cpu" and sys.platform == "linux" else None
    return None if growth is None else held_bytes(holder) + growth
