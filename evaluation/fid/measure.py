"""The measurement: the reference, the pass over all samples, and a row of figures for each k."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.checkpoint import fingerprint, read_json
from common.errors import InputError
from common.images import to_float
from common.runtime import pick_dtype
from common.team import Team
from evaluation.features import kernel_distance, kid_subset, precision_and_recall, score_of_logits
from evaluation.fid.anchors import Anchors
from evaluation.fid.config import QualityConfig
from evaluation.fid.labels import distance_field
from evaluation.fid.npz import write_npz
from evaluation.fid.parts import Parts
from evaluation.fid.reference import (
    Decoding,
    FolderImages,
    Reference,
    folder_reference,
    npz_reference,
    save_reference,
    saved_path,
    saved_reference,
)
from evaluation.fid.samples import (
    Eyes,
    draw_samples,
    labels_of,
    memory_errors,
    open_eyes,
    pictures_of,
    save_pictures,
)
from evaluation.frechet import RunningStatistics, frechet_distance
from generator.config import SamplingConfig
from generator.pipeline import ChannelTokPipeline

logger = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured and what looks at it: the same for all settings of a sweep."""

    pipeline: ChannelTokPipeline
    eyes: Eyes
    budgets: list[int]
    reference: Reference | None  # in the main process
    anchors: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class QualityResults:
    """What was found: rows, see `_row`; the parts they were taken from; seconds of this session alone."""

    rows: list[Row]
    sampling: SamplingConfig
    parts: Parts
    seconds: float


def open_subject(config: QualityConfig, team: Team) -> Subject:
    """Load the model and the networks that look; in the main process also the reference.

    Raises:
        InputError: a model, weights, a reference or a k that cannot be had.
    """
    pipeline = ChannelTokPipeline.from_pretrained(
        config.model, str(team.device), pick_dtype(config.dtype), compile=config.compile
    )
    budgets = config.budgets(pipeline.config.num_channels)
    eyes = open_eyes(config, pipeline.config.class_names, team.device)
    read = _reference_of(config, pipeline, eyes, budgets)
    with memory_errors(config):
        reference, anchors = read() if team.is_main else (None, None)
    return Subject(pipeline=pipeline, eyes=eyes, budgets=budgets, reference=reference, anchors=anchors)


def _reference_of(
    config: QualityConfig, pipeline: ChannelTokPipeline, eyes: Eyes, budgets: list[int]
) -> Callable[[], tuple[Reference, dict[str, Any] | None]]:
    """What reads the reference; what is plainly wrong is refused by all processes before."""
    path = Path(config.reference)
    if config.save_reference is not None:
        saved_path(config.save_reference)
    if not path.is_dir():
        for name in ("decode_reference", "anchors", "max_reference", "class_names"):
            if getattr(config, name):
                raise InputError(f"{name} is given, but reference {config.reference} is no folder of images")

    def kept(reference: Reference) -> Reference:
        if config.save_reference is not None:
            save_reference(reference, config.save_reference, eyes.extractor)
        return reference

    if path.is_dir():
        images = FolderImages(path, pipeline.tokenizer.config.image_size, config.max_reference)
        names = read_json(config.class_names) if config.class_names else {}

        def read() -> tuple[Reference, dict[str, Any] | None]:
            known = images.labels(pipeline.config.class_names, names)
            if config.anchors and eyes.classifier is not None and known is None:
                logger.warning("%s: folders are not named as the classes; give --class-names for class accuracy", path)
            anchors = Anchors(pipeline, eyes, budgets, known, config.seed) if config.anchors else None
            decode = _through_tokenizer(pipeline) if config.decode_reference else None
            look = anchors.look if anchors else None
            reference = kept(folder_reference(images, eyes.extractor, config, decode, look))
            return reference, anchors.summary() if anchors else None

        return read
    if path.is_file():
        return lambda: (kept(npz_reference(path, eyes.extractor, config.batch_size)), None)
    saved_path(config.reference)
    return lambda: (kept(saved_reference(config.reference, eyes.extractor)), None)


def _through_tokenizer(pipeline: ChannelTokPipeline) -> Decoding:
    tokenizer = pipeline.tokenizer

    @torch.no_grad()
    def decode(pictures: Tensor) -> Tensor:
        return pipeline.pictures(tokenizer.tokenize(to_float(pictures).to(tokenizer.device)))

    return Decoding(apply=decode, fingerprint=fingerprint(tokenizer))


