"""A linear prior over all bits of an image: each bit is a logistic regression on the bits before it and the class.

As the rate term of the tokenizer's training it rewards predictable bits, in the manner of learned image compression
(Ballé et al., 2018, arXiv 1802.01436: distortion + lambda x rate under a prior that is trained jointly). Alone it is
the baseline that a generator must beat.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import InputError


class BitPrior(nn.Module):
    """p(bits | class) as a product over bits in order; computes in float32, also under autocast.

    log-odds of bit i = bias[i] + class_bias[class, i] + sum over j < i of weight[i, j] * bit[j], with bits +-1 in
    the order of channels and, within a channel, of its code. A fresh prior gives every bit the odds 1 : 1.

    Args:
        num_channels: C, tokens of an image.
        num_bits: n, bits of a token.
        num_classes: classes of the data; the label `num_classes` is the null class.
    """

    def __init__(self, num_channels: int, num_bits: int, num_classes: int):
        super().__init__()
        self.num_channels, self.num_bits, self.null_label = num_channels, num_bits, num_classes
        total = num_channels * num_bits
        self.weight = nn.Parameter(torch.zeros(total, total))  # only the part below the diagonal is used
        self.bias = nn.Parameter(torch.zeros(total))
        self.class_bias = nn.Parameter(torch.zeros(num_classes + 1, total))

    def forward(self, bits: Tensor, class_labels: Tensor) -> Tensor:
        """Bits (b c n), entries +-1, and labels (b,) -> negative log-likelihood of each token (b c), in nats.

        Differentiable with respect to the bits as well, both as targets and as context.
        """
        with torch.autocast(bits.device.type, enabled=False):
            return F.softplus(-bits.float() * self.log_odds(bits, class_labels)).sum(-1)

    def log_odds(self, bits: Tensor, class_labels: Tensor) -> Tensor:
        """Bits (b c n), entries +-1, and labels (b,) in [0, null_label] -> log-odds of +1 for each bit (b c n)."""
        with torch.autocast(bits.device.type, enabled=False):
            flat = rearrange(bits.float(), "b c n -> b (c n)")
            log_odds = F.linear(flat, self.weight.tril(-1), self.bias) + self.class_bias[class_labels]
        return rearrange(log_odds, "b (c n) -> b c n", n=self.num_bits)

    def penalty(self) -> Tensor:
        """Sum of squares of all weights but the bias, for L2 regularization; a scalar."""
        return self.weight.tril(-1).square().sum() + self.class_bias.square().sum()

    @torch.no_grad()
    def sample(self, class_labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Draw images bit by bit: labels (b,) in [0, null_label] -> bits (b C n), float32 entries +-1.

        Image i depends on (seeds[i], class_labels[i]) alone, up to the rounding of sums.

        Raises:
            InputError: another number of seeds than of labels, or a seed outside [0, 2**63).
        """
        if len(seeds) != len(class_labels):
            raise InputError(f"there are {len(seeds)} seeds for {len(class_labels)} class labels; give one for each")
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise InputError("a seed is out of range; allowed are 0 .. 2**63 - 1")
        total = self.num_channels * self.num_bits
        uniform = np.stack([np.random.Generator(np.random.Philox(key=seed)).random(total) for seed in seeds])
        # a bit is +1 where sigmoid(log-odds) exceeds its uniform number
        thresholds = torch.from_numpy(uniform).logit().to(self.weight)
        log_odds = self.bias + self.class_bias[class_labels.to(self.weight.device)]
        bits = torch.empty_like(log_odds)
        for start in range(0, total, self.num_bits):
            end = start + self.num_bits
            for i in range(start, end):
                known = log_odds[:, i] + bits[:, start:i] @ self.weight[i, start:i]
                bits[:, i] = torch.where(known > thresholds[:, i], 1.0, -1.0)
            log_odds[:, end:] += bits[:, start:end] @ self.weight[end:, start:end].T
        return rearrange(bits, "b (c n) -> b c n", n=self.num_bits)


def fit_bit_prior(
    prior: BitPrior,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float = 2e-3,
    l2_weight: float = 1e-5,
    label_dropout: float = 0.1,
    seed: int = 0,
) -> None:
    """Fit a prior in place: maximum likelihood with an L2 penalty, by Adam with a cosine schedule.

    Args:
        prior: fresh, or fitted before; the problem is convex.
        batches: (bits (b C n) with entries +-1, labels (b,)), at least `steps` of them, on the prior's device.
        steps: optimizer steps, at least 1.
        learning_rate: at the first step; falls to 0.
        l2_weight: nats per token for a sum of squared weights of 1.
        label_dropout: share of labels replaced by the null label, in [0, 1].
        seed: decides which.
    """
    optimizer = torch.optim.Adam(prior.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)
    for _, (bits, labels) in zip(tqdm(range(steps), desc="prior", delay=2, leave=False), batches, strict=False):
        dropped = torch.rand(len(labels), generator=rng) < label_dropout
        labels = torch.where(dropped.to(labels.device), prior.null_label, labels)
        loss = prior(bits, labels).mean() + l2_weight * prior.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
