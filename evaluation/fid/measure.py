"""The measurement: draw each sample once to the largest k, decode every k from its first tokens, compare each k."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import fingerprint, load_tensor, save_tensors
from common.errors import InputError
from common.files import read_json, write_text, written_whole
from common.images import save_png, to_pil
from common.randomness import generator_for
from common.runtime import Workers, is_out_of_memory, launched_workers, pick_dtype
from evaluation.features import sample_metrics
from evaluation.fid.config import FidConfig, sweep_settings
from evaluation.fid.reference import FeatureNetworks, Reference, read_reference
from evaluation.fid.report import metric_labels, write_report, write_sweep
from evaluation.frechet import frechet_distance
from evaluation.reports import machine, synchronize, versions
from generator.config import SamplingConfig
from generator.pipeline import ChannelTokPipeline

logger = logging.getLogger(__name__)
REFINED = "-refined"  # suffix of names
# tokens (b C), k, class labels, seeds -> images (b 3 H W) uint8
Variant = Callable[[Tensor, int, Sequence[int], Sequence[int]], Tensor]


def sample_labels(count: int, num_classes: int) -> list[int]:
    """Return class labels of samples: all classes in one random order, repeated, so that counts differ by at most 1."""
    order = torch.randperm(num_classes, generator=generator_for(6, num_classes)).tolist()
    return [order[sample % num_classes] for sample in range(count)]


class Samples:
    """N samples at every k, in one file parts/part-NNNNNN.safetensors for each batch: an interruption loses one batch.

    Tensors of a part: tokens (b k) int32, k the largest; draw_seconds (number of k), to each k from the start; and for
    each name of `views` features.NAME (b d), logits.NAME (b c), predicted.NAME (b,) and decode_seconds.NAME ().

    Raises:
        InputError: a k that the model lacks, or a folder with parts of other settings.
    """

    def __init__(
        self, config: FidConfig, pipeline: ChannelTokPipeline, networks: FeatureNetworks, sampling: SamplingConfig
    ):
        self.config, self.pipeline, self.networks, self.sampling = config, pipeline, networks, sampling
        self.folder, self.count = Path(config.output_dir) / "parts", config.num_samples
        self.token_counts = config.token_counts(pipeline.config.num_channels)
        # how images are made, by suffix of file and tensor names
        self.variants: dict[str, Variant] = {"": lambda tokens, k, labels, seeds: pipeline.pictures(tokens[:, :k])}
        refinement = pipeline.refinement(
            config.refine, cfg_scale=config.refine_cfg_scale, temperature=config.refine_temperature
        )
        refiner = pipeline.refiner
        if refinement is not None and refiner is not None:
            self.variants[REFINED] = lambda tokens, k, labels, seeds: refiner(
                pipeline.pictures(tokens[:, :k]), [k] * len(labels), labels, seeds, refinement
            )
        self.labels = sample_labels(self.count, pipeline.config.num_classes)
        self.settings = {
            "model": pipeline.fingerprint,
            "sampling": asdict(sampling),
            "num_tokens": self.token_counts,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "network": networks.extractor.fingerprint,
            "classifier": networks.classifier.fingerprint if networks.classifier else None,
            "dtype": config.dtype,
            "pictures_dtype": str(pipeline.pictures.dtype).removeprefix("torch."),
            "compile": config.compile,
            "refinement": None if refinement is None else asdict(refinement),
            "refiner": None if refinement is None or refiner is None else fingerprint(refiner.refiner),
            "device": networks.extractor.device.type,
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

    def views(self) -> Iterator[tuple[str, int, Variant]]:
        """Iterate over variants and k; the name of a view is k0032 and the variant's suffix."""
        for suffix, variant in self.variants.items():
            for k in self.token_counts:
                yield f"k{k:04d}{suffix}", k, variant

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
        return [load_tensor(self.path(part), name) for part in range(len(self))]

    def images(self, part: int, k: int, variant: Variant) -> Tensor:
        """Make the images (b 3 H W) uint8 of a part again from its tokens, on the CPU."""
        tokens = load_tensor(self.path(part), "tokens").long().to(self.networks.extractor.device)
        return variant(tokens, k, *self.batch(part)).cpu()

    def draw(self, workers: Workers) -> None:
        """Draw the missing parts of this process; an earlier run may have had fewer samples in its last part."""
        # parts are assigned before existing ones are skipped, so that no process depends on the progress of another
        missing = [
            part
            for part in range(workers.index, len(self), workers.count)
            if not self.path(part).is_file() or len(load_tensor(self.path(part), "tokens")) != len(self.batch(part)[0])
        ]
        if missing:  # compile and capture before timing
            for step in self.pipeline.stream(self.batch(missing[0])[0], 1, **vars(self.sampling)):
                self.pipeline.pictures(step.tokens)
        for part in tqdm(missing, unit="batch", desc="samples", disable=not workers.is_main):
            save_tensors(self.path(part), self._draw(*self.batch(part)))

    def _draw(self, labels: list[int], seeds: list[int]) -> dict[str, Tensor]:
        device, draw_seconds = self.networks.extractor.device, []
        begin = time.perf_counter()
        for step in self.pipeline.stream(labels, self.token_counts[-1], seeds, **vars(self.sampling)):
            if step.num_tokens in self.token_counts:
                synchronize(device)
                draw_seconds.append(time.perf_counter() - begin)
            tokens = step.tokens
        part = {"tokens": tokens.int(), "draw_seconds": torch.tensor(draw_seconds, dtype=torch.float64)}
        for name, k, variant in self.views():
            begin = time.perf_counter()
            images = variant(tokens, k, labels, seeds)
            synchronize(device)
            part[f"decode_seconds.{name}"] = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            part[f"features.{name}"], part[f"logits.{name}"], predicted = self.networks.extract(images)
            if predicted is not None:
                part[f"predicted.{name}"] = predicted
        return part

    def row(self, name: str, k: int, reference: Reference, distance: str) -> dict[str, Any]:
        """Compare a view with the reference: a row of results.json, `distance` names its distance."""
        statistics, accuracy = self.networks.statistics(), None
        features, logits = self.load(f"features.{name}"), torch.cat(self.load(f"logits.{name}"))
        for batch in features:
            statistics.update(batch)
        if self.networks.classifier is not None:
            right = torch.cat(self.load(f"predicted.{name}")) == torch.tensor(self.labels)
            accuracy = float(right.double().mean())
        draw_seconds = torch.stack(self.load("draw_seconds")).sum(0)[self.token_counts.index(k)]
        decode_seconds = torch.stack(self.load(f"decode_seconds.{name}")).sum()
        return {
            "num_tokens": k,
            "refined": name.endswith(REFINED),
            distance: frechet_distance(statistics, reference.statistics),
            **sample_metrics(torch.cat(features).to(statistics.mean.device), logits, reference.features),
            "class_accuracy": accuracy,
            "draw_seconds": float(draw_seconds) / self.count,
            "decode_seconds": float(decode_seconds) / self.count,
        }

    def export(self) -> None:
        """Write images/NAME/000000.png with config.save_images, samples-NAME.npz with config.save_npz.

        An archive has arr_0 (N H W 3) uint8 and arr_1, the class labels (N,), as the guided-diffusion evaluator reads.
        """
        folder, size = Path(self.config.output_dir), self.pipeline.tokenizer.config.image_size
        for name, k, variant in self.views() if self.config.save_images or self.config.save_npz else ():
            images = np.empty((self.count, size, size, 3), np.uint8)
            for part in tqdm(range(len(self)), unit="batch", desc=name, leave=False):
                batch, start = self.images(part, k, variant), part * self.config.batch_size
                images[start : start + len(batch)] = rearrange(batch, "b c h w -> b h w c").numpy()
                for i, image in enumerate(batch if self.config.save_images else ()):
                    save_png(to_pil(image), folder / "images" / name / f"{start + i:06d}.png")
            if self.config.save_npz:
                with written_whole(folder / f"samples-{name}.npz") as temporary, temporary.open("wb") as file:
                    np.savez(file, arr_0=images, arr_1=np.array(self.labels))