def measure_quality(
    subject: Subject, sampling: SamplingConfig, config: QualityConfig, team: Team, title: str = ""
) -> QualityResults | None:
    """Draw what is missing, and measure in the main process; None in the others.

    Kept in memory are the features of one k. What a part holds is in `evaluation.fid.parts`.

    Args:
        subject: the model, what looks at its pictures and what they are compared with.
        sampling: how tokens are drawn.
        config: all else.
        team: the processes; a sample does not depend on how many there are.
        title: what the progress bar says.

    Raises:
        InputError: an output folder of other settings, or not memory enough.
    """
    begun = time.perf_counter()
    pipeline, eyes = subject.pipeline, subject.eyes
    settings = {
        "model": pipeline.fingerprint,
        "sampling": asdict(sampling),
        "num_tokens": subject.budgets,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "network": eyes.extractor.fingerprint,
        "classifier": eyes.classifier.fingerprint if eyes.classifier else None,
        "dtype": config.dtype,
        "pictures_dtype": str(pipeline.pictures.dtype).removeprefix("torch."),
        "compile": config.compile,
        "device": team.device.type,
    }
    parts = Parts(Path(config.output_dir) / "parts", settings, subject.budgets, config.num_samples, config.batch_size)
    parts.begin()
    if config.num_samples < pipeline.config.num_classes and team.is_main:
        logger.warning(
            "%d samples are fewer than the %d classes: those without a sample count for nothing",
            config.num_samples, pipeline.config.num_classes,
        )  # fmt: skip
    with logging_redirect_tqdm(), memory_errors(config):
        draw_samples(pipeline, sampling, config, eyes, parts, team, title)
    team.wait()
    if config.save_images:
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        drawn_by = f"{config.model} ({pipeline.fingerprint}), settings {digest}"
        save_pictures(pipeline, parts, Path(config.output_dir) / "images", drawn_by, team)
        team.wait()
    reference = subject.reference
    if reference is None:
        return None
    seconds = parts.seconds()
    bar = tqdm(subject.budgets, desc="distances", leave=False)
    rows = [_row(k, subject, reference, parts, seconds) for k in bar]
    if config.save_npz:
        _write_archives(subject, config, parts)
    return QualityResults(rows=rows, sampling=sampling, parts=parts, seconds=time.perf_counter() - begun)


def _row(k: int, subject: Subject, reference: Reference, parts: Parts, seconds: dict[str, Tensor]) -> Row:
    """A row for k.

    fid, or frechet_distance where it must not be called so; inception_score; kid, precision and recall against the
    reference's kept features; class_accuracy: share of samples that the classifier puts in the class asked for, null
    without one. draw_seconds, decode_seconds: for one sample, to k from the start and of its picture at k, in batches.
    """
    device = reference.statistics.mean.device
    features = parts.column("features", k)
    statistics = RunningStatistics(features.shape[1], device)
    for index in range(len(parts)):  # as they were drawn, so that sums do not depend on memory
        samples = parts.samples(index)
        statistics.update(features[samples.start : samples.stop])
    accuracy = None
    if subject.eyes.classes is not None:
        truth = torch.tensor(labels_of(range(parts.num_samples), subject.pipeline.config.num_classes))
        accuracy = float((parts.column("predicted", k) == truth).double().mean())
    precision, recall = precision_and_recall(features.to(device), reference.features.to(device))
    place = parts.budgets.index(k)
    field = distance_field(subject.eyes.extractor.name, parts.num_samples, reference.about)
    return {
        "num_tokens": k,
        field: frechet_distance(statistics, reference.statistics),
        "inception_score": score_of_logits(parts.column("logits", k)),
        "kid": kernel_distance(features, reference.features),
        "kid_subset": kid_subset(len(features), len(reference.features)),
        "precision": precision,
        "recall": recall,
        "class_accuracy": accuracy,
        "draw_seconds": float(seconds["draw"][place]) / parts.num_samples,
        "decode_seconds": float(seconds["decode"][place]) / parts.num_samples,
        "look_seconds": float(seconds["look"][place]) / parts.num_samples,
    }


def _write_archives(subject: Subject, config: QualityConfig, parts: Parts) -> None:
    """samples-kNNNN.npz for each k, its pictures decoded anew."""
    size, model = subject.pipeline.tokenizer.config.image_size, subject.pipeline
    labels = labels_of(range(parts.num_samples), model.config.num_classes)
    for k in tqdm(parts.budgets, desc="archives", leave=False):
        write_npz(
            Path(config.output_dir) / f"samples-k{k:04d}.npz",
            parts.num_samples,
            size,
            (pictures_of(model, parts, index, k) for index in range(len(parts))),
            labels,
            f"{config.model} ({model.fingerprint})",
        )
