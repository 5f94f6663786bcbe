"""Pure functions on logits: guidance, filters, and one uniform number turned into one token."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import InputError

SCHEDULES = ("constant", "linear", "cosine", "interval")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn from logits. Applied in this order: guidance, temperature, top-k, top-p.

    Guidance may change over the channels. With t = position / C, the share of all channels (never of
    those asked for, so that a prefix stays a prefix), the scale is cfg_scale throughout (constant),
    falls from cfg_scale to 1 in a straight line or half a cosine (linear, cosine), or is cfg_scale for
    cfg_start <= t < cfg_end and 1 elsewhere (interval; Kynkaanniemi et al., 2024).
    """

    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token, 1 the model's own odds"})
    top_k: int = field(default=0, metadata={"help": "draw among this many most likely tokens; 0 = all"})
    top_p: float = field(
        default=1.0, metadata={"help": "draw among the most likely tokens that hold this mass; 1 = all"}
    )
    cfg_scale: float = field(default=1.0, metadata={"help": "classifier-free guidance; 1 = off, at half the cost"})
    cfg_schedule: Literal["constant", "linear", "cosine", "interval"] = field(
        default="constant", metadata={"help": "how guidance changes over the channels"}
    )
    cfg_start: float = field(default=0.0, metadata={"help": "interval: share of all channels where guidance begins"})
    cfg_end: float = field(default=1.0, metadata={"help": "interval: share of all channels where guidance ends"})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 or above")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise InputError(f"cfg_scale is {self.cfg_scale}; it must be 0 or above")
        if self.cfg_schedule not in SCHEDULES:
            raise InputError(f"cfg_schedule is {self.cfg_schedule!r}; allowed: {', '.join(SCHEDULES)}")
        if not 0 <= self.cfg_start < self.cfg_end <= 1:
            raise InputError(
                f"cfg_start is {self.cfg_start} and cfg_end {self.cfg_end}; needed is 0 <= cfg_start < cfg_end <= 1"
            )
        if self.cfg_schedule != "interval" and (self.cfg_start, self.cfg_end) != (0, 1):
            raise InputError(
                f"cfg_start and cfg_end belong to cfg_schedule interval; it is {self.cfg_schedule}, so leave them out"
            )

    def override(self, given: Mapping[str, Any]) -> "SamplingConfig":
        """These settings, but for those that are given; if one of guidance is given (cfg_...), all of it is new.

        Raises:
            InputError: a value that is not allowed.
        """
        own = asdict(self)
        if any(name.startswith("cfg_") for name in given):
            own = {name: value for name, value in own.items() if not name.startswith("cfg_")}
        return SamplingConfig(**own | dict(given))

    def scales(self, num_channels: int) -> Tensor:
        """The guidance scale at each position of a model with C channels: (C,) float32, on the CPU."""
        share = torch.arange(num_channels, dtype=torch.float64) / num_channels
        weight = {
            "constant": torch.ones_like(share),
            "linear": 1 - share,
            "cosine": (1 + (math.pi * share).cos()) / 2,
            "interval": ((share >= self.cfg_start) & (share < self.cfg_end)).double(),
        }[self.cfg_schedule]
        return (1 + (self.cfg_scale - 1) * weight).float()


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
