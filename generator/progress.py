"""What a run of training shows: samples at every evaluation, loss beside what knowing nothing costs, a report."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from common.files import write_text
from common.images import captioned_table, save_png, to_pil, to_uint8
from common.measuring import versions
from common.plots import Panel, save_line_plot
from generator.config import SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import ChannelGPT
from training.log import JsonlLog
from training.peak import Peak

logger = logging.getLogger(__name__)
PICTURE_CLASSES = 8
NATS_A_BIT = math.log(2)
REPORT = "report.md"


def draw_sheet(model: ChannelGPT, detokenize: Callable[[Tensor], Tensor], path: Path) -> None:
    """Write a picture of samples with fixed seeds: a row for each of a few classes, a column for each k."""
    config = model.config
    shown = min(PICTURE_CLASSES, config.num_classes)
    labels = [i * config.num_classes // shown for i in range(shown)]
    lengths = [k for k in (4, 16, 64, 128, 256) if k < config.num_channels] + [config.num_channels]
    engine = Engine(CachedDecoder.from_model(model))
    *_, last = stream(engine, labels, labels, config.num_channels, SamplingConfig())
    columns = [to_uint8(detokenize(last.tokens[:, :k])) for k in lengths]
    rows = [[to_pil(column[i]) for column in columns] for i in range(len(labels))]
    names = [config.class_names[label].split(",")[0][:20] for label in labels]
    save_png(captioned_table(rows, names, [f"k={k}" for k in lengths]), path)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Validation loss of every position, nats a token, beside the two baselines."""

    by_position: list[float]
    unigram: float
    uniform: float

    @property
    def nats(self) -> float:
        """Mean over all positions."""
        return sum(self.by_position) / len(self.by_position)

    def line(self) -> str:
        """For people."""
        return (
            f"{self.nats:.3f} nats a token, {self.nats / NATS_A_BIT:.3f} bits (unigram {self.unigram:.3f}, uniform "
            f"{self.uniform:.3f} nats); first token {self.by_position[0]:.3f}, last {self.by_position[-1]:.3f}"
        )

    def record(self) -> dict[str, Any]:
        """For the log and the trackers."""
        return {
            "nats": self.nats,
            "bits": self.nats / NATS_A_BIT,
            "first_nats": self.by_position[0],
            "last_nats": self.by_position[-1],
            "unigram_nats": self.unigram,
            "uniform_nats": self.uniform,
            "nats_by_position": [round(value, 4) for value in self.by_position],
        }


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Nats per token on val of two trivial models.

    unigram: frequency of each token at each position of train; (C,). uniform: the same probability for every token.
    """

    unigram: list[float]
    uniform: float

    @classmethod
    def of(cls, train_counts: Tensor, val_counts: Tensor) -> Self:
        """From counts (C, codebook_size); every token is counted once more than seen, so that none is impossible."""
        seen = (train_counts + 1).double()
        nats = -(val_counts * (seen / seen.sum(-1, keepdim=True)).log()).sum(-1) / val_counts.sum(-1)
        return cls(unigram=nats.tolist(), uniform=math.log(train_counts.shape[1]))

    def beside(self, by_position: Tensor) -> Evaluation:
        """Compare nats of every position, (C,)."""
        return Evaluation(
            by_position=by_position.tolist(), unigram=sum(self.unigram) / len(self.unigram), uniform=self.uniform
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the report says beside the log.

    speed: tokens_per_second and mfu, means over the last session's steps; None if it made none.
    """

    command: str
    machine: dict[str, Any]
    speed: dict[str, float] | None
    peak: Peak
    flops_per_token: float
    parameters: int
    sequences: int
    steps: int
    batch_size: int
    keep_best: bool


