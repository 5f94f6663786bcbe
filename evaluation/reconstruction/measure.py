"""Measure reconstructions: one pass over the images, each encoded once, its tokens decoded at every k."""

import math
import time
from collections.abc import Callable, Iterable
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
from common.measuring import machine, versions
from common.runtime import move, pick_device, pick_dtype
from evaluation.features import FeatureExtractor
from evaluation.reconstruction.config import ReconstructionConfig
from evaluation.reconstruction.rate import Distances, add_samples, fit_prior, mean_nats
from tokenizer.data import ImageBatch, ImageDataset, UnreadableFiles, collate, spread
from tokenizer.decoding import PictureDecoder
from tokenizer.metrics import psnr, ssim
from tokenizer.perceptual import PerceptualDistance
from tokenizer.settings import DataConfig
from tokenizer.sources import check_same_classes, open_source
from tokenizer.tokenizer import ChannelTokenizer


class Scores:
    """Scores of reconstructions against their originals, separately for each k."""

    def __init__(self, config: ReconstructionConfig, budgets: list[int], device: torch.device):
        self._lpips = PerceptualDistance(config.perceptual_weights).to(device) if config.perceptual != "none" else None
        self._rfid: Distances | None = None
        if config.inception != "none":
            self._rfid = Distances(FeatureExtractor(config.inception_weights, device), budgets, device)
        self._scores: dict[int, dict[str, list[float]]] = {k: {} for k in budgets}

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: list[Tensor]) -> None:
        """Add originals (b 3 H W) uint8 and their reconstructions of that shape, one tensor for each k."""
        if self._rfid is not None:
            self._rfid.add_reference(originals)
        for (k, scores), decoded in zip(self._scores.items(), reconstructions, strict=True):
            found = {"psnr": psnr(decoded, originals), "ssim": ssim(decoded, originals)}
            if self._lpips is not None:
                found["lpips"] = self._lpips(to_float(decoded), to_float(originals))
            if self._rfid is not None:
                self._rfid.add(k, decoded)
            for name, values in found.items():
                scores.setdefault(name, []).extend(values.tolist())

    def means(self, k: int) -> dict[str, float | None]:
        """Return the means over images of psnr (dB), ssim and lpips, and rfid; None for what was not measured."""
        # fsum rounds once: the result depends neither on the order of the images nor on the batch size
        means = {name: math.fsum(values) / len(values) for name, values in self._scores[k].items()}
        rfid = self._rfid.at(k) if self._rfid is not None else None
        return {"psnr": means["psnr"], "ssim": means["ssim"], "lpips": means.get("lpips"), "rfid": rfid}


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


def psnr_curve(pictures: Callable[[Tensor], Tensor], tokens: Tensor, originals: list[Tensor]) -> list[float]:
    """Mean PSNR in dB at k = 1..C: tokens (b C), originals b times (3 H W) uint8; empty without originals."""
    if not originals:
        return []
    stacked, lengths = torch.stack(originals), range(1, tokens.shape[1] + 1)
    ratios = (psnr(pictures(tokens[:, :k]).cpu(), stacked) for k in tqdm(lengths, desc="curve", leave=False))
    return [ratio.double().mean().item() for ratio in ratios]


def _rows(
    budgets: list[int],
    tokenizer: ChannelTokenizer,
    scores: Scores,
    use: list[float],
    nats: Tensor | None,
    distances: Distances | None,
) -> list[dict[str, Any]]:
    """Build a row for each k; None stands for what was not measured.

    psnr (dB), ssim, lpips, rfid: see `Scores.means`. bits_per_pixel: of the tokens without an entropy coder.
    codebook_use: share of the codes that occur among the first k channels. nats_per_token, bits: of the first k tokens
    under the fitted prior, a mean and a sum. prior_distance: Fréchet distance of the prior's samples from the images.
    """
    return [
        {
            "num_tokens": k,
            **scores.means(k),
            "bits_per_pixel": k * tokenizer.config.num_bits / tokenizer.config.image_size**2,
            "codebook_use": use[k - 1],
            "nats_per_token": None if nats is None else float(nats[:k].mean()),
            "bits": None if nats is None else float(nats[:k].sum()) / math.log(2),
            "prior_distance": None if distances is None else distances.at(k),
        }
        for k in budgets
    ]


