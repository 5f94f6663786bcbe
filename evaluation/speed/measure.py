"""The measurement: every setting, every sampler, round after round, and the rows that come out."""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.measuring import peak_memory
from common.runtime import check_can_compile, move, pick_device, pick_dtype
from evaluation.speed.config import SpeedConfig
from evaluation.speed.limits import BandwidthProbe, TokenBytes, token_bytes
from evaluation.speed.samplers import OURS, Clock, Milliseconds, Sampler, Task, build_sampler, same_trunk
from generator.config import ChannelGPTConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.model import ChannelGPT

logger = logging.getLogger(__name__)
BUCKETS = 8
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: a generator, and how its tokens become images.

    `pictures(dtype=...)` gives the function tokens (b k) -> uint8 images (b 3 H W) in that number format,
    on the device. `tokenizer` is what it decodes with. Both are None to measure tokens alone.
    """

    model: ChannelGPT
    name: str
    pictures: Callable[..., Callable[[Tensor], Tensor]] | None = None
    tokenizer: nn.Module | None = None
    tokenizer_name: str = "none"

    @property
    def about(self) -> dict[str, Any]:
        """Names and numbers of parameters of both models, for the results."""
        models = {"generator": (self.name, self.model), "tokenizer": (self.tokenizer_name, self.tokenizer)}
        return {
            part: model and {"name": name, "parameters": sum(parameter.numel() for parameter in model.parameters())}
            for part, (name, model) in models.items()
        }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One combination; its samplers are compared with each other."""

    dtype: str
    batch_size: int
    cfg_scale: float


@dataclass(frozen=True, kw_only=True)
class SpeedResults:
    """Rows, one for each sampler, setting and k; see `rows_of` for their fields. Bandwidths in GB/s."""

    rows: list[Row]
    bandwidth: BandwidthProbe
    device: torch.device
    about: dict[str, Any]
    config: dict[str, Any]
    seconds: float


def measure_speed(subject: Subject, config: SpeedConfig) -> SpeedResults:
    """Measure every setting.

    One pass of the largest k serves every k: a sampler's times are noted token by token. In each round
    every sampler runs once, and the memory's bandwidth is measured between rounds, so that other
    work on the machine slows all of them alike.

    Raises:
        InputError: a device or a compiler that is not there, or a k or a guidance that the model does not have.
    """
    start = time.perf_counter()
    budgets, device = config.budgets(subject.model.config), pick_device(config.device)
    if "compiled" in config.samplers:
        check_can_compile(device)
    runs = len(config.dtype) * len(config.batch_size) * len(config.cfg_scale)
    runs *= len(config.samplers) * (1 + config.repeats)
    rows: list[Row] = []
    with torch.random.fork_rng(), logging_redirect_tqdm(), tqdm(total=runs, unit="run") as bar:
        torch.manual_seed(config.seed)
        bandwidth = BandwidthProbe(device=device, compiled="compiled" in config.samplers)
        bandwidth.measure()
        for dtype in config.dtype:
            model = move(copy.deepcopy(subject.model).eval(), device, pick_dtype(dtype))
            engines = _engines(model, config)
            rival = same_trunk(model, config.samplers)
            pictures = subject.pictures(dtype=pick_dtype(dtype)) if subject.pictures else None
            for batch_size, cfg_scale in product(config.batch_size, config.cfg_scale):
                setting = Setting(dtype=dtype, batch_size=batch_size, cfg_scale=cfg_scale)
                task = _task(setting, config, budgets[-1], model.config)
                samplers = {
                    name: build_sampler(name, model.config, rival, engines, task, config.full_uncached)
                    for name in config.samplers
                }
                memory, times, decoding = _run(samplers, budgets, pictures, config.repeats, task, bandwidth, bar)
                needed = token_bytes(model, len(task.seeds), task.sequences)
                for name, sampler in samplers.items():
                    measured = Measured(times=times[name], decoding=decoding, memory=memory[name], needed=needed)
                    rows += rows_of(name, sampler.estimated, setting, str(device), budgets, measured)
    for row in rows:  # the best bandwidth is known at the end only
        limit_ms = row["bytes_per_token"] / (bandwidth.best * 1e9) * 1000
        row["fraction_of_limit"] = limit_ms / row["ms_per_token"]
    return SpeedResults(
        rows=rows,
        bandwidth=bandwidth,
        device=device,
        about=subject.about,
        config=asdict(config),
        seconds=time.perf_counter() - start,
    )


