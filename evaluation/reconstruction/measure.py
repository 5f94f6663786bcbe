"""Measure reconstructions: one pass over the images, each encoded once, its tokens decoded at every k."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.checkpoint import fingerprint
from common.errors import InputError
from common.images import to_float
from common.runtime import move, pick_device, pick_dtype
from evaluation.features import FeatureExtractor
from evaluation.reconstruction.config import ReconstructionConfig
from evaluation.reconstruction.rate import Distances, add_samples, fit_prior, mean_nats
from evaluation.reports import machine, versions
from refiner.flow import ImageRefiner
from refiner.model import Refiner
from tokenizer.config import TokenizerConfig
from tokenizer.data import ImageDataset, UnreadableFiles, collate, spread
from tokenizer.decoding import PictureDecoder
from tokenizer.metrics import psnr, ssim
from tokenizer.perceptual import PerceptualDistance
from tokenizer.settings import DataConfig
from tokenizer.sources import check_same_classes, open_source
from tokenizer.tokenizer import ChannelTokenizer

View = tuple[int, bool]  # k, and whether the image is refined


class Scores:
    """Scores of reconstructions against their originals, separately for each view."""

    def __init__(self, config: ReconstructionConfig, views: list[View], device: torch.device):
        self._lpips = PerceptualDistance(config.perceptual_weights).to(device) if config.perceptual != "none" else None
        self._rfid: Distances | None = None
        if config.inception != "none":
            self._rfid = Distances(FeatureExtractor(config.inception_weights, device), views, device)
        self._features: Distances | None = None
        self.prior: Distances | None = None  # of the prior's samples from the originals
        if config.features is not None:
            extractor = FeatureExtractor(device=device, classifier=config.features)
            self._features = Distances(extractor, views, device)
            if config.prior_images:
                self.prior = Distances(extractor, [k for k, refined in views if not refined], device)
        self._scores: dict[View, dict[str, list[float]]] = {view: {} for view in views}

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: list[Tensor]) -> None:
        """Add originals (b 3 H W) uint8 and their reconstructions of that shape, one tensor for each view."""
        for distances in (self._rfid, self._features, self.prior):
            if distances is not None:
                distances.add_reference(originals)
        for (view, scores), decoded in zip(self._scores.items(), reconstructions, strict=True):
            found = {"psnr": psnr(decoded, originals), "ssim": ssim(decoded, originals)}
            if self._lpips is not None:
                found["lpips"] = self._lpips(to_float(decoded), to_float(originals))
            for distances in (self._rfid, self._features):
                if distances is not None:
                    distances.add(view, decoded)
            for name, values in found.items():
                scores.setdefault(name, []).extend(values.tolist())

    def means(self, view: View) -> dict[str, float | None]:
        """Return means over images of psnr (dB), ssim, lpips, and distances of sets; None for what was not measured."""
        # fsum rounds once: the result depends neither on the order of the images nor on the batch size
        means = {name: math.fsum(values) / len(values) for name, values in self._scores[view].items()}
        distances = {"rfid": self._rfid, "feature_distance": self._features}
        return {
            "lpips": None,
            **means,
            **{name: None if found is None else found.of(view) for name, found in distances.items()},
            "prior_distance": None if self.prior is None or view[1] else self.prior.of(view[0]),
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


def _row(view: View, model: TokenizerConfig, scores: Scores, use: list[float], nats: Tensor | None) -> dict[str, Any]:
    """A row of results.json; `use` and `nats` (C,) as in `codebook_use` and `mean_nats`."""
    k, refined = view
    rate = None if nats is None else nats[:k]
    return {
        "num_tokens": k,
        "refined": refined,
        **scores.means(view),
        "bits_per_pixel": k * model.num_bits / model.image_size**2,
        "codebook_use": use[k - 1],
        "nats_per_token": None if rate is None else float(rate.mean()),
        "bits": None if rate is None else float(rate.sum()) / math.log(2),
    }


def load_refining(
    config: ReconstructionConfig, tokenizer: ChannelTokenizer, classes: Sequence[str], device: torch.device
) -> Callable[[Tensor, int, Tensor, list[int]], Tensor] | None:
    """Load config.refiner: images (b 3 H W) uint8 of k tokens, k, labels (b,), seeds -> refined ones; None without it.

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
    images = ImageRefiner(move(refiner, device))
    refinement = images.refinement(config.refine)
    return lambda decoded, k, labels, seeds: images(decoded, [k] * len(decoded), labels.tolist(), seeds, refinement)


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
    budgets, device = config.budgets(model.image_size, model.num_channels), pick_device(config.device)
    source, train = open_source(data, "val"), open_source(data, "train") if config.prior_images else None
    if train is not None:
        check_same_classes(train, source)
    refine = load_refining(config, tokenizer, source.classes, device)
    views = [(k, refined) for refined in (False, True) for k in budgets if refine or not refined]
    scores, unreadable = Scores(config, views, device), UnreadableFiles(config.strict)
    tokenizer = move(tokenizer, device)
    pictures = PictureDecoder(tokenizer, dtype=pick_dtype(config.dtype))

    def reconstructions(tokens: Tensor, labels: Tensor, seeds: list[int]) -> list[Tensor]:
        decoded = {k: pictures(tokens[:, :k]) for k in budgets}
        return [refine(decoded[k], k, labels, seeds) if refined and refine else decoded[k] for k, refined in views]

    images = ImageDataset(source, model.image_size, augmentation=None, seed=0, replace_unreadable=False)
    keys = [(index, 0) for index in spread(len(images), config.max_images or len(images))]
    options: dict[str, Any] = {"sampler": keys, "num_workers": config.num_workers, "collate_fn": collate}
    # positions among the readable images, so that they do not depend on the batch size
    in_sheet, in_curve = (spread(len(keys), count) for count in (config.sheet_images, config.curve_images))
    kept: dict[int, Tensor] = {}
    parts: list[tuple[Tensor, Tensor]] = []
    with logging_redirect_tqdm():
        for batch in tqdm(DataLoader(images, config.batch_size, **options), unit="batch"):
            unreadable.note(batch)
            if len(batch.images):
                seen = sum(len(labels) for _, labels in parts)
                kept |= {i: image for i, image in enumerate(batch.images, seen) if i in {*in_sheet, *in_curve}}
                originals = batch.images.to(device)
                tokens = tokenizer.tokenize(to_float(originals))
                parts.append((tokens.int().cpu(), batch.labels))
                seeds = list(range(seen, seen + len(tokens)))
                scores.add(originals, reconstructions(tokens, batch.labels, seeds))
    if not parts:
        raise InputError(f"none of the {len(keys)} images of {source.name} can be read; see the lines above")
    tokens, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    nats, prior_images = None, 0
    if train is not None:
        prior, prior_images = fit_prior(tokenizer, train, config, unreadable)
        nats = mean_nats(prior, tokens, labels, config.batch_size)
        if scores.prior is not None:
            add_samples(scores.prior, prior, pictures, budgets, config.batch_size)
    shown, curved = ([i for i in chosen if i in kept] for chosen in (in_sheet, in_curve))
    columns = reconstructions(tokens[shown], labels[shown], shown) if shown else []
    codebook, use = codebook_use(tokens, model.codebook_size)
    found = {
        "rows": [_row(view, model, scores, use, nats) for view in views],
        "images": len(tokens),
        "unreadable": unreadable.summary(),
        "reference": {"name": source.name, "fingerprint": source.fingerprint(), "available": len(images)},
        "codebook": codebook,
        "prior": None if nats is None else {"train_images": prior_images, "nats": nats.tolist()},
        **channel_curve(pictures, tokens[curved], [kept[i] for i in curved]),
        "tokenizer": {"name": config.tokenizer, "fingerprint": fingerprint(tokenizer), **asdict(model)},
        "settings": asdict(data) | asdict(config),
        "machine": machine(device),
        "versions": versions(("torchmetrics", "torch-fidelity")),
        "seconds": time.perf_counter() - start,
    }
    return found, [[*(column[n].cpu() for column in columns), kept[i]] for n, i in enumerate(shown)]