def _batches(images: ImageDataset, total: int, config: ReconstructionConfig) -> Iterable[ImageBatch]:
    """Read `total` of the images, spread evenly, in order."""
    keys = [(index, 0) for index in spread(len(images), total)]
    batches = [keys[i : i + config.batch_size] for i in range(0, total, config.batch_size)]
    return DataLoader(images, batch_sampler=batches, num_workers=config.num_workers, collate_fn=collate)


def measure_reconstruction(
    tokenizer: ChannelTokenizer, data: DataConfig, config: ReconstructionConfig
) -> tuple[dict[str, Any], list[list[Tensor]]]:
    """Measure at every k in one pass; of an image only tokens and scores are kept.

    Returns:
        What results.json holds, without the command; and for each shown image its pictures (3 H W) uint8 at every k,
        then the original.

    Raises:
        InputError: a device, data, weights or a k that is not available, or no readable image.
    """
    start, model = time.perf_counter(), tokenizer.config
    budgets, device = config.budgets(model.image_size, model.num_channels), pick_device(config.device)
    source = open_source(data, "val")
    train = open_source(data, "train") if config.prior_images else None
    if train is not None:
        check_same_classes(train, source)
    distances: Distances | None = None
    if config.features is not None:
        distances = Distances(FeatureExtractor(device=device, classifier=config.features), budgets, device)
    scores, unreadable = Scores(config, budgets, device), UnreadableFiles(config.strict)
    tokenizer = move(tokenizer, device)
    pictures = PictureDecoder(tokenizer, dtype=pick_dtype(config.dtype))
    images = ImageDataset(source, model.image_size, augmentation=None, seed=0, replace_unreadable=False)
    total = min(len(images), config.max_images or len(images))
    # positions among the readable images, so that they do not depend on the batch size
    in_sheet, in_curve = (spread(total, count) for count in (config.sheet_images, config.curve_images))
    kept: dict[int, Tensor] = {}
    parts: list[tuple[Tensor, Tensor]] = []
    with logging_redirect_tqdm():
        for batch in tqdm(_batches(images, total, config), unit="batch"):
            unreadable.note(batch)
            if not len(batch.images):
                continue
            seen = sum(len(labels) for _, labels in parts)
            kept |= {i: image for i, image in enumerate(batch.images, seen) if i in {*in_sheet, *in_curve}}
            originals = batch.images.to(device)
            tokens = tokenizer.tokenize(to_float(originals))
            parts.append((tokens.int().cpu(), batch.labels))
            scores.add(originals, [pictures(tokens[:, :k]) for k in budgets])
            if distances is not None:
                distances.add_reference(originals)
    if not parts:
        raise InputError(f"none of the {total} images of {source.name} can be read; see the lines above")
    tokens, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    nats, prior_images = None, 0
    if train is not None:
        prior, prior_images = fit_prior(tokenizer, train, config, unreadable)
        nats = mean_nats(prior, tokens, labels, config.batch_size)
        if distances is not None:
            add_samples(distances, prior, pictures, budgets, config)
    shown, curved = ([i for i in chosen if i in kept] for chosen in (in_sheet, in_curve))
    columns = [pictures(tokens[shown, :k]).cpu() for k in budgets if shown]
    curve = psnr_curve(pictures, tokens[curved], [kept[i] for i in curved])
    codebook, use = codebook_use(tokens, model.codebook_size)
    found = {
        "rows": _rows(budgets, tokenizer, scores, use, nats, distances),
        "images": len(tokens),
        "unreadable": unreadable.summary(),
        "reference": {"name": source.name, "fingerprint": source.fingerprint(), "available": len(images)},
        "codebook": codebook,
        "prior": None if nats is None else {"train_images": prior_images, "nats": nats.tolist()},
        "channel_gain": [None, *(after - before for before, after in pairwise(curve))] if curve else None,
        "curve": {"images": len(curved), "psnr": curve},
        "tokenizer": {"name": config.tokenizer, "fingerprint": fingerprint(tokenizer), **asdict(model)},
        "settings": asdict(data) | asdict(config),
        "machine": machine(device),
        "versions": versions(("torchmetrics", "torch-fidelity")),
        "seconds": time.perf_counter() - start,
    }
    return found, [[*(column[n] for column in columns), kept[i]] for n, i in enumerate(shown)]