def _engines(model: ChannelGPT, config: SpeedConfig) -> dict[str, Engine]:
    names = [name for name in config.samplers if name in OURS]
    decoder = CachedDecoder.from_model(model) if names else None
    return {name: Engine(decoder, compile=name == "compiled") for name in names if decoder is not None}


def _task(setting: Setting, config: SpeedConfig, num_tokens: int, model: ChannelGPTConfig) -> Task:
    return Task(
        num_tokens=num_tokens,
        class_labels=[i % model.num_classes for i in range(setting.batch_size)],
        seeds=[config.seed + i for i in range(setting.batch_size)],
        cfg_scale=setting.cfg_scale,
    )


def _run(
    samplers: Mapping[str, Sampler],
    budgets: list[int],
    pictures: Callable[[Tensor], Tensor] | None,
    repeats: int,
    task: Task,
    bandwidth: BandwidthProbe,
    bar: tqdm,
) -> tuple[dict[str, int | None], dict[str, Milliseconds], Milliseconds | None]:
    """Memory in bytes and times (repeats, num_tokens) of each sampler, and times of decoding pictures (repeats,)."""
    memory: dict[str, int | None] = {}
    for name, sampler in samplers.items():
        bar.set_description(f"{name}, first run")
        memory[name] = peak_memory(bandwidth.device, sampler.holder, sampler.times)
        bar.update()
    # every channel is decoded whatever k is, so one time serves every k
    tokens = torch.zeros(len(task.seeds), budgets[0], dtype=torch.long, device=bandwidth.device)
    if pictures is not None:
        pictures(tokens)
    times: dict[str, list[Milliseconds]] = {name: [] for name in samplers}
    decoding: list[float] = []
    for turn in range(repeats):
        bandwidth.measure()
        for name in _rotated(list(samplers), turn):
            bar.set_description(name)
            times[name].append(samplers[name].times())
            bar.update()
        if pictures is not None:
            clock = Clock(bandwidth.device)
            pictures(tokens)
            clock.mark()
            decoding.append(float(clock.elapsed()[0]))
    bandwidth.measure()
    stacked = {name: np.stack(found) for name, found in times.items()}
    return memory, stacked, np.array(decoding) if decoding else None


def _rotated(names: list[str], turn: int) -> list[str]:
    """Each round begins with another sampler, so that none always follows the same one."""
    first = turn % len(names)
    return names[first:] + names[:first]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one sampler: milliseconds until each token (repeats, num_tokens), of decoding (repeats,); bytes at peak."""

    times: Milliseconds
    decoding: Milliseconds | None
    memory: int | None
    needed: TokenBytes


def rows_of(
    name: str, estimated: bool, setting: Setting, device: str, budgets: list[int], measured: Measured
) -> Iterator[Row]:
    """A row for each k.

    ms_per_token, ms_per_token_min: median and least of the rounds, over k; the call's own set-up is in.
    ms_by_position: mean time of a token in up to 8 equal runs of positions, the first first.
    images_per_second: of whole pictures if pictures_decoded, else of finished tokens.
    first_preview_ms: from the call until the pictures of the smallest k are decoded; null without pictures.
    peak_memory_mb: 10**6 bytes, of drawing the largest k (see `common.measuring`); null where it cannot be told.
    bytes_per_token: what a token must read, mean over the k (see `limits.TokenBytes`).
    estimated: times of tokens were interpolated between measured ones.
    """
    until = np.median(measured.times, axis=0)
    single = np.median(np.diff(measured.times, axis=1, prepend=0), axis=0)
    decode_ms = None if measured.decoding is None else float(np.median(measured.decoding))
    for k in budgets:
        parts = np.array_split(single[:k], min(BUCKETS, k))
        yield {
            "sampler": name,
            "device": device,
            **asdict(setting),
            "num_tokens": k,
            "ms_per_token": float(until[k - 1] / k),
            "ms_per_token_min": float(measured.times[:, k - 1].min() / k),
            "ms_by_position": [float(part.mean()) for part in parts],
            "decode_ms": decode_ms,
            "images_per_second": float(setting.batch_size / (until[k - 1] + (decode_ms or 0.0)) * 1000),
            "pictures_decoded": decode_ms is not None,
            "first_preview_ms": None if decode_ms is None else float(until[budgets[0] - 1] + decode_ms),
            "peak_memory_mb": None if measured.memory is None else measured.memory / 1e6,
            "bytes_per_token": measured.needed.mean(k),
            "estimated": estimated,
        }
