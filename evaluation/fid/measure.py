"""The measurement: draw each sample once to the largest k, decode every k from its first tokens, compare each k."""

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import fingerprint, load_tensors, save_tensors
from common.config import InputError
from common.files import read_json, write_text, written_whole
from common.randomness import generator_for
from common.runtime import Workers, launched_workers, pick_dtype
from evaluation.config import FidConfig, sweep_settings
from evaluation.features import FeatureExtractor, sample_metrics
from evaluation.fid.reference import Reference, measure_anchors, read_reference
from evaluation.fid.report import metric_labels, write_fid, write_sweep
from evaluation.frechet import frechet_distance
from evaluation.reports import machine, synchronize, versions
from generator.config import SamplingConfig
from generator.pipeline import ChannelTokPipeline

logger = logging.getLogger(__name__)


def sample_labels(count: int, num_classes: int) -> list[int]:
    """Return class labels of samples: all classes in one random order, repeated, so that counts differ by at most 1."""
    order = torch.randperm(num_classes, generator=generator_for(6, num_classes)).tolist()
    return [order[sample % num_classes] for sample in range(count)]


class Samples:
    """N samples at every k, in one file parts/part-NNNNNN.safetensors for each batch: an interruption loses one batch.

    Tensors of a part: tokens (b k) int32, k the largest; draw_seconds (number of k), to each k from the start; and for
    each name of `views` features.NAME (b d), logits.NAME (b c) and decode_seconds.NAME ().

    Attributes:
        views: name (k0032, or k0032-refined), k, and whether images are refined.

    Raises:
        InputError: a k that the model lacks, or a folder with parts of other settings.
    """

    def __init__(
        self, config: FidConfig, pipeline: ChannelTokPipeline, network: FeatureExtractor, sampling: SamplingConfig
    ):
        self.config, self.pipeline, self.network, self.sampling = config, pipeline, network, sampling
        self.folder, self.count = Path(config.output_dir) / "parts", config.num_samples
        self.token_counts = config.token_counts(pipeline.config.num_channels)
        self.labels = sample_labels(self.count, pipeline.config.num_classes)
        self.names = [pipeline.config.class_names[label] for label in self.labels]
        self.refinement = pipeline.refinement(
            config.refine, cfg_scale=config.refine_cfg_scale, temperature=config.refine_temperature
        )
        refiner = pipeline.refiner if self.refinement else None
        self.views = [(f"k{k:04d}", k, False) for k in self.token_counts]
        if refiner:
            self.views += [(f"k{k:04d}-refined", k, True) for k in self.token_counts]
        has_classes = set(pipeline.config.class_names) <= set(network.class_names)
        self.settings = {
            "model": pipeline.fingerprint,
            "sampling": asdict(sampling),
            "num_tokens": self.token_counts,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "network": network.fingerprint,
            "classifier": network.fingerprint if has_classes else None,
            "dtype": config.dtype,
            "pictures_dtype": str(pipeline.pictures.dtype).removeprefix("torch."),
            "compile": config.compile,
            "refinement": self.refinement and asdict(self.refinement),
            "refiner": refiner and fingerprint(refiner.refiner),
            "device": network.device.type,
        }
        path = self.folder / "settings.json"
        if not path.is_file():
            write_text(path, json.dumps(self.settings, indent=1))
        before = read_json(path)
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{self.folder} was measured with {name} = {before.get(name)}, now it is {value}; give the same "
                    "settings, or another --output-dir"
                )

    def __len__(self) -> int:
        return -(-self.count // self.config.batch_size)

    def batch(self, part: int) -> tuple[list[int], list[int]]:
        """Class labels and seeds of a part."""
        start, size = part * self.config.batch_size, self.config.batch_size
        labels = self.labels[start : start + size]
        return labels, [self.config.seed + start + i for i in range(len(labels))]

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{part:06d}.safetensors"

    def load(self, name: str) -> list[Tensor]:
        """A tensor of every part, in order."""
        return [load_tensors(self.path(part))[name] for part in range(len(self))]

    def images(self, part: int, tokens: Tensor, k: int, refined: bool) -> Tensor:
        """Decode tokens (b C) of a part, and refine the images: (b 3 H W) uint8 on the CPU."""
        pending = self.pipeline.images(*self.batch(part)).start(
            tokens[:, :k], torch.full((len(tokens),), k), self.refinement if refined and self.refinement else 0
        )
        return pending.images()

    def draw(self, workers: Workers) -> None:
        """Draw the missing parts of this process; an earlier run may have had fewer samples in its last part."""
        # parts are assigned before existing ones are skipped, so that no process depends on the progress of another
        missing = [
            part
            for part in range(workers.index, len(self), workers.count)
            if not self.path(part).is_file() or len(load_tensors(self.path(part))["tokens"]) != len(self.batch(part)[0])
        ]
        if missing:  # compile and capture before timing
            for step in self.pipeline.stream(self.batch(missing[0])[0], 1, **vars(self.sampling)):
                self.pipeline.pictures(step.tokens)
        for part in tqdm(missing, unit="batch", desc="samples", disable=not workers.is_main):
            save_tensors(self.path(part), self._draw(part))

    def _draw(self, part: int) -> dict[str, Tensor]:
        (labels, seeds), draw_seconds = self.batch(part), []
        begin = time.perf_counter()
        for step in self.pipeline.stream(labels, self.token_counts[-1], seeds, **vars(self.sampling)):
            if step.num_tokens in self.token_counts:
                synchronize(self.network.device)
                draw_seconds.append(time.perf_counter() - begin)
            tokens = step.tokens
        found = {"tokens": tokens.int(), "draw_seconds": torch.tensor(draw_seconds, dtype=torch.float64)}
        for name, k, refined in self.views:
            begin = time.perf_counter()
            images = self.images(part, tokens, k, refined)
            found[f"decode_seconds.{name}"] = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            found[f"features.{name}"], found[f"logits.{name}"] = self.network.extract(images)
        return {name: tensor.cpu() for name, tensor in found.items()}

    def row(self, name: str, k: int, refined: bool, reference: Reference, distance: str) -> dict[str, Any]:
        """Compare a view with the reference: a row of results.json, `distance` names its distance."""
        statistics = self.network.statistics()
        features, logits = self.load(f"features.{name}"), torch.cat(self.load(f"logits.{name}"))
        for batch in features:
            statistics.update(batch)
        draw_seconds = torch.stack(self.load("draw_seconds")).sum(0)[self.token_counts.index(k)]
        decode_seconds = torch.stack(self.load(f"decode_seconds.{name}")).sum()
        return {
            "num_tokens": k,
            "refined": refined,
            distance: frechet_distance(statistics, reference.statistics),
            **sample_metrics(torch.cat(features).to(statistics.mean.device), logits, reference.features),
            "class_accuracy": self.network.accuracy(logits, self.names),
            "draw_seconds": float(draw_seconds) / self.count,
            "decode_seconds": float(decode_seconds) / self.count,
        }

    def export(self) -> None:
        """Make the images again from their tokens, and write samples-NAME.npz for the guided-diffusion evaluator.

        arr_0: (N H W 3) uint8; arr_1: class labels (N,).
        """
        size = self.pipeline.tokenizer.config.image_size
        for name, k, refined in self.views:
            images = np.empty((self.count, size, size, 3), np.uint8)
            for part in tqdm(range(len(self)), unit="batch", desc=name, leave=False):
                start, tokens = part * self.config.batch_size, load_tensors(self.path(part))["tokens"].long()
                batch = self.images(part, tokens, k, refined)
                images[start : start + len(batch)] = rearrange(batch, "b c h w -> b h w c").numpy()
            path = Path(self.config.output_dir) / f"samples-{name}.npz"
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.savez(file, arr_0=images, arr_1=np.array(self.labels))


def measure_fid(config: FidConfig, given: dict[str, Any], command: str) -> None:
    """Measure one setting, or each combination of config.sweep, in one process or those of `accelerate launch`.

    `given`: fields of `SamplingConfig`; the others are the model's own for the largest k.

    Raises:
        InputError: a model, network, reference or k that cannot be used, or parts of other settings.
    """
    combinations = sweep_settings(config.sweep or [])
    for settings in combinations:
        SamplingConfig().override(given | settings)  # refuses wrong values before a model is loaded
    with launched_workers(config.device) as workers:
        pipeline = ChannelTokPipeline.from_pretrained(
            config.model, str(workers.device), pick_dtype(config.dtype), compile=config.compile
        )
        token_counts, names = config.token_counts(pipeline.config.num_channels), pipeline.config.class_names
        network = FeatureExtractor(config.inception_weights, workers.device, classifier=config.features)
        if config.features is not None and (missing := sorted(set(names) - set(network.class_names))):
            logger.warning("%s lacks the class %r: class accuracy is not measured", config.features, missing[0])
        reference, anchors, found = None, None, []
        if workers.is_main:
            reference = read_reference(config, pipeline.tokenizer.config.image_size, network)
            if config.save_reference is not None:
                reference.save(config.save_reference, network)
            if config.anchors:
                anchors = measure_anchors(config, pipeline, network, token_counts)
        for settings in combinations:
            title = ",".join(f"{name}={value}" for name, value in settings.items())
            folder = Path(config.output_dir) / ("sweep" if settings else "") / title
            sampling = pipeline.sampling(token_counts[-1], **given | settings)
            logger.info("sampling: %s", ", ".join(f"{name} {value}" for name, value in vars(sampling).items()))
            samples = Samples(replace(config, output_dir=str(folder)), pipeline, network, sampling)
            begin = time.perf_counter()
            samples.draw(workers)
            workers.wait()
            if reference is not None:
                found.append(_results(samples, reference, workers) | {"anchors": anchors, "command": command})
                found[-1]["session_seconds"] = time.perf_counter() - begin
                if config.save_npz:
                    samples.export()
                write_fid(found[-1], folder)
        if config.sweep and workers.is_main:
            write_sweep(combinations, found, config)
        workers.wait()


def _results(samples: Samples, reference: Reference, workers: Workers) -> dict[str, Any]:
    """The content of results.json, JSON values; see docs/fid.md."""
    pipeline, network, settings = samples.pipeline, samples.network, samples.settings
    labels = metric_labels(network.name, samples.count, reference.about)
    rows = [samples.row(*view, reference, distance=next(iter(labels))) for view in samples.views]
    sizes = {name: getattr(pipeline.config, name) for name in ("num_channels", "num_bits", "num_classes")}
    model = {"name": samples.config.model, "fingerprint": pipeline.fingerprint}
    copied = ("sampling", "seed", "classifier", "pictures_dtype", "refinement", "refiner")
    return {
        "rows": rows,
        "labels": labels,
        "num_samples": samples.count,
        "samples_by_class": "all classes in one random order, repeated",
        "backend": "torch-fidelity; Fréchet distance in float64",
        "processes": workers.count,
        "reference": reference.about,
        "network": {"name": network.name, "fingerprint": network.fingerprint},
        "model": model | {"image_size": pipeline.tokenizer.config.image_size} | sizes,
        **{name: settings[name] for name in copied},
        "settings": asdict(samples.config),
        "machine": machine(workers.device),
        "versions": versions(),
        "pass_seconds": {
            "draw": max(row["draw_seconds"] for row in rows) * samples.count,
            "decode": sum(row["decode_seconds"] for row in rows) * samples.count,
        },
    }
