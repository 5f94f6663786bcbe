"""The stream: the one loop that draws tokens. To stop at any k, do not ask for the next step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.config import InputError, Refinement
from common.images import to_pil
from common.randomness import uniforms
from generator.config import ChannelGPTConfig, SamplingConfig
from generator.engine import Batch, Engine
from generator.sampling import guidance_scales


@dataclass(frozen=True, kw_only=True)
class Step:
    """State of a stream after one more token of every image that continues.

    tokens: (b num_tokens) int64 on the generator's device, wider where a prefix is longer than num_tokens;
        row i holds lengths[i] tokens, the rest is 0.
    lengths: tokens of each image: num_tokens, less where it ended before, more where its prefix has more.
    drawing: the images that continue after this step, unless they are stopped.
    log_likelihood: (b,) nats of each image's tokens under the model, if it was requested.
    """

    num_tokens: int
    tokens: Tensor
    lengths: tuple[int, ...]
    drawing: tuple[int, ...]
    log_likelihood: Tensor | None
    _stopped: set[int]
    _decoder: Any

    def preview(self, refine: int | Refinement = 0) -> list[Image.Image]:
        """Decode what has been drawn, an image for each row; drawing waits meanwhile. `refine`: see `start_preview`."""
        return [to_pil(image) for image in self.start_preview(refine).images()]

    def start_preview(self, refine: int | Refinement = 0) -> Any:
        """Start to decode; on CUDA in parallel with drawing, elsewhere when `.images()` of the result is called.

        Args:
            refine: steps of the refiner, or all its settings; 0: none.

        Raises:
            InputError: a stream without a decoder of images, or a model without refiner.
        """
        if self._decoder is None:
            raise InputError("this stream has no decoder of images; draw with a ChannelTokPipeline")
        options = {"refine": refine} if refine else {}
        return self._decoder.start(self.tokens, torch.tensor(self.lengths), **options)

    def stop(self, images: Sequence[int]) -> None:
        """Stop some images here; the others continue, at the cost of the smaller batch.

        Raises:
            InputError: an index that is no image of this stream.
        """
        self._stopped.update(self._known(images))

    def keep(self, images: Sequence[int]) -> None:
        """Stop all images but these; errors as in `stop`."""
        self._stopped.update(set(range(len(self.lengths))) - self._known(images))

    def _known(self, images: Sequence[int]) -> set[int]:
        count = len(self.lengths)
        for image in images:
            if not 0 <= image < count:
                raise InputError(f"there is no image {image} to stop or keep; there are 0..{count - 1}")
        return set(images)


def _check(
    config: ChannelGPTConfig, labels: Sequence[int], seeds: Sequence[int], ends: list[int], sampling: SamplingConfig
) -> None:
    if not labels:
        raise InputError("class_labels is empty; give at least one class")
    config.check_labels(labels)
    for name, values in (("seeds", seeds), ("num_tokens", ends)):
        if len(values) != len(labels):
            raise InputError(f"there are {len(values)} {name} for {len(labels)} class labels; give one for each")
    for end in ends:
        if not 1 <= end <= config.num_channels:
            raise InputError(f"num_tokens is {end}; this model draws 1..{config.num_channels}")
    if sampling.cfg_scale != 1 and not config.has_null_label:
        raise InputError(f"cfg_scale is {sampling.cfg_scale}, but this model was trained without null label; use 1")


def _check_prefix(config: ChannelGPTConfig, prefix: Tensor, given: list[int], ends: list[int]) -> None:
    if prefix.dtype.is_floating_point or prefix.dtype.is_complex or prefix.dtype == torch.bool:
        raise InputError(f"prefix tokens are of type {prefix.dtype}; give integers")
    if prefix.ndim != 2 or not len(prefix) == len(given) == len(ends):
        raise InputError(
            f"prefix tokens are {tuple(prefix.shape)} with {len(given)} lengths; allowed are ({len(ends)}, j), "
            "a row and a length for each label"
        )
    for end, length in zip(ends, given, strict=True):
        if not 1 <= length <= prefix.shape[1] or length >= end:
            raise InputError(
                f"a prefix has {length} tokens of {prefix.shape[1]} for num_tokens {end}; "
                "it must have at least 1 and fewer than num_tokens"
            )
    if int(prefix.long().min()) < 0 or int(prefix.long().max()) >= config.codebook_size:
        raise InputError(f"prefix tokens go beyond the codebook; allowed are 0..{config.codebook_size - 1}")


def stream(
    engine: Engine,
    class_labels: Sequence[int],
    seeds: Sequence[int],
    num_tokens: int | Sequence[int],
    sampling: SamplingConfig,
    prefix: Tensor | None = None,
    prefix_lengths: Sequence[int] | None = None,
    scored: bool = False,
    decoder: Any = None,
) -> Iterator[Step]:
    """Draw tokens, one channel of every image at each step.

    Args:
        engine: the generator and how its step is run.
        class_labels: a label for each image, in [0, num_classes), or null_label for no class.
        seeds: a seed for each image; image i depends on (seeds[i], class_labels[i], position) alone.
        num_tokens: where an image ends by itself, in [1, C]; one for all or one for each.
        sampling: guidance and filters.
        prefix: tokens (b j) drawn before, or taken from a photograph; each image continues its own.
        prefix_lengths: tokens of each row of `prefix`, in [1, j] and below its num_tokens; None: all j.
        scored: whether steps carry the log-likelihood.
        decoder: for `Step.preview`, a `pipeline.StreamImages` or a `tokenizer.PictureDecoder`, which cannot refine.

    Returns:
        A step for each k from the shortest prefix + 1 to the largest num_tokens; fewer if all images are
        stopped (`Step.stop`). Nothing waits for the device until tokens are read.

    Raises:
        InputError: at the call, not at the first step, if an argument is out of its range.
    """
    labels = list(class_labels)
    ends = [num_tokens] * len(labels) if isinstance(num_tokens, int) else list(num_tokens)
    _check(engine.decoder.config, labels, seeds, ends, sampling)
    tokens, given = torch.zeros(len(labels), max(ends), dtype=torch.long), [0] * len(labels)
    if prefix is not None:
        given = [prefix.shape[-1]] * len(labels) if prefix_lengths is None else list(prefix_lengths)
        _check_prefix(engine.decoder.config, prefix, given, ends)
        for row, length in enumerate(given):
            tokens[row, :length] = prefix[row, :length]
    numbers = uniforms(seeds, max(ends))
    return _Stream(engine, torch.tensor(labels), numbers, ends, sampling, tokens, given, scored, decoder).steps()


class _Stream:
    """The loop's state. Slot s of the batch draws image images[s]; slots beyond are fillers."""

    def __init__(
        self,
        engine: Engine,
        labels: Tensor,
        numbers: Tensor,
        ends: list[int],
        sampling: SamplingConfig,
        tokens: Tensor,
        given: list[int],
        scored: bool,
        decoder: Any,
    ):
        self.engine, self.labels, self.numbers, self.tokens = engine, labels, numbers, tokens
        self.sampling, self.given, self.scored, self.decoder = sampling, given, scored, decoder
        self.ends, self.last = list(ends), max(ends)  # an image may be stopped before its end
        self.scales = guidance_scales(sampling, engine.decoder.config.num_channels)
        self.guided = [scale != 1 for scale in self.scales.tolist()[: self.last]]
        # from here on rows without class are not needed
        self.guided_end = max((position + 1 for position, on in enumerate(self.guided) if on), default=0)
        self.images = list(range(len(labels)))
        self.shared = min(given)
        # images of the same class and the same prefix are read once and forked; this is the last host value read
        beginnings = [
            (label, *row) for label, row in zip(labels.tolist(), tokens[:, : self.shared].tolist(), strict=True)
        ]
        firsts = {key: image for image, key in reversed(list(enumerate(beginnings)))}
        self.distinct = sorted(firsts.values()) if self.shared else self.images
        self.sources = [self.distinct.index(firsts[key]) for key in beginnings] if self.shared else self.images

    def steps(self) -> Iterator[Step]:
        """Yield after every token; drop finished images between steps."""
        batch = self._prefilled()
        try:
            out = self.tokens.to(self.engine.decoder.device)
            likelihood = torch.zeros(len(self.ends), device=out.device)
            stopped: set[int] = set()
            for position in range(batch.next_position, self.last):
                self.engine.advance(batch, self.sampling, guided=self.guided[position], scored=self.scored)
                self._record(batch, position, out, likelihood)
                yield self._step(position + 1, out, likelihood, stopped)
                for image in stopped:
                    # an image that is stopped within its prefix keeps all of that
                    self.ends[image] = max(min(self.ends[image], position + 1), self.given[image])
                live = [
                    slot
                    for slot, image in enumerate(self.images)
                    if position + 1 < self.ends[image] and image not in stopped
                ]
                if not live:
                    return
                if self.engine.slots(len(live)) < batch.images:
                    batch = self.engine.select(batch, live, batch.guided and position + 1 < self.guided_end)
                    self.images = [self.images[slot] for slot in live]
                batch = self._without_guidance(batch, position + 1, len(self.images))
        finally:
            self.engine.release(batch)

    def _record(self, batch: Batch, position: int, out: Tensor, likelihood: Tensor) -> None:
        """Copy new tokens into the tensors that steps expose."""
        live = [slot for slot, image in enumerate(self.images) if position < self.ends[image]]
        if len(live) == len(out) and live == self.images:
            out[:, position] = batch.tokens[: len(live), position]
            likelihood.copy_(batch.log_likelihood[: len(live)])
            return
        slots = torch.tensor(live, device=out.device)
        rows = torch.tensor([self.images[slot] for slot in live], device=out.device)
        out[rows, position] = batch.tokens[slots, position]
        likelihood[rows] = batch.log_likelihood[slots]

    def _step(self, num_tokens: int, out: Tensor, likelihood: Tensor, stopped: set[int]) -> Step:
        ends = list(enumerate(self.ends))
        return Step(
            num_tokens=num_tokens,
            tokens=out[:, : max(num_tokens, *self.given)],
            lengths=tuple(max(min(end, num_tokens), self.given[image]) for image, end in ends),
            drawing=tuple(image for image, end in ends if num_tokens < end and image not in stopped),
            log_likelihood=likelihood.clone() if self.scored else None,
            _stopped=stopped,
            _decoder=self.decoder,
        )

    def _prefilled(self) -> Batch:
        """Read the prefixes in the same steps that would have drawn them, so that continuing changes no result."""
        chosen, given = self.distinct, torch.tensor(self.given)
        batch = self.engine.begin(
            self.labels[chosen], self.tokens[chosen], given[chosen], self.numbers[chosen], self.scales,
            self.guided_end > 0,
        )  # fmt: skip
        for position in range(self.shared):
            if self.scored:
                self.engine.advance(batch, self.sampling, guided=False, scored=True)
            else:
                self.engine.feed(batch)
            batch = self._without_guidance(batch, position + 1, len(chosen))
        if self.sources != self.images:  # a slot for every image, from the slots that have read its prefix
            batch = self.engine.select(batch, self.sources, batch.guided)
            self.engine.set_prefix(batch, self.tokens, given)
            batch.uniforms[: len(self.images), : self.last] = self.numbers.to(batch.uniforms)
        return batch

    def _without_guidance(self, batch: Batch, position: int, count: int) -> Batch:
        """Drop rows without class after the last guided position."""
        if batch.guided and position >= self.guided_end:
            return self.engine.select(batch, range(count), guided=False)
        return batch
