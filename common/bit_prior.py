"""Autoregressive linear prior over the bits of an image: logistic regression of each bit on earlier bits and the class.

Used as the rate term of the tokenizer's training, as in learned image compression (Ballé et al., 2018, arXiv
1802.01436: distortion + lambda x rate under a jointly trained prior), and as a baseline for generators.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from common.config import InputError
from common.randomness import uniforms


def token_bits(tokens: Tensor, num_bits: int) -> Tensor:
    """Tokens (...) in [0, 2**num_bits) -> bits (... num_bits), float32 entries +-1, the most significant bit first."""
    shifts = torch.arange(num_bits - 1, -1, -1, device=tokens.device)
    return ((tokens[..., None] >> shifts & 1) * 2 - 1).float()


class BitPrior(nn.Module):
    """p(bits | class) as a product over bits in order; computes in float32, also under autocast.

    log-odds of bit i = bias[i] + class_bias[class, i] + sum over j < i of matrix[i, j] * bit[j], with bits +-1 in
    the order of channels and, within a channel, of its code. At initialization every bit has probability 1/2. The
    parameter `weight` has the entries of the matrix below the diagonal, row by row: 134 MB for 512 channels of 16 bits.
    The label `num_classes` is the null class.
    """

    def __init__(self, num_channels: int, num_bits: int, num_classes: int):
        super().__init__()
        self.num_channels, self.num_bits, self.null_label = num_channels, num_bits, num_classes
        total = num_channels * num_bits
        self.weight = nn.Parameter(torch.zeros(total * (total - 1) // 2))
        self.bias = nn.Parameter(torch.zeros(total))
        self.class_bias = nn.Parameter(torch.zeros(num_classes + 1, total))

    def forward(self, bits: Tensor, class_labels: Tensor) -> Tensor:
        """Bits (b c n), entries +-1, and labels (b,) -> negative log-likelihood of each token (b c), in nats.

        Differentiable with respect to the bits as well, both as targets and as context.
        """
        return F.softplus(-bits.float() * self.log_odds(bits, class_labels)).sum(-1)

    def log_odds(self, bits: Tensor, class_labels: Tensor) -> Tensor:
        """Bits (b c n), entries +-1, c <= C, and labels (b,) in [0, null_label] -> log-odds of +1, (b c n)."""
        with torch.autocast(bits.device.type, enabled=False):
            flat = rearrange(bits.float(), "b c n -> b (c n)")
            total = flat.shape[1]
            log_odds = F.linear(flat, self.matrix(total), self.bias[:total].float())
            log_odds = log_odds + self.class_bias[class_labels, :total].float()
        return rearrange(log_odds, "b (c n) -> b c n", n=self.num_bits)

    def matrix(self, size: int | None = None) -> Tensor:
        """Strictly lower triangular weights between the first `size` bits, or all: (size size) float32."""
        size = self.num_channels * self.num_bits if size is None else size
        mask = torch.ones(size, size, dtype=torch.bool, device=self.weight.device).tril(-1)
        entries = self.weight[: size * (size - 1) // 2].float()
        return torch.zeros(size, size, device=entries.device).masked_scatter(mask, entries)

    def penalty(self) -> Tensor:
        """Sum of squares of all parameters except `bias`, for L2 regularization; a scalar."""
        return self.weight.square().sum() + self.class_bias.square().sum()

    @torch.no_grad()
    def sample(self, class_labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Draw images bit by bit: labels (b,) in [0, null_label] -> bits (b C n), float32 entries +-1.

        Image i depends on (seeds[i], class_labels[i]) alone, up to the rounding of sums.

        Raises:
            InputError: a label or a seed out of range, or `seeds` and `class_labels` of different lengths.
        """
        if len(seeds) != len(class_labels):
            raise InputError(f"there are {len(seeds)} seeds for {len(class_labels)} class labels; give one for each")
        if len(class_labels) and not 0 <= int(class_labels.min()) <= int(class_labels.max()) <= self.null_label:
            raise InputError(f"a class label is out of range; allowed are 0..{self.null_label}, the last for no class")
        total = self.num_channels * self.num_bits
        # a bit is +1 where sigmoid(log-odds) exceeds its uniform number
        thresholds = uniforms(seeds, total).logit().to(self.weight)
        log_odds = self.bias + self.class_bias[class_labels.to(self.weight.device)]
        bits, matrix = torch.empty_like(log_odds), self.matrix()
        for start in range(0, total, self.num_bits):
            end = start + self.num_bits
            for i in range(start, end):
                logit = log_odds[:, i] + bits[:, start:i] @ matrix[i, start:i]
                bits[:, i] = torch.where(logit > thresholds[:, i], 1.0, -1.0)
            log_odds[:, end:] += bits[:, start:end] @ matrix[end:, start:end].T
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
    """Fit a prior in place: maximum likelihood with an L2 penalty, by Adam, the learning rate falling as a cosine to 0.

    Args:
        prior: updated in place; the problem is convex, so it may be fitted already.
        batches: (bits (b C n) with entries +-1, labels (b,)), at least `steps` of them, on the prior's device.
        steps: optimizer steps, at least 1.
        learning_rate: of the first step.
        l2_weight: coefficient of the L2 penalty, which is added to the nats per token.
        label_dropout: share of labels replaced by the null label, in [0, 1].
        seed: for label dropout.
    """
    optimizer = torch.optim.Adam(prior.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)
    stream = iter(batches)
    for _ in tqdm(range(steps), desc="prior", delay=2, leave=False):
        bits, labels = next(stream)
        dropped = torch.rand(len(labels), generator=rng) < label_dropout
        labels = torch.where(dropped.to(labels.device), prior.null_label, labels)
        loss = prior(bits, labels).mean() + l2_weight * prior.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()  # further training must not add to the last gradient
