"""Measure reconstructions: one pass over the images, each encoded once, its tokens decoded at every k."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.checkpoint import fingerprint
from common.config import InputError
from common.images import to_float
from common.runtime import move, pick_device, pick_dtype
from evaluation.config import ReconstructionConfig
from evaluation.features import FeatureExtractor
from evaluation.frechet import RunningStatistics, frechet_distance
from evaluation.reconstruction.rate import fit_prior, mean_nats, prior_samples
from evaluation.reports import machine, versions
from refiner.flow import ImageRefiner
from refiner.model import Refiner
from tokenizer.config import TokenizerConfig
from tokenizer.data import ImageBatch, ImageDataset, UnreadableFiles, collate, spread
from tokenizer.decoding import PictureDecoder
from tokenizer.metrics import psnr, ssim
from tokenizer.perceptual import PerceptualDistance
from tokenizer.settings import DataConfig
from tokenizer.sources import ImageSource, check_same_classes, open_source
from tokenizer.tokenizer import ChannelTokenizer

View = tuple[int, bool]  # k, and whether the image is refined
ORIGINALS = "originals"


class Distances:
    """Fréchet distances of sets of images from the originals, in the features of a network."""

    def __init__(self, network: FeatureExtractor):
        self._network = network
        self._sets: dict[Hashable, RunningStatistics] = defaultdict(network.statistics)

    def add(self, key: Hashable, images: Tensor) -> None:
        """Add images (b 3 H W) uint8 to a set."""
        self._sets[key].update(self._network(images))

    def of(self, key: Hashable) -> float | None:
        """Return the distance of a set; None for one without images."""
        return frechet_distance(self._sets[ORIGINALS], self._sets[key]) if key in self._sets else None


class Scores:
    """Scores of reconstructions against their originals, separately for each view."""

    def __init__(self, config: ReconstructionConfig, device: torch.device):
        self._lpips = PerceptualDistance(config.perceptual_weights).to(device) if config.perceptual != "none" else None
        self.distances: dict[str, Distances] = {}
        if config.inception != "none":
            self.distances["rfid"] = Distances(FeatureExtractor(config.inception_weights, device))
        if config.features is not None:
            self.distances["feature_distance"] = Distances(FeatureExtractor(device=device, classifier=config.features))
        self._scores: dict[View, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: dict[View, Tensor]) -> None:
        """Add originals (b 3 H W) uint8 and their reconstructions of that shape."""
        for distances in self.distances.values():
            distances.add(ORIGINALS, originals)
        for view, decoded in reconstructions.items():
            found = {"psnr": psnr(decoded, originals), "ssim": ssim(decoded, originals)}
            if self._lpips is not None:
                found["lpips"] = self._lpips(to_float(decoded), to_float(originals))
            for name, values in found.items():
                self._scores[view][name] += values.tolist()
            for distances in self.distances.values():
                distances.add(view, decoded)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each view: means over images of psnr (dB), ssim and lpips, and distances of sets.

        None: not measured. prior_distance: of images drawn from the prior, which `distances` has under the key k.
        """
        rows = []
        for (k, refined), scores in sorted(self._scores.items(), key=lambda item: item[0][::-1]):
            # fsum rounds once: the result depends neither on the order of the images nor on the batch size
            means = {name: math.fsum(values) / len(values) for name, values in scores.items()}
            sets = {name: distances.of((k, refined)) for name, distances in self.distances.items()}
            features = self.distances.get("feature_distance")
            drawn = {"prior_distance": None if features is None or refined else features.of(k)}
            absent = {"lpips": None, "rfid": None, "feature_distance": None}
            rows.append({"num_tokens": k, "refined": refined, **absent, **means, **sets, **drawn})
        return rows


def _rate(k: int, model: TokenizerConfig, use: list[float], nats: Tensor | None) -> dict[str, float | None]:
    """Fields of a row that only depend on k; `use` and `nats` (C,) as in `codebook_use` and `mean_nats`."""
    return {
        "bits_per_pixel": k * model.num_bits / model.image_size**2,
        "codebook_use": use[k - 1],
        "nats_per_token": None if nats is None else float(nats[:k].mean()),
        "bits": None if nats is None else float(nats[:k].sum()) / math.log(2),
    }


def codebook_use(tokens: Tensor, codes: int) -> tuple[dict[str, Any], list[float]]:
    """Count codes: tokens (N C), integers in [0, codes) -> a summary, and `use` of the first k channels at k = 1..C.

    In the summary, `use` is the share of the codes that occur, and `entropy_bits` the entropy of a channel's codes.
    """
    occurs = torch.zeros(codes, dtype=torch.bool)
    entropies, shares, use = [], [], []
    for channel in tokens.T:
        counts = torch.bincount(channel, minlength=codes)
        odds = counts[counts > 0].double() / len(tokens)
        entropies.append(abs(float(-(odds * odds.log2()).sum())))
        shares.append(len(odds) / codes)
        occurs |= counts > 0
        use.append(int(occurs.sum()) / codes)
    by_channel = {"use": shares, "entropy_bits": entropies}
    return {"codes": codes, "tokens_counted": tokens.numel(), "use": use[-1], "by_channel": by_channel}, use


def channel_curve(pictures: Callable[[Tensor], Tensor], tokens: Tensor, originals: list[Tensor]) -> dict[str, Any]:
    """Decode tokens (b C) at k = 1..C and compare with b originals (3 H W) uint8.

    Returns:
        `curve`: the number of images and their mean PSNR in dB at each k; `channel_gain`: what each channel adds to
        it, None for the first. Without originals they are empty and None.
    """
    lengths = range(1, tokens.shape[1] + 1) if originals else ()
    curve = [
        psnr(pictures(tokens[:, :k]).cpu(), torch.stack(originals)).double().mean().item()
        for k in tqdm(lengths, desc="curve", leave=False)
    ]
    gain = [None, *(after - before for before, after in pairwise(curve))] if curve else None
    return {"channel_gain": gain, "curve": {"images": len(originals), "psnr": curve}}


