"""The measurement: one pass over the images, each encoded once, its tokens decoded at every k."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.checkpoint import fingerprint
from common.errors import InputError
from common.images import to_float
from common.runtime import move, pick_device, pick_dtype
from evaluation.features import FEATURES, FeatureExtractor
from evaluation.frechet import RunningStatistics, frechet_distance
from evaluation.reconstruction.codebook import CodebookCounts
from evaluation.reconstruction.config import ReconstructionConfig
from evaluation.reconstruction.data import open_images
from evaluation.reconstruction.rate import RateMeasurement, RateResults
from tokenizer.data import UnreadableFiles, spread
from tokenizer.decoding import PictureDecoder
from tokenizer.metrics import psnr, ssim
from tokenizer.perceptual import PerceptualDistance
from tokenizer.settings import DataConfig
from tokenizer.tokenizer import ChannelTokenizer

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReconstructionResults:
    """What was found.

    rows: one for each k, see `_row`. images: N, how many were read. unreadable: their count and names.
    reference: which images, out of how many, and how they were prepared.
    curve: mean PSNR in dB at k = 1..C over the first `curve_images` images of the curve; empty without one.
    sheet: for each shown image its pictures (3 H W) uint8 at every k, then the original.
    rate: rate under a linear prior; None if not measured.
    """

    rows: list[Row]
    images: int
    unreadable: dict[str, Any]
    reference: dict[str, Any]
    codebook: dict[str, Any]
    curve: list[float]
    curve_images: int
    sheet: list[list[Tensor]]
    rate: RateResults | None
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    device: torch.device
    seconds: float


def measure_reconstruction(
    tokenizer: ChannelTokenizer, data: DataConfig, config: ReconstructionConfig
) -> ReconstructionResults:
    """Measure at every k in one pass.

    Kept of an image are its scores alone: the statistics of its features are sums, and so are the counts of its codes.

    Raises:
        InputError: a device, data, weights or a k that cannot be had, or no readable image.
    """
    start = time.perf_counter()
    image_size, channels = tokenizer.config.image_size, tokenizer.config.num_channels
    budgets, device = config.budgets(image_size, channels), pick_device(config.device)
    images = open_images(data, image_size, config)
    comparison = Comparison(config, budgets, device)
    tokenizer = move(tokenizer, device)
    pictures = PictureDecoder(tokenizer, dtype=pick_dtype(config.dtype))
    codebook = CodebookCounts(channels, tokenizer.config.codebook_size, device)
    unreadable = UnreadableFiles(config.strict)
    rate_measurement = RateMeasurement(tokenizer, data, config, device, unreadable) if config.prior_images else None
    in_curve = set(spread(images.count, config.curve_images)) if config.curve_images else set()
    in_sheet = set(spread(images.count, config.sheet_images)) if config.sheet_images else set()
    curves: list[Tensor] = []
    sheet: list[list[Tensor]] = []
    seen = 0
    total = images.count * len(budgets) + len(in_curve) * channels
    with logging_redirect_tqdm(), tqdm(total=total, unit="picture", smoothing=0) as bar:
        for batch in images.batches:
            unreadable.note(batch)
            bar.update(len(batch.unreadable) * len(budgets))
            if not len(batch.images):
                continue
            originals = batch.images.to(device)
            # positions count what was readable, so that they do not hang on the batch size
            shown, curved = (
                [i for i in range(len(originals)) if seen + i in chosen] for chosen in (in_sheet, in_curve)
            )
            seen += len(originals)
            tokens = tokenizer.tokenize(to_float(originals))
            codebook.add(tokens)
            comparison.add_originals(originals)
            if rate_measurement is not None:
                rate_measurement.add(tokens, batch.labels, originals)
            columns = []
            for k in budgets:
                decoded = pictures(tokens[:, :k])
                comparison.add(k, originals, decoded)
                columns.append(decoded[shown].cpu())
                bar.update(len(decoded))
            sheet += [list(row) for row in zip(*columns, originals[shown].cpu(), strict=True)]
            if curved:
                curves.append(psnr_curve(pictures, tokens[curved], originals[curved], config.batch_size, bar.update))
        rate = rate_measurement.finish(pictures, budgets) if rate_measurement is not None and seen else None
    if not seen:
        raise InputError(f"none of the {images.count} images of {images.name} can be read; see the lines above")
    curve = torch.cat(curves).double() if curves else torch.empty(0, 0)
    last = tqdm(budgets, desc="distances", leave=False, disable=config.inception == "none")  # seconds for each k
    return ReconstructionResults(
        rows=[_row(k, k * tokenizer.config.num_bits / image_size**2, codebook, comparison, rate) for k in last],
        images=seen,
        unreadable=unreadable.summary(),
        reference={
            "set": f"the same {seen} images, as the tokenizer sees them",
            "name": images.name,
            "fingerprint": images.fingerprint,
            "available": images.available,
            "preparation": images.preparation,
        },
        codebook=codebook.summary(),
        curve=curve.mean(0).tolist() if curves else [],
        curve_images=len(curve),
        sheet=sheet,
        rate=rate,
        tokenizer=_description(tokenizer, config.tokenizer),
        config=asdict(data) | asdict(config),
        device=device,
        seconds=time.perf_counter() - start,
    )


def _description(tokenizer: ChannelTokenizer, name: str) -> dict[str, Any]:
    """The tokenizer, as results.json names it."""
    return {
        "name": name,
        "fingerprint": fingerprint(tokenizer),
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "image_size": tokenizer.config.image_size,
        "num_channels": tokenizer.config.num_channels,
        "num_bits": tokenizer.config.num_bits,
    }


class Comparison:
    """Scores of reconstructions against their originals, apart for each k."""

    def __init__(self, config: ReconstructionConfig, budgets: list[int], device: torch.device):
        self._lpips = PerceptualDistance(config.perceptual_weights).to(device) if config.perceptual != "none" else None
        self._features = FeatureExtractor(config.inception_weights, device) if config.inception != "none" else None
        self._original_statistics = RunningStatistics(FEATURES, device) if self._features else None
        self._statistics = {k: RunningStatistics(FEATURES, device) for k in budgets} if self._features else {}
        self._scores: dict[int, dict[str, list[float]]] = {k: {} for k in budgets}

    def add_originals(self, originals: Tensor) -> None:
        """Take in originals (b 3 H W) uint8, once whatever the number of k."""
        if self._features and self._original_statistics:
            self._original_statistics.update(self._features(originals))

    def add(self, k: int, originals: Tensor, decoded: Tensor) -> None:
        """Take in reconstructions (b 3 H W) uint8 from k tokens, of originals of that shape."""
        found = {"psnr": psnr(decoded, originals), "ssim": ssim(decoded, originals)}
        if self._lpips:
            with torch.no_grad():
                found["lpips"] = self._lpips(to_float(decoded), to_float(originals))
        if self._features:
            self._statistics[k].update(self._features(decoded))
        for name, values in found.items():
            self._scores[k].setdefault(name, []).extend(values.tolist())

    def means(self, k: int) -> dict[str, float | None]:
        """The means over images of psnr (dB), ssim and lpips, and rfid; None for what was not measured."""
        # fsum rounds once: neither the order of the images nor the batch size is in the result
        means = {name: math.fsum(values) / len(values) for name, values in self._scores[k].items()}
        rfid = None
        if self._original_statistics:
            rfid = frechet_distance(self._original_statistics, self._statistics[k])
        lpips = means["lpips"] if self._lpips else None
        return {"psnr": means["psnr"], "ssim": means["ssim"], "lpips": lpips, "rfid": rfid}


def _row(
    k: int, bits_per_pixel: float, codebook: CodebookCounts, comparison: Comparison, rate: RateResults | None
) -> Row:
    """A row for k.

    psnr (dB), ssim, lpips, rfid: see `Comparison.means`; null where not measured.
    bits_per_pixel: of the tokens as they are, k * num_bits / (H * W).
    codebook_use: share of the codes that occur among the first k channels.
    nats_per_token, bits: of the first k tokens under the fitted prior, a mean and a sum; null where not measured.
    prior_distance: Fréchet distance of the prior's samples from the images; null where not measured.
    """
    return {
        "num_tokens": k,
        **comparison.means(k),
        "bits_per_pixel": bits_per_pixel,
        "codebook_use": codebook.use(k),
        "nats_per_token": float(rate.nats[:k].mean()) if rate else None,
        "bits": float(rate.nats[:k].sum()) / math.log(2) if rate else None,
        "prior_distance": rate.distances.get(k) if rate else None,
    }


def psnr_curve(
    pictures: Callable[[Tensor, Tensor], Tensor],
    tokens: Tensor,
    originals: Tensor,
    at_once: int,
    done: Callable[[int], object],
) -> Tensor:
    """PSNR in dB at every k: tokens (b C), originals (b 3 H W) uint8 -> (b C).

    Args:
        pictures: tokens (n C) and lengths (n,) to pictures (n 3 H W) uint8.
        tokens: of the images.
        originals: the images.
        at_once: how many pictures are asked for in one call.
        done: told how many were decoded, after each call.
    """
    images, channels = tokens.shape
    ratios = []
    for part in torch.arange(images * channels).split(at_once):
        rows, lengths = part // channels, part % channels + 1
        rows = rows.to(tokens.device)
        ratios.append(psnr(pictures(tokens[rows], lengths), originals[rows]).cpu())
        done(len(part))
    return torch.cat(ratios).unflatten(0, (images, channels))
