"""The samplers that are compared; each tells when its tokens were there, counted from the call."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from common.measuring import synchronize
from common.runtime import move
from evaluation.speed.config import OURS
from generator.config import ChannelGPTConfig, SamplingConfig
from generator.engine import Engine
from generator.generate import stream
from generator.model import NORM_EPS, Block, ChannelGPT

Milliseconds = npt.NDArray[np.float64]
UNCACHED_LENGTHS = (1, 32, 64, 128, 192, 256, 384)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every sampler draws: an image for each label, image i with seeds[i]; plain sampling with guidance."""

    num_tokens: int
    class_labels: list[int]
    seeds: list[int]
    cfg_scale: float

    @property
    def sequences(self) -> int:
        """Rows that go through the network side by side; with guidance, two for each image."""
        return len(self.class_labels) * (2 if self.cfg_scale != 1 else 1)


class Clock:
    """Notes times without waiting for the device: events in its queue, or the wall clock on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[Any] = []
        synchronize(device)
        self.mark()

    def mark(self) -> None:
        """Note that what was asked of the device so far is done, then."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        self._marks.append(event)

    def elapsed(self) -> Milliseconds:
        """Milliseconds from the making of the clock to each mark; waits for the device."""
        synchronize(self._device)
        start, *marks = self._marks
        if self._device.type == "cpu":
            return np.array([(mark - start) * 1000 for mark in marks])
        return np.array([start.elapsed_time(mark) for mark in marks])


class Sampler(ABC):
    """One way of drawing. `holder` is what holds its weights."""

    holder: object
    estimated = False

    @abstractmethod
    def times(self) -> Milliseconds:
        """Draw, and tell the milliseconds from the call until each token was there: (num_tokens,), rising."""


class OurSampler(Sampler):
    """The stream of generator/generate.py."""

    def __init__(self, engine: Engine, device: torch.device, task: Task):
        self.holder, self._engine = engine.decoder, engine
        self._device, self._task = device, task
        self._sampling = SamplingConfig(cfg_scale=task.cfg_scale)

    def times(self) -> Milliseconds:
        """See `Sampler.times`."""
        task = self._task
        clock = Clock(self._device)
        for _ in stream(self._engine, task.class_labels, task.seeds, task.num_tokens, self._sampling):
            clock.mark()
        return clock.elapsed()


class _CodesOnly(LogitsProcessor):
    """Puts the class rows of logits (b vocab_size) at -inf, so that only codes are drawn."""

    def __init__(self, codebook_size: int):
        self._codebook_size = codebook_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._codebook_size :] = -torch.inf
        return scores


class _Marks(StoppingCriteria):
    """Called after every token; never stops."""

    def __init__(self, clock: Clock):
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._clock.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersSampler(Sampler):
    """transformers' own `generate`, with a cache that grows ("dynamic") or is allocated once ("static").

    Guidance is its own too: a second pass, with a second cache, for every token.
    """

    def __init__(self, model: LlamaForCausalLM, config: ChannelGPTConfig, task: Task, cache: str):
        self.holder = model
        self._model: Any = model  # its `generate` is typed in some versions of transformers and not in others
        labels = torch.tensor(task.class_labels, device=model.device)
        self._rows = config.codebook_size + labels[:, None]
        self._null_rows = torch.full_like(self._rows, config.codebook_size + config.null_label)
        self._codes_only = _CodesOnly(config.codebook_size)
        self._config = GenerationConfig(
            max_new_tokens=task.num_tokens,
            do_sample=True,
            top_k=0,
            cache_implementation=cache,
            guidance_scale=task.cfg_scale,
        )

    def draw(self, clock: Clock) -> Tensor:
        """Draw tokens (b num_tokens), marking each."""
        sequences: Tensor = self._model.generate(
            self._rows,
            attention_mask=torch.ones_like(self._rows),
            negative_prompt_ids=self._null_rows,
            generation_config=self._config,
            logits_processor=LogitsProcessorList([self._codes_only]),
            stopping_criteria=StoppingCriteriaList([_Marks(clock)]),
        )
        return sequences[:, 1:]

    def times(self) -> Milliseconds:
        """See `Sampler.times`."""
        clock = Clock(self._model.device)
        self.draw(clock)
        return clock.elapsed()


