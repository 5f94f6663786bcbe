"""What samples are compared with: a folder of images, a file of the guided-diffusion evaluator, or a saved name."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.checkpoint import load_tensors, load_tensors_metadata, save_tensors
from common.errors import InputError
from common.images import UnreadableImageError, load_image
from common.runtime import leave_signals_to_the_trainer
from evaluation.features import FeatureExtractor
from evaluation.fid.config import FEWEST, QualityConfig
from evaluation.fid.npz import NpzPictures
from evaluation.frechet import RunningStatistics

logger = logging.getLogger(__name__)
KEPT = 10_000  # features that are kept for KID, precision and recall; the guided-diffusion evaluator has as many
DRAWN_MARK = "drawn.txt"  # lies beside pictures that a model has drawn
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class About:
    """Where a reference comes from, for reports: JSON values.

    fingerprint: stands for all pixels as they were prepared, or for the .npz. count: M, pictures behind mean and
    covariance (None: a file that does not tell). kept: those behind KID, precision and recall. decoded: whether the
    tokenizer has been over it. drawn_by: the model that drew it, if one did.
    """

    name: str
    fingerprint: str
    count: int | None
    kept: int
    preparation: str
    decoded: bool = False
    drawn_by: str | None = None
    unreadable: int = 0


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Pictures (b 3 H W) uint8 -> what a tokenizer makes of them, and that tokenizer's fingerprint."""

    apply: Callable[[Tensor], Tensor]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Mean and covariance of all pictures, and the features (m d) of up to 10,000 of them, spread evenly."""

    about: About
    statistics: RunningStatistics
    features: Tensor


class FolderImages(Dataset[tuple[Tensor | None, str]]):
    """The images below a folder, or `most` of them, spread evenly: (3 size size) uint8, or None and why not.

    `in_classes`: whether each lies in a folder of its class; `drawn_by`: the model that drew them, if one did.
    """

    def __init__(self, folder: Path, size: int, most: int | None):
        self.folder, self.size = folder, size
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        if len(paths) < FEWEST:
            raise InputError(f"{folder} holds {len(paths)} images; a reference needs at least {FEWEST}")
        count = min(most or len(paths), len(paths))
        self.available = len(paths)
        self.paths = [paths[i * len(paths) // count] for i in range(count)]
        self.in_classes = all(path.parent.parent == folder for path in paths)
        marks = [*folder.rglob(DRAWN_MARK), *(place / DRAWN_MARK for place in (folder.parent, folder.parent.parent))]
        mark = next((path for path in marks if path.is_file()), None)
        self.drawn_by = mark.read_text(encoding="utf-8").strip() if mark else None

    def labels(self, class_names: Sequence[str], folder_names: Mapping[str, str]) -> list[int] | None:
        """The class of each image, by its folder's name; None where a folder is of no known class.

        Args:
            class_names: of the model.
            folder_names: the class name of a folder, where that is not the folder's own.
        """
        places = {name: label for label, name in enumerate(class_names)}
        names = [folder_names.get(path.parent.name, path.parent.name) for path in self.paths]
        unknown = next((name for name in names if name not in places), None)
        if not self.in_classes or unknown is not None:
            return None
        return [places[name] for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return load_image(self.paths[index], self.size), ""
        except UnreadableImageError as error:
            return None, str(error)

    def batches(self, batch_size: int, num_workers: int) -> Iterator[tuple[list[int], Tensor]]:
        """Places and pictures (b 3 H W) uint8 of those that can be read, in order; the others are told."""
        loader: Any = DataLoader(
            self, batch_size=batch_size, num_workers=num_workers, collate_fn=list,
            worker_init_fn=leave_signals_to_the_trainer,
        )  # fmt: skip
        start = 0
        with tqdm(total=len(self), unit="image", desc="reference", leave=False) as bar:
            for batch in loader:
                there = [(place, image) for place, (image, _) in enumerate(batch, start) if image is not None]
                for image, reason in batch:
                    if image is None:
                        logger.warning("skipped unreadable image %s", reason)
                if there:
                    yield [place for place, _ in there], torch.stack([image for _, image in there])
                start += len(batch)
                bar.update(len(batch))


class Collector:
    """Statistics of all features, and an even spread of them."""

    def __init__(self, dimensions: int, total: int, device: torch.device):
        self.statistics = RunningStatistics(dimensions, device)
        kept = min(total, KEPT)
        self._wanted = {i * total // kept for i in range(kept)}
        self._kept: list[Tensor] = []
        self._seen = 0

    def add(self, features: Tensor) -> None:
        """Take in features (b d) on the CPU."""
        self.statistics.update(features)
        rows = [row for row in range(len(features)) if self._seen + row in self._wanted]
        self._kept.append(features[rows])
        self._seen += len(features)

    def features(self) -> Tensor:
        """Those that were kept, (m d)."""
        return torch.cat(self._kept)


def folder_reference(
    images: FolderImages,
    extractor: FeatureExtractor,
    config: QualityConfig,
    decode: Decoding | None,
    look: Callable[[list[int], Tensor], None] | None,
) -> Reference:
    """Read all images of a folder.

    Args:
        images: the folder.
        extractor: what sees them.
        config: batch size and workers.
        decode: what is done to them before; None leaves them alone.
        look: shown places and pictures (b 3 H W) uint8 of each batch, for anchors.

    Raises:
        InputError: fewer than 10 readable images.
    """
    found = Collector(extractor.dimensions, len(images), extractor.device)
    digest = hashlib.sha256()
    for places, pictures in images.batches(config.batch_size, config.num_workers):
        digest.update(pictures.numpy().data)
        found.add(extractor.see(pictures if decode is None else decode.apply(pictures))[0].cpu())
        if look is not None:
            look(places, pictures)
    if found.statistics.count < FEWEST:
        raise InputError(f"{images.folder} holds {found.statistics.count} readable images; needed are {FEWEST}")
    preparation = f"upright, shorter side scaled to {images.size} pixels (Lanczos), middle square, 8 bits"
    if decode is not None:
        preparation += f", then encoded and decoded at full length by tokenizer {decode.fingerprint}"
    features = found.features()
    return Reference(
        about=About(
            name=images.folder.as_posix(),
            fingerprint=digest.hexdigest()[:16],
            count=found.statistics.count,
            kept=len(features),
            preparation=preparation,
            decoded=decode is not None,
            drawn_by=images.drawn_by,
            unreadable=len(images) - found.statistics.count,
        ),
        statistics=found.statistics,
        features=features,
    )


def npz_reference(path: Path, extractor: FeatureExtractor, batch_size: int) -> Reference:
    """Read a .npz of pictures, and its mean and covariance (of Inception) where it has those.

    As the guided-diffusion evaluator does it: these are taken for the distance, if Inception looks, and the pictures
    for all else.

    Raises:
        InputError: no such file, other contents, or fewer than 10 pictures.
    """
    pictures = NpzPictures(path)
    if len(pictures) < FEWEST:
        raise InputError(f"{path} holds {len(pictures)} pictures; a reference needs at least {FEWEST}")
    collected = Collector(extractor.dimensions, len(pictures), extractor.device)
    with tqdm(total=len(pictures), unit="image", desc="reference", leave=False) as bar:
        for batch in pictures.batches(batch_size):
            collected.add(extractor.see(batch)[0].cpu())
            bar.update(len(batch))
    statistics: RunningStatistics = collected.statistics
    count: int | None = statistics.count
    preparation = f"{pictures.height}x{pictures.width}, as in the file"
    if extractor.is_inception and pictures.moments is not None:
        mean, covariance = pictures.moments
        d = extractor.dimensions
        if mean.shape != (d,) or covariance.shape != (d, d):
            shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
            raise InputError(f"{path} has {shapes}; needed are ({d},) and ({d}, {d})")
        statistics, count = RunningStatistics.from_moments(mean, covariance), None
        preparation += "; mean and covariance are the file's (mu, sigma), of as many pictures as it does not tell"
    features = collected.features()
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return Reference(
        about=About(
            name=path.as_posix(), fingerprint=fingerprint, count=count, kept=len(features),
            preparation=preparation, drawn_by=pictures.drawn_by,
        ),
        statistics=statistics,
        features=features,
    )  # fmt: skip


def saved_path(name: str) -> Path:
    """Where a reference of that name is kept: below $XDG_CACHE_HOME, or ~/.cache.

    Raises:
        InputError: a name that is none.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"reference name {name!r} is not allowed; use letters, digits, dots, dashes and underscores")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "channeltok" / "references" / f"{name}.safetensors"