def measure_fid(config: FidConfig, given: dict[str, Any], command: str) -> None:
    """Measure one setting, or each combination of config.sweep, in one process or those of `accelerate launch`.

    Args:
        config: the settings.
        given: fields of `SamplingConfig` from the command line; the others are the model's own for the largest k.
        command: the command line, for the report.

    Raises:
        InputError: a model, network, reference or k that cannot be used, parts of other settings, or too little memory.
    """
    combinations = sweep_settings(config.sweep or [])
    for settings in combinations:
        SamplingConfig().override(given | settings)  # refuses wrong values before a model is loaded
    with launched_workers(config.device) as workers:
        try:
            pipeline = ChannelTokPipeline.from_pretrained(
                config.model, str(workers.device), pick_dtype(config.dtype), compile=config.compile
            )
            token_counts = config.token_counts(pipeline.config.num_channels)
            networks = FeatureNetworks.load(config, pipeline.config.class_names, workers.device)
            reference = read_reference(config, pipeline, networks, token_counts) if workers.is_main else None
            if reference is not None and config.save_reference is not None:
                reference.save(config.save_reference, networks.extractor)
            found = []
            for settings in combinations:
                title = ",".join(f"{name}={value}" for name, value in settings.items())
                folder = Path(config.output_dir) / ("sweep" if settings else "") / title
                sampling = pipeline.sampling(token_counts[-1], **given | settings)
                logger.info("sampling: %s", ", ".join(f"{name} {value}" for name, value in vars(sampling).items()))
                samples = Samples(replace(config, output_dir=str(folder)), pipeline, networks, sampling)
                begin = time.perf_counter()
                samples.draw(workers)
                workers.wait()
                if reference is not None:
                    found.append(_results(samples, reference, workers, command))
                    found[-1]["session_seconds"] = time.perf_counter() - begin
                    samples.export()
                    write_report(found[-1], folder)
            if config.sweep and workers.is_main:
                write_sweep(combinations, found, config)
            workers.wait()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(f"out of memory at batch_size {config.batch_size}; give a smaller --batch-size") from error


