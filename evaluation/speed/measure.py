"""Measure speed: every setting, every sampler, in interleaved rounds."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import groupby, product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.checkpoint import resolve_folder
from common.config import InputError
from common.runtime import check_can_compile, move, pick_device, pick_dtype
from evaluation.config import SpeedConfig
from evaluation.reports import cell, machine, place, synchronize, table, versions
from evaluation.speed.samplers import Draw, Task, build_samplers
from generator.config import GENERATOR_SIZES, ChannelGPTConfig
from generator.model import ChannelGPT
from tokenizer.decoding import PictureDecoder
from tokenizer.published import published_config
from tokenizer.tokenizer import ChannelTokenizer

PROBE_BYTES = 512 * 2**20  # well beyond any cache
Milliseconds = npt.NDArray[np.float64]


def random_config(size: str, num_channels: int = 256, num_bits: int = 14) -> ChannelGPTConfig:
    """Configuration of a generator with random weights, by default with the tokens of the paper's 256x256 models."""
    return ChannelGPTConfig(
        **vars(GENERATOR_SIZES[size]),
        num_channels=num_channels,
        num_bits=num_bits,
        class_names=[str(label) for label in range(1000)],
        tokenizer_fingerprint="random weights",
        has_null_label=True,
    )


def load_models(config: SpeedConfig) -> tuple[ChannelGPT, ChannelTokenizer | None]:
    """Load the models of a folder, or build those of a published size with random weights.

    Raises:
        InputError: a folder without them.
    """
    if config.model is not None:
        folder = resolve_folder(config.model)
        generator = ChannelGPT.from_pretrained(folder / "generator")
        return generator, ChannelTokenizer.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        size = config.generator or "B"
        if config.tokenizer == "none":
            return ChannelGPT(random_config(size)), None
        tokenizer = ChannelTokenizer(published_config(config.tokenizer or "paper-256")).eval()
        return ChannelGPT(random_config(size, tokenizer.config.num_channels, tokenizer.config.num_bits)), tokenizer


def bytes_per_token(model: ChannelGPT, sequences: int, num_tokens: int) -> float:
    """Bytes that a step must read at least, mean over the first `num_tokens` steps with `sequences` rows in each.

    Counted are the weights of the blocks, once, and in step i, from 0, the keys and values of i earlier positions.
    """
    weights = sum(parameter.nbytes for parameter in model.blocks.parameters())
    position = 2 * model.config.num_layers * sequences * model.config.hidden_size * model.dtype.itemsize
    return weights + position * (num_tokens - 1) / 2