def write_report(output_dir: Path, journal: JsonlLog, baselines: Baselines, progress: Progress) -> None:
    """Write report.md, loss.png and positions.png to the run's folder, each whole."""
    records = journal.records()
    evaluations = journal.evaluations()
    bounds = {"unigram": sum(baselines.unigram) / len(baselines.unigram), "uniform": baselines.uniform}
    trained = [(record["step"], record["nats"]) for record in records if "nats" in record]
    validated = [(step, figures["nats"]) for step, figures in evaluations.items()]
    flat = {name: [(trained[0][0], value), (trained[-1][0], value)] for name, value in bounds.items()}
    save_line_plot(
        [
            Panel(title="nats a token", lines={"training": trained, "validation": validated, **flat}, y_scale="linear"),
        ],
        output_dir / "loss.png",
        title="Cross-entropy over the run; validation with averaged weights",
        x_label="step",
        columns=1,
        dashed=set(flat),
    )
    last = evaluations[max(evaluations)]
    positions = list(enumerate(last["nats_by_position"], 1))
    save_line_plot(
        [
            Panel(
                title=f"after {max(evaluations):,} steps",
                lines={
                    "validation": positions,
                    "unigram": list(enumerate(baselines.unigram, 1)),
                    "uniform": [(1, baselines.uniform), (len(positions), baselines.uniform)],
                },
                y_scale="linear",
            )
        ],
        output_dir / "positions.png",
        title="Validation loss of each token, nats",
        x_label="position, coarse to fine",
        columns=1,
        dashed={"unigram", "uniform"},
    )
    write_text(output_dir / REPORT, _report(evaluations, bounds, progress))
    logger.info("%s: done; see report.md", output_dir)


def _report(evaluations: dict[int, dict[str, Any]], bounds: dict[str, float], progress: Progress) -> str:
    rows = [
        f"| {step:,} | " + " | ".join(f"{found[key]:.3f}" for key in ("nats", "bits", "first_nats", "last_nats")) + " |"
        for step, found in evaluations.items()
    ]
    rows += [f"| {name} | {nats:.3f} | {nats / NATS_A_BIT:.3f} | | |" for name, nats in bounds.items()]
    speed = "no step was timed in the last session"
    if progress.speed is not None:
        tokens, mfu = progress.speed["tokens_per_second"], progress.speed["mfu"]
        speed = f"{tokens:,.0f} tokens/s in the last session, MFU {mfu:.1%}"
    about = progress.machine
    device = about["gpu"] or f"{about['cpu']}, {about['threads']} threads"
    many = f"{about['processes']} processes on " if about["processes"] > 1 else ""
    step = max(evaluations)
    exported = min(evaluations, key=lambda step: float(evaluations[step]["nats"])) if progress.keep_best else step
    return "\n".join(
        [
            "# Report of a training run",
            "",
            "```",
            progress.command,
            "```",
            "",
            f"- {progress.parameters:,} parameters; {progress.steps:,} steps of {progress.batch_size:,} sequences, "
            f"{progress.steps * progress.batch_size / progress.sequences:.2f} epochs of {progress.sequences:,}.",
            f"- {many}{device}, {about['dtype']}: {speed} "
            f"({progress.flops_per_token:.4g} operations a token; {progress.peak.flops / 1e12:.4g} TFLOP/s a process, "
            f"{progress.peak.source}).",
            f"- {', '.join(f'{name} {version}' for name, version in versions().items())}.",
            "",
            "## Validation loss",
            "",
            "| step | nats a token | bits a token | first token, nats | last token, nats |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"generator/ has the averaged weights after {exported:,} steps"
            f"{', the lowest validation loss' if progress.keep_best else ''}.",
            "",
            "Unigram: the frequency of each token at each position. Uniform: the same probability for every token.",
            "",
            "![Loss](loss.png)",
            "",
            "![Loss by position](positions.png)",
            "",
            "## Samples",
            "",
            f"Rows are classes, columns k; fixed seeds, no guidance, averaged weights after {step:,} steps.",
            "",
            f"![Samples](samples/step-{step:08d}.png)",
            "",
        ]
    )
