"""Rate of held-out tokens under a linear prior fitted to training images, and images drawn from that prior."""

from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from common.bit_prior import BitPrior, fit_bit_prior, token_bits
from common.errors import InputError
from evaluation.features import FeatureExtractor
from evaluation.frechet import RunningStatistics, frechet_distance
from evaluation.reconstruction.config import ReconstructionConfig
from tokenizer.bsq import pack_bits
from tokenizer.data import UnreadableFiles, spread
from tokenizer.extraction import VIEWS, tokenize_files
from tokenizer.sources import ImageSource
from tokenizer.tokenizer import ChannelTokenizer

STEPS, BATCH = 1200, 512  # of the prior's fit, and images in each
SAMPLES = 2000  # for the distance


class Distances:
    """Fréchet distances of sets of pictures from reference images, in the features of `extractor`."""

    def __init__(self, extractor: FeatureExtractor, keys: Iterable[Hashable], device: torch.device):
        self._extractor = extractor
        self._reference = RunningStatistics(extractor.dimensions, device)
        self._statistics = {key: RunningStatistics(extractor.dimensions, device) for key in keys}

    def add_reference(self, images: Tensor) -> None:
        """Add reference images (b 3 H W) uint8."""
        self._reference.update(self._extractor(images))

    def add(self, key: Hashable, pictures: Tensor) -> None:
        """Add pictures (b 3 H W) uint8 to a set."""
        self._statistics[key].update(self._extractor(pictures))

    def of(self, key: Hashable) -> float:
        """Return the distance of a set."""
        return frechet_distance(self._reference, self._statistics[key])


def fit_prior(
    tokenizer: ChannelTokenizer, source: ImageSource, config: ReconstructionConfig, unreadable: UnreadableFiles
) -> tuple[BitPrior, int]:
    """Fit a linear prior to the tokens of images and of their mirror images.

    Returns:
        The prior, frozen, on the tokenizer's device, and the number of images.

    Raises:
        InputError: no readable image.
    """
    tokens, labels, _ = tokenize_files(
        tokenizer,
        source,
        spread(len(source), config.prior_images),
        views=VIEWS["flip"],
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        unreadable=unreadable,
    )
    if not len(labels):
        raise InputError(f"no image of {source.name} can be read; see the lines above")
    model, device = tokenizer.config, tokenizer.device
    prior = BitPrior(model.num_channels, model.num_bits, len(source.classes)).to(device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator().manual_seed(0)
        size = min(BATCH, len(labels))
        while True:
            rows = torch.randint(len(labels), (size,), generator=rng)
            views = torch.randint(tokens.shape[1], (size,), generator=rng)
            yield token_bits(tokens[rows, views].to(device), model.num_bits), labels[rows].to(device)

    fit_bit_prior(prior, batches(), steps=STEPS)
    return prior.requires_grad_(False), len(labels)


def mean_nats(prior: BitPrior, tokens: Tensor, class_labels: Tensor, batch_size: int) -> Tensor:
    """Tokens (N C), labels (N,) -> mean negative log-likelihood of each token, (C,) float64."""
    nats = torch.zeros(tokens.shape[1], dtype=torch.float64)
    device = prior.bias.device
    for part, labels in zip(tokens.split(batch_size), class_labels.split(batch_size), strict=True):
        bits = token_bits(part.to(device), prior.num_bits)
        nats += prior(bits, labels.to(device)).cpu().double().sum(0)
    return nats / len(tokens)


def add_samples(
    distances: Distances, prior: BitPrior, pictures: Callable[[Tensor], Tensor], budgets: list[int], batch_size: int
) -> None:
    """Draw samples and add their pictures at every k to `distances`.

    Sample i has seed i and class i % num_classes for any tokenizer; `pictures`: tokens (b k) -> (b 3 H W) uint8.
    """
    for seeds in tqdm(torch.arange(SAMPLES).split(batch_size), desc="samples", leave=False):
        tokens = pack_bits(prior.sample(seeds % prior.null_label, seeds.tolist()))
        for k in budgets:
            distances.add(k, pictures(tokens[:, :k]))