def read_bandwidth(device: torch.device) -> float:
    """Measure how fast this device reads its memory, in GB/s (10**9): the fastest pass of two plain ways."""
    values = torch.ones(PROBE_BYTES // 4, device=device)
    matrix, vector = values.view(-1, 2048), torch.ones(2048, device=device)
    ways: list[Callable[[], Tensor]] = [values.sum, lambda: matrix @ vector]
    seconds = []
    for way in ways * 4:
        synchronize(device)
        start = time.perf_counter()
        way()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return PROBE_BYTES / min(seconds) / 1e9


def run_rounds(
    draws: Mapping[str, Draw], task: Task, repeats: int, between: Callable[[], None]
) -> dict[str, Milliseconds]:
    """Draw twice to warm up (compile, capture), then in rounds, each of which begins with another sampler.

    `between` is called before, between and after the rounds.

    Returns:
        For each sampler its results, (repeats, n).
    """
    names = list(draws)
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    starts = [turn % len(names) for turn in range(repeats)]
    for turn, order in enumerate([names * 2, *(names[first:] + names[:first] for first in starts)]):
        for name in tqdm(order, desc=f"round {turn} of {repeats}", leave=False):
            milliseconds = draws[name](task)
            if turn:
                found[name].append(milliseconds)
        between()
    return {name: np.array(results) for name, results in found.items()}


def rows_of(
    sampler: str, setting: dict[str, Any], budgets: list[int], times: Milliseconds, decode_ms: float | None
) -> list[dict[str, Any]]:
    """Build a row for each k from milliseconds until each k, (repeats, len(budgets)), and of decoding the pictures.

    ms_per_token, ms_per_token_min: median and least of the rounds, over k, with the set-up of the call.
    images_per_second: of pictures, or of finished tokens without a tokenizer.
    first_preview_ms: from the call until the pictures of the smallest k are decoded; None without pictures.
    estimated: times of tokens are interpolated between measured ones.
    """
    until = np.median(times, axis=0)
    return [
        {
            "sampler": sampler,
            **setting,
            "num_tokens": k,
            "ms_per_token": float(until[i] / k),
            "ms_per_token_min": float(times[:, i].min() / k),
            "decode_ms": decode_ms,
            "images_per_second": float(setting["batch_size"] / (until[i] + (decode_ms or 0.0)) * 1000),
            "first_preview_ms": None if decode_ms is None else float(until[0] + decode_ms),
            "estimated": sampler == "uncached",
        }
        for i, k in enumerate(budgets)
    ]


def measure_speed(generator: ChannelGPT, tokenizer: ChannelTokenizer | None, config: SpeedConfig) -> dict[str, Any]:
    """Measure every setting; without a tokenizer tokens alone.

    One pass of the largest k serves every k. In each round every sampler runs once, and the bandwidth of the memory is
    measured between rounds, so that other work on the machine slows all of them alike.

    Returns:
        What speed.json holds, without the command. rows: see `rows_of`, with bytes_per_token and the time to read these
        over the time taken, fraction_of_limit. bandwidth_gb_s: GB/s (10**9 bytes), the best of all measurements.

    Raises:
        InputError: a device or a compiler that is not available, or a k or a guidance that the model does not have.
    """
    start = time.perf_counter()
    budgets, device = config.token_counts(generator.config.num_channels), pick_device(config.device)
    if config.cfg_scale != [1] and not generator.config.has_null_label:
        raise InputError(f"cfg_scale is {config.cfg_scale}, but this model was trained without null label; use 1")
    if "compiled" in config.samplers:
        check_can_compile(device)
    rows: list[dict[str, Any]] = []
    bandwidths = [read_bandwidth(device)]
    with torch.random.fork_rng(), logging_redirect_tqdm():
        torch.manual_seed(config.seed)
        for dtype in config.dtype:
            model = move(copy.deepcopy(generator).eval(), device, pick_dtype(dtype))
            draws = build_samplers(config.samplers, model)
            pictures = None
            if tokenizer is not None:
                pictures = PictureDecoder(move(tokenizer, device), dtype=pick_dtype(dtype))
            for batch_size, cfg_scale in product(config.batch_size, config.cfg_scale):
                labels = [i % model.config.num_classes for i in range(batch_size)]
                seeds = [config.seed + i for i in range(batch_size)]
                task = Task(budgets=budgets, class_labels=labels, seeds=seeds, cfg_scale=cfg_scale)
                times = run_rounds(draws, task, config.repeats, lambda: bandwidths.append(read_bandwidth(device)))
                setting = {"device": str(device), "dtype": dtype, "batch_size": batch_size, "cfg_scale": cfg_scale}
                # every channel is decoded whatever k is, so one time serves every k
                decode_ms = None if pictures is None else 1000 * pictures.seconds(batch_size)
                for name in config.samplers:
                    for row in rows_of(name, setting, budgets, times[name], decode_ms):
                        needed = bytes_per_token(model, task.sequences, row["num_tokens"])
                        rows.append({**row, "bytes_per_token": needed})
    best = max(bandwidths)
    for row in rows:
        row["fraction_of_limit"] = row["bytes_per_token"] / (best * 1e6) / row["ms_per_token"]
    return {
        "rows": rows,
        "bandwidth_gb_s": best,
        "machine": machine(device),
        "versions": versions(),
        "generator": _about(config.model or config.generator or "B", generator),
        "tokenizer": tokenizer and _about(config.model or config.tokenizer or "paper-256", tokenizer),
        "settings": asdict(config),
        "seconds": time.perf_counter() - start,
    }


def _about(name: str, model: nn.Module) -> dict[str, Any]:
    return {"name": name, "parameters": sum(parameter.numel() for parameter in model.parameters())}


def report(found: dict[str, Any]) -> list[str]:
    """Format speed.md: paragraphs, one of them a table with a line for each setting and sampler."""
    rows, generator, tokenizer = found["rows"], found["generator"], found["tokenizer"]
    budgets = list(dict.fromkeys(row["num_tokens"] for row in rows))
    heads = ["setting", "sampler", *(f"k = {k}, ms a token" for k in budgets), f"images/s at k = {budgets[-1]}"]
    heads += [f"first preview (k = {budgets[0]}), ms", "of the limit"]
    uncached = {(_setting(row), row["num_tokens"]): row["ms_per_token"] for row in rows if row["estimated"]}
    lines = []
    for (setting, sampler), group in groupby(rows, lambda row: (_setting(row), row["sampler"])):
        cells = [setting, sampler + (" (estimated)" if sampler == "uncached" else "")]
        for row in group:
            slow = uncached.get((setting, row["num_tokens"]))
            gain = f" ({slow / row['ms_per_token']:.1f}x)" if slow and not row["estimated"] else ""
            cells.append(f"{row['ms_per_token']:.2f}{gain}")
        cells += [f"{row['images_per_second']:.2f}", cell(row["first_preview_ms"], ".0f")]
        lines.append([*cells, f"{row['fraction_of_limit']:.1%}"])
    what = f"generator {generator['name']} ({generator['parameters'] / 1e6:.1f}M)"
    return [
        f"# Speed: {what}, " + (f"tokenizer {tokenizer['name']}" if tokenizer else "tokens only"),
        f"{place(found)}, memory reads {found['bandwidth_gb_s']:.0f} GB/s",
        f"`{found['command']}`",
        table(heads, lines),
        f"Medians of {found['settings']['repeats']} rounds, samplers interleaved; decoding is timed separately. ms a "
        "token: mean over k tokens, in brackets how many times faster than uncached. Images/s: with decoding where "
        "there is a tokenizer. Of the limit: the time to read weights and cache once, at the best bandwidth measured "
        "here, over the time taken. Estimated: interpolated between measured prefix lengths.",
    ]


def _setting(row: dict[str, Any]) -> str:
    """What rows that are compared with each other have in common."""
    guidance = "" if row["cfg_scale"] == 1 else f", guidance {row['cfg_scale']:g}"
    return f"{row['dtype']}, batch {row['batch_size']}{guidance}"