def _results(samples: Samples, reference: Reference, workers: Workers, command: str) -> dict[str, Any]:
    """The content of results.json, JSON values; see docs/fid.md."""
    pipeline, network = samples.pipeline, samples.networks.extractor
    labels = metric_labels(network.name, samples.count, reference.about)
    rows = [samples.row(name, k, reference, distance=next(iter(labels))) for name, k, _ in samples.views()]
    sizes = {name: getattr(pipeline.config, name) for name in ("num_channels", "num_bits", "num_classes")}
    model = {"name": samples.config.model, "fingerprint": pipeline.fingerprint}
    return {
        "rows": rows,
        "labels": labels,
        "num_samples": samples.count,
        "samples_by_class": "all classes in one random order, repeated",
        "backend": "torch-fidelity; Fréchet distance in float64",
        "processes": workers.count,
        "reference": reference.about,
        "anchors": reference.anchors,
        "network": {"name": network.name, "fingerprint": network.fingerprint},
        "model": model | {"image_size": pipeline.tokenizer.config.image_size} | sizes,
        **{name: samples.settings[name] for name in ("sampling", "seed", "classifier", "pictures_dtype")},
        **{name: samples.settings[name] for name in ("refinement", "refiner")},
        "settings": asdict(samples.config),
        "command": command,
        "machine": machine(workers.device),
        "versions": versions(["torch-fidelity"]),
        "pass_seconds": {
            "draw": max(row["draw_seconds"] for row in rows) * samples.count,
            "decode": sum(row["decode_seconds"] for row in rows) * samples.count,
        },
    }
