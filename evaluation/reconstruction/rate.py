"""Rate of the tokens under a linear prior that is fitted from scratch, and images drawn from that prior."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from common.bit_prior import BitPrior, fit_bit_prior
from common.errors import InputError
from evaluation.features import FeatureExtractor
from evaluation.frechet import RunningStatistics, frechet_distance
from evaluation.reconstruction.config import ReconstructionConfig
from tokenizer.bsq import pack_bits, unpack_bits
from tokenizer.data import UnreadableFiles, spread
from tokenizer.extraction import VIEWS, tokenize_files
from tokenizer.settings import DataConfig
from tokenizer.sources import check_same_classes, open_source
from tokenizer.tokenizer import ChannelTokenizer

FIT_BATCH = 512  # images a step of the prior's fit
Pictures = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class RateResults:
    """Rate of held-out images under the fitted prior.

    Attributes:
        nats: mean negative log-likelihood of each token, (C,) float64.
        distances: for each k the Fréchet distance between prior samples and the held-out images; empty without
            features.
        sheet: for each of the first samples its images (3 H W) uint8 at every k.
        train_images: number of images that the prior was fitted to.
    """

    nats: Tensor
    distances: dict[int, float]
    sheet: list[list[Tensor]]
    train_images: int


class RateMeasurement:
    """Collect held-out tokens, then fit a prior to tokens of training images and evaluate it on the held-out ones.

    Args:
        tokenizer: on `device`.
        data: the prior is fitted to its training split.
        config: settings of the measurement.
        device: where to compute.
        unreadable: collects images that cannot be read.

    Raises:
        InputError: a training split or a classifier that cannot be read, or classes that differ between the splits.
    """

    def __init__(
        self,
        tokenizer: ChannelTokenizer,
        data: DataConfig,
        config: ReconstructionConfig,
        device: torch.device,
        unreadable: UnreadableFiles,
    ):
        self.tokenizer, self.config, self.device, self.unreadable = tokenizer, config, device, unreadable
        self._source = open_source(data, "train")
        check_same_classes(self._source, open_source(data, "val"))
        self._tokens: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._features: FeatureExtractor | None = None
        if config.features is not None:
            self._features = FeatureExtractor(device=device, classifier=config.features)
            self._reference = RunningStatistics(self._features.dimensions, device)

    def add(self, tokens: Tensor, class_labels: Tensor, originals: Tensor) -> None:
        """Add a batch of held-out images: tokens (b C), labels (b,) and the images (b 3 H W) uint8."""
        self._tokens.append(tokens.int().cpu())
        self._labels.append(class_labels)
        if self._features is not None:
            self._reference.update(self._features(originals))

    def finish(self, pictures: Pictures, budgets: list[int]) -> RateResults:
        """Fit the prior and evaluate it.

        Args:
            pictures: decodes tokens (b k) to images (b 3 H W) uint8.
            budgets: values of k at which samples are decoded.
        """
        tokens, labels, _ = tokenize_files(
            self.tokenizer,
            self._source,
            spread(len(self._source), self.config.prior_images),
            views=VIEWS["flip"],
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            unreadable=self.unreadable,
        )
        if not len(labels):
            raise InputError(f"no image of {self._source.name} can be read; see the lines above")
        prior = self._fitted_prior(tokens.int(), labels)
        nats = [
            prior(self._bits(held), held_labels.to(self.device)).cpu().double().sum(0)
            for held, held_labels in zip(self._tokens, self._labels, strict=True)
        ]
        distances, sheet = self._samples(prior, pictures, budgets)
        return RateResults(
            nats=torch.stack(nats).sum(0) / sum(map(len, self._labels)),
            distances=distances,
            sheet=sheet,
            train_images=len(labels),
        )

    def _bits(self, tokens: Tensor) -> Tensor:
        return unpack_bits(tokens.to(self.device), self.tokenizer.config.num_bits).sign()

    def _fitted_prior(self, tokens: Tensor, labels: Tensor) -> BitPrior:
        """Fit to tokens (N views C) and labels (N,)."""
        config = self.tokenizer.config
        prior = BitPrior(config.num_channels, config.num_bits, len(self._source.classes)).to(self.device)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            rng = torch.Generator().manual_seed(0)
            size = min(FIT_BATCH, len(labels))
            while True:
                rows = torch.randint(len(labels), (size,), generator=rng)
                views = torch.randint(tokens.shape[1], (size,), generator=rng)
                yield self._bits(tokens[rows, views]), labels[rows].to(self.device)

        fit_bit_prior(prior, batches(), steps=self.config.prior_steps)
        return prior.requires_grad_(False)

    def _samples(
        self, prior: BitPrior, pictures: Pictures, budgets: list[int]
    ) -> tuple[dict[int, float], list[list[Tensor]]]:
        """Draw samples; sample i uses seed i and class i % num_classes, whatever the tokenizer."""
        shown = self.config.sheet_images
        count = shown if self._features is None else max(self.config.prior_samples, shown)
        found = {k: RunningStatistics(self._reference.mean.numel(), self.device) for k in budgets if self._features}
        sheet: list[list[Tensor]] = []
        for start in tqdm(range(0, count, self.config.batch_size), desc="samples", delay=2, leave=False):
            seeds = range(start, min(start + self.config.batch_size, count))
            tokens = pack_bits(prior.sample(torch.tensor(seeds) % prior.null_label, seeds))
            columns = [pictures(tokens[:, :k]) for k in budgets]
            if self._features is not None:
                for k, images in zip(budgets, columns, strict=True):
                    found[k].update(self._features(images))
            sheet += [[column[i].cpu() for column in columns] for i, seed in enumerate(seeds) if seed < shown]
        return {k: frechet_distance(self._reference, statistics) for k, statistics in found.items()}, sheet
