"""Rate of the tokens under a linear prior that is fitted from scratch, and images drawn from that prior."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.bit_prior import BitPrior, fit_bit_prior
from common.errors import InputError
from common.fid import FeatureExtractor
from common.frechet import RunningStatistics, frechet_distance
from common.images import to_float
from tokenizer.bsq import pack_bits, unpack_bits
from tokenizer.data import ImageDataset, UnreadableFiles, collate, spread
from tokenizer.reconstruction.config import ReconstructionConfig
from tokenizer.sources import DataConfig, open_source
from tokenizer.tokenizer import ChannelTokenizer

FIT_BATCH = 512  # images a step of the prior's fit
Pictures = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class RateResults:
    """Rate of held-out images under the fitted prior.

    nats: mean negative log-likelihood of each token, (C,) float64. distances: Fréchet distance between samples of the
    prior and the held-out images for each k; empty without features. sheet: for each shown sample its images (3 H W)
    uint8 at every k. train_images: how many the prior was fitted to.
    """

    nats: Tensor
    distances: dict[int, float]
    sheet: list[list[Tensor]]
    train_images: int


class RateMeasurement:
    """Collect held-out tokens, then fit a prior to tokens of training images and evaluate it on the held-out ones.

    Args:
        tokenizer: on `device`.
        data: its training split is what the prior is fitted to.
        config: of the measurement.
        device: where to compute.

    Raises:
        InputError: a training split or a classifier that cannot be read.
    """

    def __init__(
        self, tokenizer: ChannelTokenizer, data: DataConfig, config: ReconstructionConfig, device: torch.device
    ):
        self.tokenizer, self.config, self.device = tokenizer, config, device
        self._source = open_source(data, "train")
        self._tokens: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._features = FeatureExtractor(device=device, classifier=config.features) if config.features else None
        self._reference = self._statistics()

    def _statistics(self) -> RunningStatistics:
        keeper = torch.device("cpu") if self.device.type == "mps" else self.device  # float64
        return RunningStatistics(self._features.dimensions if self._features else 1, keeper)

    def add(self, tokens: Tensor, class_labels: Tensor, originals: Tensor) -> None:
        """Take in held-out images: tokens (b C), labels (b,) and the images (b 3 H W) uint8."""
        self._tokens.append(tokens.int().cpu())
        self._labels.append(class_labels)
        if self._features:
            self._reference.update(self._features(originals))

    def finish(self, pictures: Pictures, budgets: list[int]) -> RateResults:
        """Fit and evaluate; `pictures` decodes tokens (b k), `budgets` are the k to draw samples at."""
        prior = self._fitted_prior()
        nats = [
            prior(self._bits(tokens), labels.to(self.device)).double().sum(0)
            for tokens, labels in zip(self._tokens, self._labels, strict=True)
        ]
        distances, sheet = self._samples(prior, pictures, budgets)
        return RateResults(
            nats=(torch.stack(nats).sum(0) / sum(map(len, self._labels))).cpu(),
            distances=distances,
            sheet=sheet,
            train_images=self._train_images,
        )

    def _bits(self, tokens: Tensor) -> Tensor:
        return unpack_bits(tokens.to(self.device), self.tokenizer.config.num_bits).sign()

    def _fitted_prior(self) -> BitPrior:
        tokens, labels = self._training_tokens()
        self._train_images = len(labels)
        config = self.tokenizer.config
        prior = BitPrior(config.num_channels, config.num_bits, len(self._source.classes)).to(self.device)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            rng = torch.Generator().manual_seed(0)
            size = min(FIT_BATCH, len(labels))
            while True:
                rows = torch.randint(len(labels), (size,), generator=rng)
                views = torch.randint(2, (size,), generator=rng)
                yield self._bits(tokens[rows, views]), labels[rows].to(self.device)

        fit_bit_prior(prior, batches(), steps=self.config.prior_steps)
        return prior.requires_grad_(False)

    def _training_tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens (N 2 C) int32 of training images and of their mirror images, and labels (N,)."""
        size, per_pass = self.tokenizer.config.image_size, self.config.batch_size
        images = ImageDataset(self._source, size, augmentation=None, seed=0, replace_unreadable=False)
        keys = [(index, 0) for index in spread(len(images), self.config.prior_images)]
        loader = DataLoader(
            images,
            batch_sampler=[keys[start : start + per_pass] for start in range(0, len(keys), per_pass)],
            num_workers=self.config.num_workers,
            collate_fn=collate,
        )
        unreadable = UnreadableFiles(self.config.strict)
        tokens: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in tqdm(loader, desc="training images encoded", delay=2, leave=False):
            unreadable.note(batch)
            if len(batch.images):
                floats = to_float(batch.images.to(self.device))
                views = [self.tokenizer.tokenize(view) for view in (floats, floats.flip(-1))]
                tokens.append(torch.stack(views, 1).int().cpu())
                labels.append(batch.labels)
        if not tokens:
            raise InputError(f"no image of {self._source.name} can be read; see the lines above")
        return torch.cat(tokens), torch.cat(labels)

    def _samples(
        self, prior: BitPrior, pictures: Pictures, budgets: list[int]
    ) -> tuple[dict[int, float], list[list[Tensor]]]:
        """Sample i has class i modulo their number and seed i, so that tokenizers are compared with equal seeds."""
        count = self.config.prior_samples if self._features else self.config.sheet_images
        shown = set(spread(count, self.config.sheet_images))
        found = {k: self._statistics() for k in budgets}
        sheet: list[list[Tensor]] = []
        for start in tqdm(range(0, count, self.config.batch_size), desc="samples", delay=2, leave=False):
            seeds = range(start, min(start + self.config.batch_size, count))
            labels = torch.tensor(seeds) % prior.null_label
            tokens = pack_bits(prior.sample(labels, seeds))
            columns = [pictures(tokens[:, :k]) for k in budgets]
            if self._features:
                for k, images in zip(budgets, columns, strict=True):
                    found[k].update(self._features(images))
            sheet += [[column[i].cpu() for column in columns] for i, seed in enumerate(seeds) if seed in shown]
        if self._features is None:
            return {}, sheet
        return {k: frechet_distance(self._reference, statistics) for k, statistics in found.items()}, sheet
