"""The slow plain sampler: one image at a time, no cache, the model's forward for every code, a loop for the CDF."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from generator.model import ChannelGPT


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (b v) through transformers' warpers: temperature, then top-k, then top-p."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    logits = TemperatureLogitsWarper(float(temperature))(ids, logits)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(ids, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(ids, logits)
    return logits


def probabilities(logits: Sequence[float]) -> list[float]:
    """Softmax of one row, by its formula."""
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def inverse_cdf(logits: Sequence[float], uniform: float) -> int:
    """The first token at which the cumulative probability exceeds `uniform`."""
    cumulative, last = 0.0, -1
    for token, probability in enumerate(probabilities(logits)):
        if probability == 0:
            continue
        cumulative, last = cumulative + probability, token
        if cumulative > uniform:
            return token
    return last


def uniform_at(seed: int, position: int) -> float:
    """The number of one image and position."""
    return float(np.random.Generator(np.random.Philox(key=seed)).random(position + 1)[position])


def bits_of(token: int, num_bits: int) -> list[float]:
    """+-1 for each bit, the most significant one first."""
    return [1.0 if token >> (num_bits - 1 - i) & 1 else -1.0 for i in range(num_bits)]


@torch.no_grad()
def code_log_probabilities(model: ChannelGPT, label: int, tokens: Sequence[int], autoguidance: float = 1.0) -> Tensor:
    """Log-probabilities (1 v) of the next token: one forward of the model for each code that it may be."""
    bits = model.config.num_bits
    codes = range(model.config.codebook_size)
    sequences = torch.tensor([[bits_of(token, bits) for token in [*tokens, code]] for code in codes])
    labels = torch.full((len(sequences),), label)
    linear = model.prior.log_odds(sequences, labels)[:, -1]
    log_odds = linear + autoguidance * (model(labels, sequences)[:, -1] - linear)
    return F.logsigmoid(sequences[:, -1] * log_odds).sum(-1)[None]


def scale_at(share: float, cfg_scale: float, schedule: str, start: float, end: float) -> float:
    """Guidance where `share` of all channels has been drawn."""
    if schedule == "linear":
        return cfg_scale + share * (1 - cfg_scale)
    if schedule == "cosine":
        return 1 + (cfg_scale - 1) * math.cos(math.pi * share / 2) ** 2
    if schedule == "interval":
        return cfg_scale if start <= share < end else 1.0
    return cfg_scale


@torch.no_grad()
def log_likelihood(model: ChannelGPT, label: int, tokens: Sequence[int]) -> float:
    """Nats of an image's tokens given its class, by one forward over all of them."""
    bits = torch.tensor([[bits_of(token, model.config.num_bits) for token in tokens]])
    log_odds = model(torch.tensor([label]), bits).double()
    return float(F.logsigmoid(bits * log_odds).sum())


def draw_one(
    model: ChannelGPT,
    label: int,
    seed: int,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    autoguidance: float = 1.0,
    cfg_scale: float = 1.0,
    cfg_schedule: str = "constant",
    cfg_start: float = 0.0,
    cfg_end: float = 1.0,
) -> list[int]:
    """Tokens of one image."""
    tokens: list[int] = []
    full_scale = cfg_scale
    for position in range(num_tokens):
        cfg_scale = scale_at(position / model.config.num_channels, full_scale, cfg_schedule, cfg_start, cfg_end)
        logits = code_log_probabilities(model, label, tokens, autoguidance)
        if cfg_scale != 1:
            unconditional = code_log_probabilities(model, len(model.config.class_names), tokens, autoguidance)
            logits = unconditional + cfg_scale * (logits - unconditional)
        if temperature == 0:
            tokens.append(int(logits[0].argmax()))
            continue
        row = filtered(logits, temperature, top_k, top_p)[0].double().tolist()
        tokens.append(inverse_cdf(row, uniform_at(seed, position)))
    return tokens
