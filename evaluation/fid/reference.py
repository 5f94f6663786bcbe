"""The networks that measure images, and the reference: a folder of images, a .npz, or a file of an earlier run."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.errors import InputError
from common.files import load_arrays, read_json, written_whole
from common.images import UnreadableImageError, load_image, to_float
from common.randomness import generator_for
from common.runtime import leave_signals_to_the_trainer
from evaluation.features import FeatureExtractor
from evaluation.fid.config import MIN_IMAGES, FidConfig
from evaluation.frechet import RunningStatistics, frechet_distance
from generator.pipeline import ChannelTokPipeline

logger = logging.getLogger(__name__)
MAX_FEATURES = 10_000  # kept for KID, precision and recall, as in the guided-diffusion evaluator
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm"})
Batches = Iterable[tuple[Tensor, Tensor]]  # indices (b,) in the reference, images (b 3 H W) uint8


@dataclass(frozen=True, kw_only=True)
class FeatureNetworks:
    """A feature extractor and, for class accuracy, a classifier.

    classes: the model's class of each output of the classifier, -1 for others.
    """

    extractor: FeatureExtractor
    classifier: FeatureExtractor | None
    classes: Tensor

    @classmethod
    def load(cls, config: FidConfig, class_names: Sequence[str], device: torch.device) -> "FeatureNetworks":
        """Load the networks of a configuration.

        Raises:
            InputError: weights that cannot be read, or a --classifier without some of the model's classes.
        """
        extractor = FeatureExtractor(config.inception_weights, device, classifier=config.features)
        is_other = config.classifier is not None
        classifier = FeatureExtractor(device=device, classifier=config.classifier) if is_other else extractor
        missing = [name for name in class_names if name not in classifier.class_names]
        if missing and is_other:
            raise InputError(f"{config.classifier} lacks {len(missing)} classes of the model, first {missing[0]!r}")
        if missing and config.features is not None:
            logger.warning("%s lacks class %r: class accuracy is not measured", config.features, missing[0])
        labels = {name: label for label, name in enumerate(class_names)}
        classes = torch.tensor([labels.get(name, -1) for name in classifier.class_names])
        return cls(extractor=extractor, classifier=None if missing else classifier, classes=classes)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (b 3 H W) uint8 -> features (b d), logits (b c) and predicted classes (b,) or None, on the CPU."""
        features, logits = (output.cpu() for output in self.extractor.extract(images))
        if self.classifier is None:
            return features, logits, None
        scores = logits if self.classifier is self.extractor else self.classifier.extract(images)[1].cpu()
        return features, logits, self.classes[scores.argmax(1)]

    def statistics(self) -> RunningStatistics:
        """Create empty statistics of the features."""
        return RunningStatistics(self.extractor.dimensions, self.extractor.device)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    about: JSON values of results.json: name, fingerprint of all prepared pixels, count (M, the images behind mean and
        covariance; None where a .npz does not say), kept (the images behind KID, precision and recall), preparation,
        unreadable.
    statistics: mean and covariance of all features. features: (m d), of at most 10,000 images, spread evenly.
    anchors: see `_measure_anchors`.
    """

    about: dict[str, Any]
    statistics: RunningStatistics
    features: Tensor
    anchors: dict[str, Any] | None = None

    def save(self, path: str, extractor: FeatureExtractor) -> None:
        """Write mu, sigma and features as a .npz, for `read_reference` with the same extractor."""
        about = json.dumps({"about": self.about, "network": f"{extractor.name} {extractor.fingerprint}"})
        mean, covariance = self.statistics.mean.cpu().numpy(), self.statistics.covariance.cpu().numpy()
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=mean, sigma=covariance, features=self.features.numpy(), about=np.array(about))


def read_reference(
    config: FidConfig, pipeline: ChannelTokPipeline, networks: FeatureNetworks, token_counts: list[int]
) -> Reference:
    """Read config.reference; with config.anchors measure its own images as well.

    Raises:
        InputError: fewer than 10 readable images, a damaged file, or features of another network.
    """
    path, size = Path(config.reference), pipeline.tokenizer.config.image_size
    moments: RunningStatistics | None = None
    batches: Batches
    if path.is_dir():
        files = sorted(path for path in path.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        total, batches = len(files), _folder_batches(files, size, config)
        preparation = f"upright, shorter side scaled to {size} pixels (Lanczos), middle square, 8 bits"
    else:
        content = load_arrays(path)
        if "features" in content:
            return _saved(path, content, networks.extractor)
        images, moments = _npz_images(path, content, networks.extractor)
        total = len(images)
        batches = zip(torch.arange(total).split(config.batch_size), images.split(config.batch_size), strict=True)
        preparation = "as in the file" + ("; mean and covariance are the file's (mu, sigma)" if moments else "")
    statistics, features, digest = networks.statistics(), [], hashlib.sha256()
    kept = torch.zeros(total, dtype=torch.bool)
    kept[[i * total // min(total, MAX_FEATURES) for i in range(min(total, MAX_FEATURES))]] = True
    with tqdm(total=total, unit="image", desc="reference", leave=False) as bar:
        for indices, images in batches:
            images = images.contiguous()
            batch = networks.extract(images)[0]
            statistics.update(batch)
            features.append(batch[kept[indices]])
            digest.update(images.numpy().data)
            bar.update(len(indices))
    if statistics.count < MIN_IMAGES:
        raise InputError(f"{path} holds {statistics.count} readable images; a reference needs at least {MIN_IMAGES}")
    anchors = _measure_anchors(files, config, pipeline, networks, token_counts) if config.anchors else None
    about = {
        "name": path.as_posix(),
        "fingerprint": digest.hexdigest()[:16],
        "count": None if moments else statistics.count,
        "kept": sum(map(len, features)),
        "preparation": preparation,
        "unreadable": total - statistics.count,
    }
    return Reference(about=about, statistics=moments or statistics, features=torch.cat(features), anchors=anchors)


@torch.no_grad()
def _measure_anchors(
    files: list[Path],
    config: FidConfig,
    pipeline: ChannelTokPipeline,
    networks: FeatureNetworks,
    token_counts: list[int],
) -> dict[str, Any]:
    """Measure the reference's own images: half against half, reconstructions from k tokens, and class accuracy.

    Values are JSON; an accuracy is None without a classifier or without known classes.
    """
    labels = _labels(files, pipeline.config.class_names, config.class_names)
    halves = networks.statistics(), networks.statistics()
    statistics = {k: networks.statistics() for k in [0, *token_counts]}  # 0: the images themselves
    predicted: dict[int, list[Tensor]] = {k: [] for k in statistics}
    order: list[Tensor] = []
    for indices, images in _folder_batches(files, pipeline.tokenizer.config.image_size, config):
        order.append(indices)
        tokens = pipeline.tokenizer.tokenize(to_float(images).to(pipeline.tokenizer.device))
        for k in statistics:
            features, _, classes = networks.extract(pipeline.pictures(tokens[:, :k]) if k else images)
            statistics[k].update(features)
            predicted[k] += [] if classes is None else [classes]
            for parity, half in enumerate(halves if k == 0 else ()):
                half.update(features[indices % 2 == parity])  # files are sorted by class: a half has every class
    shown = torch.cat(order)
    shuffle = torch.randperm(len(shown), generator=generator_for(config.seed, 5))

    def accuracy(k: int, shown: Tensor) -> float | None:
        if labels is None or not predicted[k]:
            return None
        return float((torch.cat(predicted[k]) == labels[shown]).double().mean())

    real = {"distance": frechet_distance(*halves), "images": [half.count for half in halves]}
    distances = {k: frechet_distance(statistics[k], statistics[0]) for k in token_counts}
    return {
        "images": len(shown),
        "real": real | {"class_accuracy": accuracy(0, shown)},
        "shuffled": {"class_accuracy": accuracy(0, shown[shuffle])},
        "reconstructions": [
            {"num_tokens": k, "distance": distances[k], "class_accuracy": accuracy(k, shown)} for k in token_counts
        ],
    }


def _folder_batches(files: list[Path], size: int, config: FidConfig) -> Batches:
    loader: Any = DataLoader(
        list(enumerate(files)),  # type: ignore[arg-type]  # a list is a dataset
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        collate_fn=partial(_load_images, size=size),
        worker_init_fn=leave_signals_to_the_trainer,
    )
    return (batch for batch in loader if len(batch[0]))


def _load_images(files: list[tuple[int, Path]], size: int) -> tuple[Tensor, Tensor]:
    """Load the readable images, and their indices."""
    indices, images = [], [torch.empty(0, 3, size, size, dtype=torch.uint8)]
    for index, path in files:
        try:
            images.append(load_image(path, size)[None])
            indices.append(index)
        except UnreadableImageError as error:
            logger.warning("unreadable image omitted: %s", error)
    return torch.tensor(indices, dtype=torch.long), torch.cat(images)


def _labels(files: list[Path], class_names: Sequence[str], mapping: str | None) -> Tensor | None:
    """Classes (n,) by the folders' names, or the names that a JSON file maps them to; None if one is unknown."""
    folders = read_json(mapping) if mapping else {}
    labels = {name: label for label, name in enumerate(class_names)}
    names = [folders.get(path.parent.name, path.parent.name) for path in files]
    unknown = next((name for name in names if name not in labels), None)
    if unknown is not None:
        logger.warning("folder %s is no class: class accuracy of the reference needs --class-names", unknown)
        return None
    return torch.tensor([labels[name] for name in names])


