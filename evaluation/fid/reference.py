"""The reference of a measurement: a folder of images, a .npz of images, or features that an earlier run saved."""

import hashlib
import json
import logging
from collections.abc import Iterable
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

from common.config import InputError
from common.files import load_arrays, read_json, written_whole
from common.images import UnreadableImageError, load_image, to_float
from common.randomness import generator_for
from common.runtime import leave_signals_to_the_trainer
from evaluation.config import MIN_IMAGES, FidConfig
from evaluation.features import FeatureExtractor
from evaluation.frechet import RunningStatistics, frechet_distance
from generator.pipeline import ChannelTokPipeline
from tokenizer.data import spread

logger = logging.getLogger(__name__)
MAX_FEATURES = 10_000  # kept for KID, precision and recall, as in the guided-diffusion evaluator
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm"})
Batches = Iterable[tuple[Tensor, Tensor]]  # indices (b,) in the reference, images (b 3 H W) uint8


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    about: JSON values of results.json: name, fingerprint of all prepared pixels, count (M, the images behind mean and
        covariance; None where a .npz does not say), kept (the images behind KID, precision and recall), preparation,
        unreadable.
    statistics: mean and covariance of all features. features: (m d), of at most 10,000 images, spread evenly.
    """

    about: dict[str, Any]
    statistics: RunningStatistics
    features: Tensor

    def save(self, path: str, network: FeatureExtractor) -> None:
        """Write mu, sigma and features as a .npz, for `read_reference` with the same network."""
        about = json.dumps({"about": self.about, "network": f"{network.name} {network.fingerprint}"})
        mean, covariance = self.statistics.mean.cpu().numpy(), self.statistics.covariance.cpu().numpy()
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=mean, sigma=covariance, features=self.features.numpy(), about=np.array(about))


def read_reference(config: FidConfig, size: int, network: FeatureExtractor) -> Reference:
    """Read config.reference; images of a folder are scaled to `size` pixels.

    Raises:
        InputError: fewer than 10 readable images, a damaged file, or features of another network.
    """
    path, moments = Path(config.reference), None
    batches: Batches
    if path.is_dir():
        files = _image_files(path)
        total, batches = len(files), _folder_batches(files, size, config)
        preparation = f"upright, shorter side scaled to {size} pixels (Lanczos), middle square, 8 bits"
    else:
        content = load_arrays(path)
        if "features" in content:
            return _saved(path, content, network)
        images, moments = _npz_images(path, content, network)
        total = len(images)
        batches = zip(torch.arange(total).split(config.batch_size), images.split(config.batch_size), strict=True)
        preparation = "as in the file" + ("; mean and covariance are the file's (mu, sigma)" if moments else "")
    statistics, features, digest = network.statistics(), [], hashlib.sha256()
    kept = torch.zeros(total, dtype=torch.bool)
    kept[spread(total, MAX_FEATURES)] = True
    with tqdm(total=total, unit="image", desc="reference", leave=False) as bar:
        for indices, images in batches:
            images = images.contiguous()
            batch = network(images).cpu()
            statistics.update(batch)
            features.append(batch[kept[indices]])
            digest.update(images.numpy().data)
            bar.update(len(indices))
    if statistics.count < MIN_IMAGES:
        raise InputError(f"{path} holds {statistics.count} readable images; a reference needs at least {MIN_IMAGES}")
    about = {
        "name": path.as_posix(),
        "fingerprint": digest.hexdigest()[:16],
        "count": None if moments else statistics.count,
        "kept": sum(map(len, features)),
        "preparation": preparation,
        "unreadable": total - statistics.count,
    }
    return Reference(about=about, statistics=moments or statistics, features=torch.cat(features))


@torch.no_grad()
def measure_anchors(
    config: FidConfig, pipeline: ChannelTokPipeline, network: FeatureExtractor, token_counts: list[int]
) -> dict[str, Any]:
    """Measure the reference's own images: half against half, reconstructions from k tokens, and class accuracy.

    Values are JSON; an accuracy is None if a folder's name (config.class_names may map it) is no class of the network.
    """
    files, size = _image_files(Path(config.reference)), pipeline.tokenizer.config.image_size
    mapping = read_json(config.class_names) if config.class_names else {}
    names = [mapping.get(path.parent.name, path.parent.name) for path in files]
    halves = network.statistics(), network.statistics()
    statistics = {k: network.statistics() for k in [0, *token_counts]}  # 0: the images themselves
    logits: dict[int, list[Tensor]] = {k: [] for k in statistics}
    shown: list[int] = []
    for indices, images in _folder_batches(files, size, config):
        shown += indices.tolist()
        tokens = pipeline.tokenizer.tokenize(to_float(images).to(pipeline.tokenizer.device))
        for k in statistics:
            features, scores = network.extract(pipeline.pictures(tokens[:, :k]) if k else images)
            statistics[k].update(features)
            if network.class_names:
                logits[k].append(scores.cpu())
            for parity, half in enumerate(halves if k == 0 else ()):
                half.update(features.cpu()[indices % 2 == parity])  # files are sorted by class: a half has every class
    right = [names[i] for i in shown]
    shuffled = [right[i] for i in torch.randperm(len(shown), generator=generator_for(config.seed, 5)).tolist()]
    accuracy = {k: network.accuracy(torch.cat(found), right) if found else None for k, found in logits.items()}
    if network.class_names and accuracy[0] is None:
        missing = min(set(names) - set(network.class_names))
        logger.warning("folder %r of the reference is no class: its class accuracy needs --class-names", missing)
    real = {"distance": frechet_distance(*halves), "images": [half.count for half in halves]}
    return {
        "images": len(shown),
        "real": real | {"class_accuracy": accuracy[0]},
        "shuffled": {"class_accuracy": network.accuracy(torch.cat(logits[0]), shuffled) if logits[0] else None},
        "reconstructions": [
            {"num_tokens": k, "distance": frechet_distance(statistics[k], statistics[0]), "class_accuracy": accuracy[k]}
            for k in token_counts
        ],
    }


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())


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


def _npz_images(
    path: Path, content: dict[str, NDArray[Any]], network: FeatureExtractor
) -> tuple[Tensor, RunningStatistics | None]:
    """Images (n 3 h w) uint8 and, for Inception, mean and covariance, as the guided-diffusion evaluator uses them."""
    images, d = content.get("arr_0", np.empty(0)), network.dimensions
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"{path} has arr_0 of {images.dtype} {images.shape}; needed is uint8 (n, h, w, 3)")
    moments = None
    if network.is_inception and {"mu", "sigma"} <= content.keys():
        mean, covariance = torch.from_numpy(content["mu"]), torch.from_numpy(content["sigma"])
        if mean.shape != (d,) or covariance.shape != (d, d):
            raise InputError(f"{path} has mu and sigma of other shapes than ({d},) and ({d}, {d})")
        moments = RunningStatistics.from_moments(mean, covariance)
    return rearrange(torch.from_numpy(images), "n h w c -> n c h w"), moments


def _saved(path: Path, content: dict[str, NDArray[Any]], network: FeatureExtractor) -> Reference:
    header = json.loads(str(content["about"]))
    if header["network"] != f"{network.name} {network.fingerprint}":
        raise InputError(
            f"{path} has features of {header['network']}, not {network.name} {network.fingerprint}; give images"
        )
    mean, covariance, features = (torch.from_numpy(content[name]) for name in ("mu", "sigma", "features"))
    statistics = RunningStatistics.from_moments(mean, covariance)
    return Reference(about=header["about"], statistics=statistics, features=features)
