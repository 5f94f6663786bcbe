"""The samplers that are compared; each draws once and returns the milliseconds until each k was there."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

from common.runtime import move
from evaluation.reports import synchronize
from generator.config import ChannelGPTConfig, SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import NORM_EPS, ChannelGPT

Draw = Callable[["Task"], list[float]]
UNCACHED_LENGTHS = (1, 32, 64, 128, 192, 256, 384)


@dataclass(frozen=True, kw_only=True)
class Task:
    """An image for each label, image i with seeds[i]; plain sampling with guidance, timed at each k of `budgets`."""

    budgets: list[int]
    class_labels: list[int]
    seeds: list[int]
    cfg_scale: float

    @property
    def sequences(self) -> int:
        """Rows that go through the network together; with guidance, two for each image."""
        return len(self.class_labels) * (2 if self.cfg_scale != 1 else 1)


class Stopwatch:
    """Milliseconds from its creation until each k of `budgets`; waits for the device only there."""

    def __init__(self, device: torch.device, budgets: Sequence[int]):
        self.milliseconds: list[float] = []
        self._device, self._budgets, self._tokens = device, budgets, 0
        synchronize(device)
        self._start = time.perf_counter()

    def token(self) -> None:
        """Count a token of every image."""
        self._tokens += 1
        if self._tokens in self._budgets:
            synchronize(self._device)
            self.milliseconds.append((time.perf_counter() - self._start) * 1000)


def draw_ours(engine: Engine, task: Task) -> list[float]:
    """Draw with the stream of generator/generate.py."""
    sampling = SamplingConfig(cfg_scale=task.cfg_scale)
    watch = Stopwatch(engine.decoder.device, task.budgets)
    for _ in stream(engine, task.class_labels, task.seeds, task.budgets[-1], sampling):
        watch.token()
    return watch.milliseconds


def draw_transformers(model: Any, config: ChannelGPTConfig, task: Task) -> list[float]:
    """Draw with transformers' own `generate` and its cache; guidance is a second pass for every token."""
    rows = config.codebook_size + torch.tensor(task.class_labels, device=model.device)[:, None]
    watch = Stopwatch(model.device, task.budgets)

    def never_stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        watch.token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        negative_prompt_ids=torch.full_like(rows, config.codebook_size + config.null_label),
        generation_config=GenerationConfig(
            max_new_tokens=task.budgets[-1], do_sample=True, top_k=0, guidance_scale=task.cfg_scale
        ),
        stopping_criteria=StoppingCriteriaList([never_stop]),
    )
    return watch.milliseconds


@torch.no_grad()
def draw_uncached(model: LlamaForCausalLM, config: ChannelGPTConfig, task: Task) -> list[float]:
    """Draw without a cache: transformers' forward over the whole prefix for every token.

    The time of a token depends on the length of its prefix alone. So tokens are drawn after random prefixes of a few
    lengths, and the times of the others are interpolated, piecewise linearly.
    """
    last, each = task.budgets[-1], []
    lengths = [*(length for length in UNCACHED_LENGTHS if length < last), last]
    tokens = torch.randint(config.codebook_size, (task.sequences, last)).to(model.device)
    for length in lengths:
        watch = Stopwatch(model.device, [1])
        logits = model(input_ids=tokens[:, :length], use_cache=False, logits_to_keep=1).logits[:, -1].float()
        if task.cfg_scale != 1:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, task.cfg_scale)
        torch.multinomial(logits.softmax(-1), num_samples=1)
        watch.token()
        each += watch.milliseconds
    until = np.cumsum(np.interp(np.arange(1, last + 1), lengths, each))
    return [float(until[k - 1]) for k in task.budgets]


def llama_of(model: ChannelGPT) -> LlamaForCausalLM:
    """Build a Llama with random weights whose blocks have the shapes of a generator's.

    Its embedding has a row for each code, each class and the null class; its head has one for each code.
    """
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.codebook_size + config.num_classes + 1,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    llama.lm_head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
    return move(llama.eval(), model.device, model.dtype)


def build_samplers(names: Sequence[str], model: ChannelGPT) -> dict[str, Draw]:
    """Build the samplers of some names, for a model on its device and in its number format."""
    decoder, llama = cache(lambda: CachedDecoder.from_model(model)), cache(lambda: llama_of(model))
    draws: dict[str, Callable[[], Draw]] = {
        "uncached": lambda: partial(draw_uncached, llama(), model.config),
        "transformers": lambda: partial(draw_transformers, llama(), model.config),
        "eager": lambda: partial(draw_ours, Engine(decoder(), compile=False)),
        "compiled": lambda: partial(draw_ours, Engine(decoder(), compile=True)),
    }
    return {name: draws[name]() for name in names}
