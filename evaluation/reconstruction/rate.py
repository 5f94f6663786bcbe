"""Rate of held-out tokens under a linear prior fitted to training images, and images drawn from that prior."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from common.bit_prior import BitPrior, fit_bit_prior, token_bits
from common.config import InputError
from evaluation.config import ReconstructionConfig
from tokenizer.bsq import pack_bits
from tokenizer.data import UnreadableFiles, spread
from tokenizer.extraction import tokenize_files
from tokenizer.sources import ImageSource
from tokenizer.tokenizer import ChannelTokenizer

STEPS, BATCH = 1200, 512  # of the prior's fit, and images in each
SAMPLES = 2000  # for the distance


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
        views="flip",
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


def prior_samples(prior: BitPrior, batch_size: int) -> Iterator[Tensor]:
    """Draw tokens (b C) in batches; sample i has seed i and class i % num_classes for any tokenizer."""
    for seeds in tqdm(torch.arange(SAMPLES).split(batch_size), desc="samples", leave=False):
        yield pack_bits(prior.sample(seeds % prior.null_label, seeds.tolist()))
