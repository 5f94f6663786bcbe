"""The measurement: every variant in both directions, round after round, and the rows that come out."""

import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.errors import InputError
from common.peak import MatmulProbe
from common.runtime import check_can_compile, move, pick_device
from common.turns import OUT_OF_MEMORY, ran_out, take_turns
from tokenizer.throughput.config import BASELINE, COMPILED, TASKS, ThroughputConfig, layout_of, tasks_of
from tokenizer.throughput.lanes import Lane, Reference
from tokenizer.throughput.limits import count_flops
from tokenizer.throughput.variants import VariantFactory
from tokenizer.tokenizer import ChannelTokenizer

MEASURED = (
    "images_per_second",
    "images_per_second_min",
    "images_per_second_max",
    "flops_per_second",
    "fraction_of_peak",
    "against_baseline",
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ThroughputResults:
    """Rows, one for each variant, task and batch size; see `rows_of` for their fields."""

    rows: list[Row]
    flops: dict[str, int]
    probe: MatmulProbe
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    seconds: float


def measure_throughput(tokenizer: ChannelTokenizer, config: ThroughputConfig) -> ThroughputResults:
    """Measure how many images a second a tokenizer encodes and decodes.

    In each round every variant runs once in both directions, and a plain matrix product is measured between
    rounds, so that other work on the machine slows all of them alike. Before that each has run once or twice: to
    warm up, to be compared with the plain float32 network, and for its memory. The tokenizer is left alone.

    Raises:
        InputError: a device or a compiler that is not there, or not memory enough for one image.
    """
    start = time.perf_counter()
    device = pick_device(config.device)
    if compiles := any(name in COMPILED for name in config.variants):
        check_can_compile(device)
    tokenizer = move(copy.deepcopy(tokenizer).eval(), device)
    lanes: list[Lane] = []
    with torch.random.fork_rng(), logging_redirect_tqdm(), tqdm(unit="run") as bar:
        torch.manual_seed(config.seed)
        bar.set_description("reference")
        reference, flops = reference_of(tokenizer, max(config.batch_size))
        probe = MatmulProbe(device=device, dtypes=config.dtype)
        factory = VariantFactory(tokenizer)
        for batch_size in config.batch_size:
            if compiles:
                # compiled programs of earlier sizes count towards the number that a network may have
                torch.compiler.reset()
            compared = build_lanes(factory, config, reference, batch_size)
            run_lanes(compared, reference, probe, config, bar)
            lanes += compared
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    shape = {name: tokenizer.config.to_dict()[name] for name in ("image_size", "num_channels", "num_bits")}
    return ThroughputResults(
        rows=rows_of(lanes, flops, probe),
        flops=flops,
        probe=probe,
        tokenizer={"parameters": parameters, **shape},
        config=asdict(config),
        seconds=time.perf_counter() - start,
    )


def reference_of(tokenizer: ChannelTokenizer, count: int) -> tuple[Reference, dict[str, int]]:
    """Random images, what the plain network makes of them one by one, and the operations that one takes.

    Raises:
        InputError: not memory enough for one image.
    """
    size = tokenizer.config.image_size
    images = (torch.rand(count, 3, size, size) * 2 - 1).to(tokenizer.device)
    try:
        flops = count_flops(tokenizer)
        tokens = torch.cat([tokenizer.tokenize(image[None]) for image in images])
        decoded = torch.cat([tokenizer.detokenize(row[None]) for row in tokens])
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise InputError(
            f"no memory on {tokenizer.device} for one image of {size}x{size}; free some, or take another device"
        ) from error
    return Reference(images=images, tokens=tokens, decoded=decoded), flops


def build_lanes(factory: VariantFactory, config: ThroughputConfig, reference: Reference, batch_size: int) -> list[Lane]:
    """All that are compared at a batch size; those that do the same stand together."""
    lanes = []
    for name in config.variants:
        for dtype in config.dtype:
            variant, error = None, None
            try:
                variant = factory.build(name, dtype)
            except (RuntimeError, MemoryError) as caught:
                if not ran_out(caught):
                    raise
                error = OUT_OF_MEMORY
            for task in tasks_of(name):
                lane = Lane(
                    name=name,
                    dtype=dtype,
                    task=task,
                    batch_size=batch_size,
                    variant=variant,
                    given=reference.given(task, batch_size),
                    error=error,
                )
                lanes.append(lane)
    return sorted(lanes, key=lambda lane: TASKS.index(lane.task))


def run_lanes(lanes: list[Lane], reference: Reference, probe: MatmulProbe, config: ThroughputConfig, bar: tqdm) -> None:
    """Prepare each, then take turns (`common.turns`)."""

    def prepare(lane: Lane) -> None:
        lane.prepare(reference, probe.device, config.max_seconds)

    take_turns(lanes, prepare, probe, bar, repeats=config.repeats, max_seconds=config.max_seconds)


def rows_of(lanes: list[Lane], flops: dict[str, int], probe: MatmulProbe) -> list[Row]:
    """A row for each.

    images_per_second, ..._min, ..._max: median, slowest and fastest of the runs, whose times are `seconds`.
    flops_per_second: of the plain network's count (`limits.count_flops`), however a variant computes it.
    fraction_of_peak: that, over the best matrix product in the same number format.
    against_baseline: how many times the images/s of eager float32 at the same batch size; null without that.
    peak_memory_mb: 10**6 bytes, weights of encoder and decoder and what a run takes; null where it cannot be told.
    tokens_changed, grey_levels: see `lanes.Reference.difference`; null for the other task.
    error: why it was not timed, and all of the above is null; else null.
    """
    plain = {
        (lane.task, lane.batch_size): lane.speeds(lane.batch_size)[0]
        for lane in lanes
        if (lane.name, lane.dtype) == BASELINE and lane.seconds
    }
    rows = []
    for lane in lanes:
        row: Row = {
            "variant": lane.name,
            "task": lane.task,
            "dtype": lane.dtype,
            "layout": layout_of(lane.name),
            "batch_size": lane.batch_size,
            "device": str(probe.device),
            "seconds": lane.seconds,
            **dict.fromkeys(MEASURED),
            "peak_memory_mb": None if lane.memory is None else lane.memory / 1e6,
            "tokens_changed": lane.difference if lane.task == "encode" else None,
            "grey_levels": lane.difference if lane.task == "decode" else None,
            "error": lane.error,
        }
        if lane.seconds:
            baseline = plain.get((lane.task, lane.batch_size))
            speed, slowest, fastest = lane.speeds(lane.batch_size)
            row["images_per_second"] = speed
            row["images_per_second_min"] = slowest
            row["images_per_second_max"] = fastest
            row["flops_per_second"] = speed * flops[lane.task]
            row["fraction_of_peak"] = speed * flops[lane.task] / probe.best[lane.dtype]
            row["against_baseline"] = None if baseline is None else speed / baseline
        rows.append(row)
    return rows
