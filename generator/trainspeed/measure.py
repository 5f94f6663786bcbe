"""The measurement: every generator, every variant, round after round, and the rows that come out."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.peak import MatmulProbe, Peak
from common.runtime import check_can_compile, move, pick_device
from common.turns import OUT_OF_MEMORY, ran_out, take_turns
from generator.objective import flops_per_token
from generator.trainspeed.config import COMPILED, EAGER, Subject, TrainSpeedConfig
from generator.trainspeed.lanes import Batch, Lane, Trainee

MEASURED = (
    "tokens_per_second",
    "tokens_per_second_min",
    "tokens_per_second_max",
    "mfu",
    "fraction_of_matmul",
    "against_baseline",
    "step_memory_mb",
    "loss",
    "gradient_norm",
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainSpeedResults:
    """Rows, one for each generator, batch size, variant and number format; see `rows_of` for their fields.

    models: by name, parameters, tokens of a sequence, operations of a token, and what weights and optimizer
    take in 10**6 bytes; null where there was no memory to build it.
    """

    rows: list[Row]
    models: dict[str, dict[str, Any] | None]
    probe: MatmulProbe
    peaks: dict[str, Peak]
    config: dict[str, Any]
    seconds: float


def measure_training(subjects: Sequence[Subject], config: TrainSpeedConfig) -> TrainSpeedResults:
    """Measure how many tokens a second each generator trains on.

    A step is what training does with one micro-batch and its update: the loss of random tokens, its gradient,
    clipping and AdamW. In each round every variant makes one, and a plain matrix product is measured between rounds,
    so that other work on the machine slows all of them alike. Before that each has made one or two, to warm up, to be
    compared with the other variants, and for its memory.

    Raises:
        InputError: a device or a compiler that is not there, or a variant that would be no other than eager.
    """
    start = time.perf_counter()
    device = pick_device(config.device)
    batch_sizes, dtypes = config.batch_sizes_on(device), config.dtypes_on(device)
    # all is checked before anything is built
    variants = {
        (subject.name, size): config.variants_at(device, size * subject.layout.num_channels)
        for subject in subjects
        for size in batch_sizes
    }
    if any(COMPILED in names for names in variants.values()):
        check_can_compile(device)
    models: dict[str, dict[str, Any] | None] = {}
    rows: list[Row] = []
    with torch.random.fork_rng(), logging_redirect_tqdm(), tqdm(unit="step") as bar:
        torch.manual_seed(config.seed)
        probe = MatmulProbe(device=device, dtypes=dtypes, as_convolutions=False)
        probe.measure()
        for subject in subjects:
            bar.set_description(f"{subject.name}, building")
            chosen = {size: variants[subject.name, size] for size in batch_sizes}
            models[subject.name], found = measure_subject(subject, chosen, dtypes, probe, config, bar)
            rows += found
    peaks = {dtype: probe.peak(dtype) for dtype in dtypes}
    for row in rows:  # the best matrix product is known at the end only
        model = models[row["generator"]]
        if model is not None and row["tokens_per_second"] is not None:
            flops = row["tokens_per_second"] * model["flops_per_token"]
            row["mfu"] = flops / peaks[row["dtype"]].flops
            row["fraction_of_matmul"] = flops / probe.best[row["dtype"]]
    return TrainSpeedResults(
        rows=rows,
        models=models,
        probe=probe,
        peaks=peaks,
        config=asdict(config) | {"batch_size": batch_sizes, "dtype": dtypes},
        seconds=time.perf_counter() - start,
    )


def measure_subject(
    subject: Subject,
    variants: dict[int, list[str]],
    dtypes: list[str],
    probe: MatmulProbe,
    config: TrainSpeedConfig,
    bar: Any,
) -> tuple[dict[str, Any] | None, list[Row]]:
    """What there is to say of a generator, and its rows; `variants` are those to compare at each batch size."""
    trainee = build(subject, probe.device, config.loss_chunk)
    if trainee is None:
        return None, [
            row_of(subject.name, name, dtype, size, probe.device) | {"error": OUT_OF_MEMORY}
            for size, names in variants.items()
            for name in names
            for dtype in dtypes
        ]
    rows: list[Row] = []
    for size, names in variants.items():
        lanes = build_lanes(subject.name, trainee, names, dtypes, random_batch(trainee, size))
        run_lanes(lanes, probe, config, bar)
        rows += rows_of(lanes, probe.device)
    return about(trainee), rows


def build(subject: Subject, device: torch.device, loss_chunk: int) -> Trainee | None:
    """A generator with its optimizer, on the device; None where there is no memory for it."""
    try:
        return Trainee(move(subject.build(), device, torch.float32), subject.layout, loss_chunk)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return None


def about(trainee: Trainee) -> dict[str, Any]:
    """What the results say of a model."""
    return {
        "parameters": sum(parameter.numel() for parameter in trainee.llama.parameters()),
        "num_tokens": trainee.layout.num_channels,
        "flops_per_token": flops_per_token(trainee.llama, trainee.layout.num_channels),
        "held_mb": trainee.held / 1e6,
    }


def random_batch(trainee: Trainee, batch_size: int) -> Batch:
    """Labels and tokens, all equally likely."""
    layout, device = trainee.layout, trainee.llama.device
    tokens = torch.randint(layout.codebook_size, (batch_size, layout.num_channels))
    return Batch(class_labels=torch.randint(layout.num_classes, (batch_size,)).to(device), tokens=tokens.to(device))


def build_lanes(name: str, trainee: Trainee, variants: list[str], dtypes: list[str], batch: Batch) -> list[Lane]:
    """All that are compared at a batch size."""
    if COMPILED in variants:
        # compiled programs of earlier models and sizes count towards the number that a function may have
        torch.compiler.reset()
    return [
        Lane(subject=name, variant=variant, dtype=dtype, trainee=trainee, batch=batch)
        for variant in variants
        for dtype in dtypes
    ]


def run_lanes(lanes: list[Lane], probe: MatmulProbe, config: TrainSpeedConfig, bar: Any) -> None:
    """Prepare each, then take turns (`common.turns`); the others of a number format must agree with its first."""
    expected: dict[str, tuple[float, float]] = {}

    def prepare(lane: Lane) -> None:
        lane.first_runs(probe.device, config.max_seconds, lambda result: lane.judge(result, expected.get(lane.dtype)))
        if lane.error is None and lane.found is not None:
            expected.setdefault(lane.dtype, lane.found)

    take_turns(lanes, prepare, probe, bar, repeats=config.repeats, max_seconds=config.max_seconds)


def row_of(generator: str, variant: str, dtype: str, batch_size: int, device: torch.device) -> Row:
    """A row without figures."""
    about: Row = {"generator": generator, "variant": variant, "dtype": dtype, "batch_size": batch_size}
    return {**about, "device": str(device), "seconds": [], **dict.fromkeys(MEASURED), "error": None}


def rows_of(lanes: list[Lane], device: torch.device) -> list[Row]:
    """A row for each.

    tokens_per_second, ..._min, ..._max: median, slowest and fastest of the steps, whose times are `seconds`.
    mfu: the operations that those tokens need (`objective.flops_per_token`: nothing that is computed again) a
    second, over the device's peak in the number format. fraction_of_matmul: over the best matrix product here.
    against_baseline: how many times the tokens/s of eager in the same format and batch; null without that.
    step_memory_mb: 10**6 bytes that a step takes at its peak beyond weights and optimizer: gradients, activations,
    logits; null where it cannot be told.
    loss, gradient_norm: of the first step. error: why it was not timed, and all of the above is null; else null.
    """
    plain = {lane.dtype: lane for lane in lanes if lane.variant == EAGER and lane.seconds}
    rows = []
    for lane in lanes:
        count = lane.batch.tokens.numel()
        row = row_of(lane.subject, lane.variant, lane.dtype, len(lane.batch.tokens), device)
        row["error"] = lane.error
        if lane.seconds and lane.found is not None:
            row["seconds"] = lane.seconds
            speeds = lane.speeds(count)
            for name, value in zip(MEASURED[:3], speeds, strict=True):
                row[name] = value
            baseline = plain.get(lane.dtype)
            row["against_baseline"] = None if baseline is None else speeds[0] / baseline.speeds(count)[0]
            row["step_memory_mb"] = None if lane.memory is None else lane.memory / 1e6
            row["loss"], row["gradient_norm"] = lane.found
        rows.append(row)
    return rows
