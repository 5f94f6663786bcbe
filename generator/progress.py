"""Figures and pictures of a generator's training: validation loss, samples at every evaluation, the loss curve."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from common.images import captioned_table, save_png, to_pil, to_uint8
from common.plots import Panel, save_line_plot
from generator.config import SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import ChannelGPT
from training.checkpoints import RunLog

SHEET_CLASSES = 8


def unigram_nats(train_counts: Tensor, val_counts: Tensor) -> list[float]:
    """Nats on val of the frequency of each token at each position of train, a list of C.

    Args:
        train_counts: (C, codebook_size); every token counts once more, so that none is impossible.
        val_counts: (C, codebook_size).
    """
    seen = (train_counts + 1).double()
    nats: list[float] = (
        -(val_counts * (seen / seen.sum(-1, keepdim=True)).log()).sum(-1) / val_counts.sum(-1)
    ).tolist()
    return nats


def evaluation_figures(by_position: list[float], unigram: list[float], codebook_size: int) -> dict[str, Any]:
    """Figures for the log from nats of every position, beside two baselines: unigram and uniform probabilities."""
    nats = sum(by_position) / len(by_position)
    return {
        "nats": nats,
        "bits": nats / math.log(2),
        "first_nats": by_position[0],
        "last_nats": by_position[-1],
        "unigram_nats": sum(unigram) / len(unigram),
        "uniform_nats": math.log(codebook_size),
        "nats_by_position": [round(value, 4) for value in by_position],
    }


def draw_sheet(model: ChannelGPT, detokenize: Callable[[Tensor], Tensor], path: Path) -> None:
    """Write a picture of samples with fixed seeds: a row for each of a few classes, a column for each k."""
    config = model.config
    shown = min(SHEET_CLASSES, config.num_classes)
    labels = [i * config.num_classes // shown for i in range(shown)]
    lengths = [k for k in (4, 16, 64, 128, 256) if k < config.num_channels] + [config.num_channels]
    engine = Engine(CachedDecoder.from_model(model))
    *_, last = stream(engine, labels, labels, config.num_channels, SamplingConfig())
    columns = [to_uint8(detokenize(last.tokens[:, :k])) for k in lengths]
    rows = [[to_pil(column[i]) for column in columns] for i in range(len(labels))]
    names = [config.class_names[label].split(",")[0][:20] for label in labels]
    save_png(captioned_table(rows, names, [f"k={k}" for k in lengths]), path)


def plot_loss(log: RunLog, path: Path) -> None:
    """Write a plot of training and validation loss over the run, with both baselines."""
    trained = [(record["step"], record["nats"]) for record in log.records() if "nats" in record]
    evaluations = log.evaluations()
    last = evaluations[max(evaluations)]
    flat = {
        name: [(trained[0][0], last[f"{name}_nats"]), (trained[-1][0], last[f"{name}_nats"])]
        for name in ("unigram", "uniform")
    }
    validated = [(step, figures["nats"]) for step, figures in evaluations.items()]
    save_line_plot(
        [Panel(title="nats per token", lines={"training": trained, "validation": validated, **flat}, y_scale="linear")],
        path,
        title="Cross-entropy over the run; validation with averaged weights",
        x_label="step",
        columns=1,
        dashed=set(flat),
    )