class UncachedSampler(Sampler):
    """No cache: transformers' forward over the whole prefix for every token, logits of the last position only.

    A token's time does not depend on what the tokens before it are, so each one is drawn after a random
    prefix; and hardly on one position more or less, so unless `whole` only prefixes of a few lengths
    are measured and the time of a token is interpolated, piecewise linearly, between those.
    """

    def __init__(self, model: LlamaForCausalLM, config: ChannelGPTConfig, task: Task, whole: bool):
        self.holder = self._model = model
        self._codebook_size, self._cfg_scale = config.codebook_size, task.cfg_scale
        self.estimated = not whole
        self.lengths = lengths_to_measure(task.num_tokens, whole)
        tokens = torch.randint(config.codebook_size, (task.sequences, task.num_tokens))
        tokens[:, 0] = config.codebook_size  # a class
        self._rows = tokens.to(model.device)

    def times(self) -> Milliseconds:
        """See `Sampler.times`."""
        return total_times(self.lengths, [self._milliseconds(length) for length in self.lengths])

    @torch.no_grad()
    def _milliseconds(self, length: int) -> float:
        clock = Clock(self._model.device)
        output = self._model(input_ids=self._rows[:, :length], use_cache=False, logits_to_keep=1)
        logits = output.logits[:, -1, : self._codebook_size].float()
        if self._cfg_scale != 1:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, self._cfg_scale)
        torch.multinomial(logits.softmax(-1), num_samples=1)
        clock.mark()
        return float(clock.elapsed()[0])


def lengths_to_measure(num_tokens: int, whole: bool) -> list[int]:
    """Prefix lengths, rising, the first 1 and the last num_tokens: all of them, or a few."""
    if whole:
        return list(range(1, num_tokens + 1))
    return [*(length for length in UNCACHED_LENGTHS if length < num_tokens), num_tokens]


def total_times(lengths: Sequence[int], milliseconds: Sequence[float]) -> Milliseconds:
    """Times of single tokens after prefixes of some lengths -> time until each token: (lengths[-1],).

    Token i, counted from 1, is drawn after a prefix of i rows, the class row among them.
    """
    each = np.interp(np.arange(1, lengths[-1] + 1), lengths, milliseconds)
    return np.asarray(np.cumsum(each), dtype=np.float64)


def same_trunk(model: ChannelGPT, samplers: Sequence[str]) -> LlamaForCausalLM | None:
    """A Llama with the blocks of a generator, for the samplers of transformers; None if none of them is measured.

    Its vocabulary is the codes, the classes and the null class; embedding and head have random weights.
    """
    if set(samplers) <= set(OURS):
        return None
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.codebook_size + config.num_classes + 1,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.num_channels + 1,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    llama.model.norm.load_state_dict(model.norm.state_dict())
    for layer, block in zip(llama.model.layers, cast("Sequence[Block]", model.blocks), strict=True):
        query, key, value = block.query_key_value.weight.chunk(3)
        gate, up = block.gate_up.weight.chunk(2)
        layer.load_state_dict(
            {
                "input_layernorm.weight": block.attention_norm.weight,
                "self_attn.q_proj.weight": query,
                "self_attn.k_proj.weight": key,
                "self_attn.v_proj.weight": value,
                "self_attn.o_proj.weight": block.attention_out.weight,
                "post_attention_layernorm.weight": block.mlp_norm.weight,
                "mlp.gate_proj.weight": gate,
                "mlp.up_proj.weight": up,
                "mlp.down_proj.weight": block.down.weight,
            }
        )
    return move(llama.eval(), model.device, model.dtype)


def build_sampler(
    name: str,
    config: ChannelGPTConfig,
    rival: LlamaForCausalLM | None,
    engines: dict[str, Engine],
    task: Task,
    whole: bool,
) -> Sampler:
    """One of `SAMPLERS`; `engines` holds ours by name, `rival` is the model of the others."""
    if rival is None or name in OURS:
        return OurSampler(engines[name], engines[name].decoder.device, task)
    if name == "uncached":
        return UncachedSampler(rival, config, task, whole)
    return TransformersSampler(rival, config, task, name.removeprefix("transformers-"))