def _batches(
    source: ImageSource, size: int, config: ReconstructionConfig, unreadable: UnreadableFiles
) -> Iterator[ImageBatch]:
    """Read images, spread evenly; only batches with readable ones."""
    images = ImageDataset(source, size, augmentation=None, seed=0, replace_unreadable=False)
    keys: Any = [(index, 0) for index in spread(len(images), config.max_images or len(images))]
    loader = DataLoader(images, config.batch_size, sampler=keys, num_workers=config.num_workers, collate_fn=collate)
    with logging_redirect_tqdm():
        for batch in tqdm(loader, unit="batch"):
            unreadable.note(batch)
            if len(batch.images):
                yield batch


def load_refiner(
    config: ReconstructionConfig, tokenizer: ChannelTokenizer, classes: Sequence[str], device: torch.device
) -> ImageRefiner | None:
    """Load config.refiner, if there is one.

    Raises:
        InputError: a refiner of another tokenizer, or of another number of classes.
    """
    if config.refiner is None:
        return None
    refiner = Refiner.from_pretrained(config.refiner)
    if refiner.config.tokenizer_fingerprint != fingerprint(tokenizer):
        raise InputError(f"refiner {config.refiner} was trained for another tokenizer than {config.tokenizer}")
    if refiner.config.null_label != len(classes):
        raise InputError(f"refiner {config.refiner} has {refiner.config.null_label} classes, the images {len(classes)}")
    return ImageRefiner(move(refiner, device))


def measure_reconstruction(
    tokenizer: ChannelTokenizer, data: DataConfig, config: ReconstructionConfig
) -> tuple[dict[str, Any], list[list[Tensor]]]:
    """Measure at every k in one pass; of an image only tokens and scores are kept.

    Returns:
        What results.json holds, without the command; and for each shown image its pictures (3 H W) uint8 at every k,
        then the original. In a row psnr is in dB, codebook_use among the first k channels, nats_per_token and bits are
        of the first k tokens under the fitted prior; None if not measured.

    Raises:
        InputError: a device, data, weights or a k that is not available, or no readable image.
    """
    start, model = time.perf_counter(), tokenizer.config
    token_counts, device = config.token_counts(model.num_channels), pick_device(config.device)
    source, train = open_source(data, "val"), open_source(data, "train") if config.prior_images else None
    if train is not None:
        check_same_classes(train, source)
    refiner = load_refiner(config, tokenizer, source.classes, device)
    scores, unreadable = Scores(config, device), UnreadableFiles(config.strict)
    tokenizer = move(tokenizer, device)
    pictures = PictureDecoder(tokenizer, dtype=pick_dtype(config.dtype))

    def reconstructions(tokens: Tensor, labels: Tensor, seeds: list[int]) -> dict[View, Tensor]:
        found = {(k, False): pictures(tokens[:, :k]) for k in token_counts}
        if refiner is not None:
            refinement = refiner.refinement(config.refine)
            for k in token_counts:
                found[k, True] = refiner(found[k, False], [k] * len(seeds), labels.tolist(), seeds, refinement)
        return found

    total, seen = min(config.max_images or len(source), len(source)), 0
    # positions among the readable images, so that they do not depend on the batch size
    in_sheet, in_curve = (spread(total, count) for count in (config.sheet_images, config.curve_images))
    curve: dict[int, Tensor] = {}
    sheet: list[list[Tensor]] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in _batches(source, model.image_size, config, unreadable):
        originals = batch.images.to(device)
        tokens = tokenizer.tokenize(to_float(originals))
        parts.append((tokens.int().cpu(), batch.labels))
        decoded = reconstructions(tokens, batch.labels, list(range(seen, seen + len(tokens))))
        scores.add(originals, decoded)
        curve |= {i: image.clone() for i, image in enumerate(batch.images, seen) if i in in_curve}
        rows = zip(*decoded.values(), batch.images, strict=True)
        sheet += [[image.cpu().clone() for image in row] for i, row in enumerate(rows, seen) if i in in_sheet]
        seen += len(tokens)
    if not parts:
        raise InputError(f"none of the {total} images of {source.name} can be read; see the lines above")
    tokens, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    nats, prior_images, features = None, 0, scores.distances.get("feature_distance")
    if train is not None:
        prior, prior_images = fit_prior(tokenizer, train, config, unreadable)
        nats = mean_nats(prior, tokens, labels, config.batch_size)
        if features is not None:
            for drawn in prior_samples(prior, config.batch_size):
                for k in token_counts:
                    features.add(k, pictures(drawn[:, :k]))
    codebook, use = codebook_use(tokens, model.codebook_size)
    found = {
        "rows": [row | _rate(row["num_tokens"], model, use, nats) for row in scores.rows()],
        "images": len(tokens),
        "unreadable": unreadable.summary(),
        "reference": {"name": source.name, "fingerprint": source.fingerprint(), "available": len(source)},
        "codebook": codebook,
        "prior": None if nats is None else {"train_images": prior_images, "nats": nats.tolist()},
        **channel_curve(pictures, tokens[list(curve)], list(curve.values())),
        "tokenizer": {"name": config.tokenizer, "fingerprint": fingerprint(tokenizer), **asdict(model)},
        "settings": asdict(data) | asdict(config),
        "machine": machine(device),
        "versions": versions(),
        "seconds": time.perf_counter() - start,
    }
    return found, sheet