def save_reference(reference: Reference, name: str, extractor: FeatureExtractor) -> None:
    """Keep a reference under a name, for `saved_reference`."""
    statistics = reference.statistics
    tensors = {"mean": statistics.mean, "scatter": statistics.scatter, "features": reference.features}
    about = asdict(reference.about) | {"statistics_count": statistics.count}
    header = {"about": json.dumps(about), "extractor": extractor.fingerprint, "network": extractor.name}
    save_tensors(saved_path(name), tensors, header)


def saved_reference(name: str, extractor: FeatureExtractor) -> Reference:
    """A reference that was kept under a name.

    Raises:
        InputError: none of that name, or one that another network has seen.
    """
    path = saved_path(name)
    if not path.is_file():
        known = sorted(other.stem for other in path.parent.glob("*.safetensors"))
        raise InputError(
            f"reference {name} is no folder, no .npz file and no saved name; saved are: {', '.join(known) or 'none'}"
        )
    header = load_tensors_metadata(path)
    if header.get("extractor") != extractor.fingerprint:
        raise InputError(
            f"reference {name} was seen by {header.get('network')} {header.get('extractor')}, these samples are by "
            f"{extractor.name} {extractor.fingerprint}; give the images, and --save-reference another name"
        )
    tensors = load_tensors(path)
    about = json.loads(header["about"])
    statistics = RunningStatistics(extractor.dimensions)
    statistics.count = about.pop("statistics_count")
    statistics.mean, statistics.scatter = tensors["mean"], tensors["scatter"]
    return Reference(about=About(**about), statistics=statistics, features=tensors["features"])
