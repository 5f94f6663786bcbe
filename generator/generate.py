"""The stream: the one loop that draws tokens. To stop at any k is not to ask for the next step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import InputError
from generator.decode import CachedDecoder
from generator.sampling import SamplingConfig, draw, guide, uniforms


@dataclass(frozen=True, kw_only=True)
class Step:
    """The drawing after `num_tokens` tokens: tokens (b num_tokens), int64 on the generator's device."""

    num_tokens: int
    tokens: Tensor


def _check(
    decoder: CachedDecoder,
    labels: Tensor,
    seeds: Sequence[int],
    num_tokens: int,
    sampling: SamplingConfig,
    prefix: Tensor | None,
) -> None:
    layout = decoder.layout
    if not len(labels):
        raise InputError("class_labels is empty; give at least one class")
    layout.check_labels(labels)
    if not layout.has_null_label and bool((labels == layout.null_label).any()):
        raise InputError(
            f"class label {layout.null_label} stands for no class, which this model was not trained on; "
            f"use 0..{layout.num_classes - 1}"
        )
    if len(seeds) != len(labels):
        raise InputError(f"there are {len(seeds)} seeds for {len(labels)} class labels; give one for each")
    if not 1 <= num_tokens <= layout.num_channels:
        raise InputError(f"num_tokens is {num_tokens}; this model draws 1..{layout.num_channels}")
    if sampling.cfg_scale != 1 and not layout.has_null_label:
        raise InputError(f"cfg_scale is {sampling.cfg_scale}, but this model was trained without null label; use 1")
    if prefix is None:
        return
    if prefix.ndim != 2 or len(prefix) != len(labels) or not 1 <= prefix.shape[1] < num_tokens:
        raise InputError(
            f"prefix tokens are {tuple(prefix.shape)}; allowed are ({len(labels)}, j) with j in 1..{num_tokens - 1}, "
            "below num_tokens"
        )
    if int(prefix.min()) < 0 or int(prefix.max()) >= layout.codebook_size:
        raise InputError(f"prefix tokens go beyond the codebook; allowed are 0..{layout.codebook_size - 1}")


def stream(
    decoder: CachedDecoder,
    class_labels: Sequence[int],
    seeds: Sequence[int],
    num_tokens: int,
    sampling: SamplingConfig,
    prefix: Tensor | None = None,
) -> Iterator[Step]:
    """Draw tokens, one channel of every image at each step.

    Args:
        decoder: the generator.
        class_labels: a label for each image, in [0, num_classes), or null_label for no class.
        seeds: a seed for each image; image i depends on (seeds[i], class_labels[i], position) alone.
        num_tokens: where the stream ends by itself, in [1, C].
        sampling: guidance and filters.
        prefix: tokens (b j), j < num_tokens, drawn before; the stream goes on after them as if it had
            never stopped.

    Returns:
        Steps of j + 1, ..., num_tokens tokens. Nothing waits for the device until tokens are read.

    Raises:
        InputError: at the call, not at the first step, if an argument is out of its range.
    """
    labels = torch.tensor(list(class_labels), dtype=torch.long)
    _check(decoder, labels, seeds, num_tokens, sampling, prefix)
    return _steps(decoder, labels.to(decoder.device), uniforms(seeds, num_tokens), num_tokens, sampling, prefix)


def _steps(
    decoder: CachedDecoder,
    labels: Tensor,
    numbers: Tensor,
    num_tokens: int,
    sampling: SamplingConfig,
    prefix: Tensor | None,
) -> Iterator[Step]:
    layout, device = decoder.layout, decoder.device
    numbers = numbers.to(device, torch.float32 if device.type == "mps" else torch.float64)
    guided = sampling.cfg_scale != 1
    batch_size = len(labels)
    tokens = torch.empty(batch_size, num_tokens, dtype=torch.long, device=device)
    given = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        tokens[:, :given] = prefix.to(device)
    # with guidance the unconditional rows follow the conditional ones through the same products
    conditions = torch.cat([labels, torch.full_like(labels, layout.null_label)]) if guided else labels
    rows = layout.class_rows(conditions)
    cache = decoder.new_cache(len(rows), num_tokens)
    for position in range(num_tokens):
        # a prefix goes through the very same steps, so continuing is bit for bit never having stopped
        logits = decoder.step(rows, position, cache)
        if position >= given:
            if guided:
                logits = guide(logits[:batch_size], logits[batch_size:], sampling.cfg_scale)
            tokens[:, position] = draw(logits, numbers[:, position], sampling)
            yield Step(num_tokens=position + 1, tokens=tokens[:, : position + 1])
        token = tokens[:, position]
        rows = torch.cat([token, token]) if guided else token
