"""Pure functions on log-probabilities of codes: from the odds of bits, guidance, filters, inversion of the CDF."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.bit_prior import token_bits
from generator.config import SamplingConfig


@cache
def _half_codes(num_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bits of all first and of all second halves of a code: (2**(n//2) n//2) and (2**(n-n//2) n-n//2), entries +-1."""
    halves = (num_bits // 2, num_bits - num_bits // 2)
    high, low = (token_bits(torch.arange(2**size, device=device), size) for size in halves)
    return high, low


def code_log_probabilities(log_odds: Tensor, pairs: Tensor) -> Tensor:
    """Log-probabilities of all codes of a token, (b 2**n) float32 in the order of tokens, from two half codes.

    `log_odds` (b n) are those of each bit when all earlier bits of the code count as 0; `pairs` (b n n) is strictly
    lower triangular: bit j < i adds pairs[i, j] * bit[j] to the log-odds of bit i.
    """
    # fmt: off
    high, low = _half_codes(log_odds.shape[1], log_odds.device)                                 # H h, L l
    h = high.shape[1]
    first = log_odds[:, None, :h] + high @ pairs[:, :h, :h].mT                                  # b H h
    given = log_odds[:, None, h:] + high @ pairs[:, h:, :h].mT                                  # b H l
    within = low @ pairs[:, h:, h:].mT                                                          # b L l
    first = F.logsigmoid(high * first).sum(-1)                                                  # b H
    second = F.logsigmoid(low * (given[:, :, None] + within[:, None])).sum(-1)                  # b H L
    return (first[:, :, None] + second).flatten(1)
    # fmt: on


def guidance_scales(config: SamplingConfig, num_channels: int) -> Tensor:
    """The guidance scale at each position of a model with C channels: (C,) float32, on the CPU."""
    share = torch.arange(num_channels, dtype=torch.float64) / num_channels
    weight = {
        "constant": torch.ones_like(share),
        "linear": 1 - share,
        "cosine": (1 + (math.pi * share).cos()) / 2,
        "interval": ((share >= config.cfg_start) & (share < config.cfg_end)).double(),
    }[config.cfg_schedule]
    return (1 + (config.cfg_scale - 1) * weight).float()


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): (b v), (b v) -> (b v). Scale 1 is conditional alone."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (b v) -> logits (b v), what may not be drawn at -inf. temperature is above 0.

    Top-k keeps ties with its last logit; top-p keeps the fewest likely tokens whose probabilities
    reach `top_p`, at least one.
    """
    # from the top, and never by a subnormal number: a tiny temperature then tends to argmax and not to inf - inf
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # a token stays if the mass before it has not reached top_p yet
        before = probabilities.cumsum(-1) - probabilities
        dropped = torch.empty_like(order, dtype=torch.bool).scatter(-1, order, before >= top_p)
        dropped.scatter_(-1, order[..., :1], value=False)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def invert_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability first exceeds a uniform number: (b v), (b,) -> (b,) int64.

    Sums are float64 where the device has it, which keeps a token's odds exact to 2**-52.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.to(exact).softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    below = (cumulative <= uniform.to(exact)[:, None] * total).sum(-1)
    # rounding may put the threshold on the total itself; then it is the last token with any mass
    return torch.minimum(below, (cumulative < total).sum(-1))


def draw(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> Tensor:
    """Logits after guidance (b v) and a number in [0, 1) for each row (b,) -> tokens (b,) int64."""
    if config.temperature == 0:
        return logits.argmax(-1)
    return invert_cdf(filter_logits(logits, config.temperature, config.top_k, config.top_p), uniform)
