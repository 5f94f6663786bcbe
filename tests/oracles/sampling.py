"""The slow plain sampler: one image at a time, no cache, transformers' own forward and filters, a loop for the CDF."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from generator.config import TokenLayout


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


@torch.no_grad()
def next_logits(model: LlamaForCausalLM, rows: Sequence[int], codebook_size: int) -> Tensor:
    """Logits (1 v) over the codes after the whole sequence `rows`."""
    return model(input_ids=torch.tensor([list(rows)]), use_cache=False).logits[:, -1, :codebook_size].float()


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
def log_likelihood(model: LlamaForCausalLM, layout: TokenLayout, label: int, tokens: Sequence[int]) -> float:
    """Nats of an image's tokens given its class, by one forward over all of them; codes alone can be drawn."""
    rows = torch.tensor([[layout.codebook_size + label, *tokens[:-1]]])
    logits = model(input_ids=rows, use_cache=False).logits[0, :, : layout.codebook_size].double()
    odds = logits.log_softmax(-1)
    return math.fsum(float(odds[position, token]) for position, token in enumerate(tokens))


def draw_one(
    model: LlamaForCausalLM,
    layout: TokenLayout,
    label: int,
    seed: int,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_scale: float = 1.0,
    cfg_schedule: str = "constant",
    cfg_start: float = 0.0,
    cfg_end: float = 1.0,
) -> list[int]:
    """Tokens of one image."""
    tokens: list[int] = []
    full_scale = cfg_scale
    for position in range(num_tokens):
        cfg_scale = scale_at(position / layout.num_channels, full_scale, cfg_schedule, cfg_start, cfg_end)
        logits = next_logits(model, [layout.codebook_size + label, *tokens], layout.codebook_size)
        if cfg_scale != 1:
            null_row = layout.codebook_size + len(layout.class_names)
            unconditional = next_logits(model, [null_row, *tokens], layout.codebook_size)
            logits = unconditional + cfg_scale * (logits - unconditional)
        if temperature == 0:
            tokens.append(int(logits[0].argmax()))
            continue
        row = filtered(logits, temperature, top_k, top_p)[0].double().tolist()
        tokens.append(inverse_cdf(row, uniform_at(seed, position)))
    return tokens