def _npz_images(
    path: Path, content: dict[str, NDArray[Any]], extractor: FeatureExtractor
) -> tuple[Tensor, RunningStatistics | None]:
    """Images (n 3 h w) uint8 and, for Inception, mean and covariance, as the guided-diffusion evaluator uses them."""
    images, d = content.get("arr_0", np.empty(0)), extractor.dimensions
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"{path} has arr_0 of {images.dtype} {images.shape}; needed is uint8 (n, h, w, 3)")
    moments = None
    if extractor.is_inception and {"mu", "sigma"} <= content.keys():
        mean, covariance = torch.from_numpy(content["mu"]), torch.from_numpy(content["sigma"])
        if mean.shape != (d,) or covariance.shape != (d, d):
            raise InputError(f"{path} has mu and sigma of other shapes than ({d},) and ({d}, {d})")
        moments = RunningStatistics.from_moments(mean, covariance)
    return rearrange(torch.from_numpy(images), "n h w c -> n c h w"), moments


def _saved(path: Path, content: dict[str, NDArray[Any]], extractor: FeatureExtractor) -> Reference:
    header = json.loads(str(content["about"]))
    if header["network"] != f"{extractor.name} {extractor.fingerprint}":
        raise InputError(
            f"{path} has features of {header['network']}, not {extractor.name} {extractor.fingerprint}; give images"
        )
    mean, covariance, features = (torch.from_numpy(content[name]) for name in ("mu", "sigma", "features"))
    statistics = RunningStatistics.from_moments(mean, covariance)
    return Reference(about=header["about"], statistics=statistics, features=features)
