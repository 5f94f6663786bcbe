"""Pure functions on logits: guidance, filters, and one uniform number turned into one token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn from logits. Applied in this order: guidance, temperature, top-k, top-p."""

    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token, 1 the model's own odds"})
    top_k: int = field(default=0, metadata={"help": "draw among this many most likely tokens; 0 = all"})
    top_p: float = field(
        default=1.0, metadata={"help": "draw among the most likely tokens that hold this mass; 1 = all"}
    )
    cfg_scale: float = field(default=1.0, metadata={"help": "classifier-free guidance; 1 = off, at half the cost"})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 or above")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise InputError(f"cfg_scale is {self.cfg_scale}; it must be 0 or above")


def uniforms(seeds: Sequence[int], num_channels: int) -> Tensor:
    """One number in [0, 1) for each image and position: (b C) float64, on the CPU.

    Entry (i, j) is a function of seeds[i] and j alone (Philox, Salmon et al., 2011), so a picture does
    not depend on its neighbours, on the number of tokens asked for, or on when drawing was stopped.

    Raises:
        InputError: a seed outside [0, 2**63).
    """
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise InputError(f"seed {seed} is out of range; allowed are 0 .. 2**63 - 1")
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(num_channels) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
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
