"""The stream: the one loop that draws tokens. To stop at any k, do not ask for the next step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.config import Refinement
from common.errors import InputError
from common.images import to_pil
from common.randomness import uniforms
from generator.config import ChannelGPTConfig, SamplingConfig
from generator.engine import Batch, Engine
from generator.sampling import guidance_scales


class Preview:
    """Images of a step, decoded or being decoded."""

    def __init__(self, num_tokens: int, pending: Any):
        self.num_tokens, self._pending = num_tokens, pending

    def pictures(self) -> list[Image.Image]:
        """One image for each row; waits for them if necessary."""
        return [to_pil(image) for image in self._pending.images()]


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
        """Decode what has been drawn: one whole image for each row. Drawing waits meanwhile.

        Args:
            refine: steps of the refiner, or all its settings; 0: none.
        """
        return self.begin_preview(refine).pictures()

    def begin_preview(self, refine: int | Refinement = 0) -> Preview:
        """Start to decode; on CUDA in parallel with drawing, elsewhere when the images are requested.

        Args:
            refine: steps of the refiner, or all its settings, applied when the images are requested; 0: none.

        Raises:
            InputError: a stream without a decoder of images, or a model without refiner.
        """
        if self._decoder is None:
            raise InputError("this stream has no decoder of images; draw with a ChannelTokPipeline")
        options = {"refine": refine} if refine else {}
        return Preview(self.num_tokens, self._decoder.start(self.tokens, torch.tensor(self.lengths), **options))

    def stop(self, images: Sequence[int]) -> None:
        """Stop some images here; the others continue, at the cost of the smaller batch.

        Raises:
            InputError: an index that is no image of this stream.
        """
        for image in images:
            if not 0 <= image < len(self.lengths):
                raise InputError(f"there is no image {image} to stop; there are 0..{len(self.lengths) - 1}")
        self._stopped.update(images)

    def keep(self, images: Sequence[int]) -> None:
        """Stop all images but these."""
        self.stop(images=[])
        kept = set(images)
        if unknown := kept - set(range(len(self.lengths))):
            raise InputError(f"there is no image {min(unknown)} to keep; there are 0..{len(self.lengths) - 1}")
        self.stop([image for image in range(len(self.lengths)) if image not in kept])


def _check(
    config: ChannelGPTConfig,
    labels: Tensor,
    seeds: Sequence[int],
    num_tokens: Sequence[int],
    sampling: SamplingConfig,
    prefix: Tensor | None,
    prefix_lengths: Sequence[int],
) -> None:
    if not len(labels):
        raise InputError("class_labels is empty; give at least one class")
    config.check_labels(labels.tolist())
    if len(seeds) != len(labels):
        raise InputError(f"there are {len(seeds)} seeds for {len(labels)} class labels; give one for each")
    if len(num_tokens) != len(labels):
        raise InputError(
            f"there are {len(num_tokens)} num_tokens for {len(labels)} class labels; give one for all or one for each"
        )
    for count in num_tokens:
        if not 1 <= count <= config.num_channels:
            raise InputError(f"num_tokens is {count}; this model draws 1..{config.num_channels}")
    if sampling.cfg_scale != 1 and not config.has_null_label:
        raise InputError(f"cfg_scale is {sampling.cfg_scale}, but this model was trained without null label; use 1")
    if prefix is None:
        return
    if prefix.dtype.is_floating_point or prefix.dtype.is_complex or prefix.dtype == torch.bool:
        raise InputError(f"prefix tokens are of type {prefix.dtype}; give integers")
    if prefix.ndim != 2 or len(prefix) != len(labels):
        raise InputError(
            f"prefix tokens are {tuple(prefix.shape)}; allowed are ({len(labels)}, j), a row for each label"
        )
    if len(prefix_lengths) != len(labels):
        raise InputError(f"there are {len(prefix_lengths)} prefix lengths for {len(labels)} labels; give one for each")
    for count, length in zip(num_tokens, prefix_lengths, strict=True):
        if not 1 <= length <= prefix.shape[1] or length >= count:
            raise InputError(
                f"a prefix has {length} tokens of {prefix.shape[1]} for num_tokens {count}; "
                "it must have at least 1 and fewer than num_tokens"
            )
    if int(prefix.min()) < 0 or int(prefix.max()) >= config.codebook_size:
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
    labels = torch.tensor(list(class_labels), dtype=torch.long)
    counts = [num_tokens] * len(labels) if isinstance(num_tokens, int) else list(num_tokens)
    prefix = prefix if prefix is None or prefix.dtype.is_floating_point else prefix.long()
    if prefix is None:
        given = [0] * len(labels)
    else:
        given = [prefix.shape[-1]] * len(labels) if prefix_lengths is None else list(prefix_lengths)
    _check(engine.decoder.config, labels, seeds, counts, sampling, prefix, given)
    numbers = uniforms(seeds, max(counts))
    return _Stream(engine, labels, numbers, counts, sampling, prefix, given, scored, decoder).steps()


class _Stream:
    """The loop's state. Slot s of the batch draws image images[s]; slots beyond are fillers."""

    def __init__(
        self,
        engine: Engine,
        labels: Tensor,
        numbers: Tensor,
        counts: list[int],
        sampling: SamplingConfig,
        prefix: Tensor | None,
        given: list[int],
        scored: bool,
        decoder: Any,
    ):
        self.engine, self.labels, self.numbers, self.counts = engine, labels, numbers, counts
        self.decoder = decoder
        self.sampling, self.given, self.scored = sampling, given, scored
        self.ends = list(counts)  # where each image ends; it may be stopped before
        self.scales = guidance_scales(sampling, engine.decoder.config.num_channels)
        guided = [scale != 1 for scale in self.scales.tolist()[: max(counts)]]
        self.guided = guided
        # from here on rows without class are not needed
        self.guided_end = max((position + 1 for position, on in enumerate(guided) if on), default=0)
        self.tokens = torch.zeros(len(labels), max(counts), dtype=torch.long)
        for row, length in enumerate(given):
            if prefix is not None:
                self.tokens[row, :length] = prefix[row, :length]
        self.images = list(range(len(labels)))
        self.shared = min(given)
        # images of the same class and the same prefix are read once and forked; this is the last host value read
        beginnings = [
            (label, *row) for label, row in zip(labels.tolist(), self.tokens[:, : self.shared].tolist(), strict=True)
        ]
        firsts = {key: image for image, key in reversed(list(enumerate(beginnings)))}
        self.distinct = sorted(firsts.values()) if self.shared else self.images
        self.sources = [self.distinct.index(firsts[key]) for key in beginnings] if self.shared else self.images

    def steps(self) -> Iterator[Step]:
        """Yield after every token; drop finished images between steps."""
        batch = self._prefilled()
        try:
            out = self.tokens.to(self.engine.decoder.device)
            likelihood = torch.zeros(len(self.counts), device=out.device)
            stopped: set[int] = set()
            for position in range(batch.next_position, max(self.counts)):
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
                batch = self._compacted(batch, live, position + 1)
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
        chosen = self.distinct
        batch = self.engine.begin(
            self.labels[chosen], self.tokens[chosen], torch.tensor(self.given)[chosen],
            self.numbers[chosen], self.scales, self.guided_end > 0,
        )  # fmt: skip
        for position in range(self.shared):
            if self.scored:
                self.engine.advance(batch, self.sampling, guided=False, scored=True)
            else:
                self.engine.feed(batch)
            batch = self._without_guidance(batch, position + 1, len(chosen))
        return self._forked(batch) if self.sources != self.images else batch

    def _forked(self, batch: Batch) -> Batch:
        """A slot for every image, from the slots that have read its prefix."""
        batch = self.engine.select(batch, self.sources, batch.guided)
        count = len(self.images)
        self.engine.set_prefix(batch, self.tokens, torch.tensor(self.given))
        batch.uniforms[:count, : self.numbers.shape[1]] = self.numbers.to(batch.uniforms)
        return batch

    def _without_guidance(self, batch: Batch, position: int, count: int) -> Batch:
        if batch.guided and position >= self.guided_end:
            return self.engine.select(batch, range(count), guided=False)
        return batch

    def _compacted(self, batch: Batch, live: list[int], position: int) -> Batch:
        """Drop finished images, and rows without class after the last guided position."""
        if self.engine.slots(len(live)) < batch.images:
            batch = self.engine.select(batch, live, batch.guided and position < self.guided_end)
            self.images = [self.images[slot] for slot in live]
        return self._without_guidance(batch, position, len(self.images))
