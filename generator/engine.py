"""The engine: what one step of a batch costs. Eager, compiled, or captured as a CUDA graph; the same formulas.

A `Batch` is the state of some drawings on the device; `Engine.advance` draws one more token of each of
them, and nothing in it waits for the device. `generate.stream` decides which drawings go on.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.runtime import check_can_compile
from generator.decode import Cache, CachedDecoder, Layer, LayerCache, Rotation, blocks, head
from generator.products import LIBRARY, SUMS
from generator.sampling import SamplingConfig, draw, guide

FEW_ROWS = 8  # compiled sums serve up to so many rows at once; more would spill the processor's registers
LENGTH_STEP = 64  # attention reads the cache in multiples of this many positions
KEPT_BATCHES = 4  # how many batches' buffers and graphs a compiled or captured engine keeps for the next drawing
KEPT_GRAPHS = 64  # of one batch; each setting of the filters and each length of view has its own


@dataclass(kw_only=True, eq=False)
class Batch:
    """Drawings side by side. All tensors are on the device and stay where they are: a graph may hold them.

    With guidance the caches of the unconditional halves are rows `images`.. of `cache`.
    """

    sequences: Tensor  # (images, C + 1) int64: the class row, then tokens; what is not drawn yet means nothing
    null_rows: Tensor  # (images,) int64: the row of no class
    uniforms: Tensor  # (images, C) float64 (float32 where the device has no other): one number for each token
    given: Tensor  # (images,) int64: tokens of a prefix, which are read and not drawn
    position: Tensor  # (1,) int64: the next position to feed
    scales: Tensor  # (C,) float32: guidance at each position
    log_likelihood: Tensor  # (images,) float32: nats, of the tokens so far
    cache: Cache
    capacity: int
    guided: bool
    next_position: int = 0  # the host's copy of `position`
    views: dict[int, list[tuple[int, int, list[LayerCache]]]] = field(default_factory=dict)
    graphs: dict[Any, torch.cuda.CUDAGraph] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Drawings, fillers of a rounded-up batch counted too."""
        return len(self.sequences)


def _summed_blocks(
    hidden: Tensor,
    layers: list[Layer],
    caches: list[LayerCache],
    rotation: Rotation,
    position: Tensor,
    mask: Tensor,
    eps: float,
) -> Tensor:
    return blocks(SUMS, hidden, layers, caches, rotation, position, mask, eps)


def _summed_head(hidden: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    return head(SUMS, hidden, norm, weight, eps)


@cache
def _compiled(function: types.FunctionType, rows: int) -> Callable[..., Tensor]:
    """A compiled function for so many rows.

    Each number of rows gets a code object of its own: torch.compile counts the versions of a code
    object, and past a limit it falls back to eager without a word.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{rows}_rows")
    own = types.FunctionType(code, function.__globals__, code.co_name)
    return torch.compile(own, dynamic=False, fullgraph=True)


class Engine:
    """Draws tokens with a decoder.

    Args:
        decoder: the weights.
        compile: compile the step: several times faster for a few images at a time, after 10 to 60
            seconds of compiling (remembered on disk by torch). Needs a C++ compiler on a CPU. On a CPU
            a token's bits are then the same in any batch.

    On CUDA the whole step, sampling included, is captured as a graph, compiled or not.

    Raises:
        InputError: compile, without a C++ compiler.
    """

    def __init__(self, decoder: CachedDecoder, *, compile: bool = False):
        if compile:
            check_can_compile(decoder.device)
        self.decoder, self.compile = decoder, compile
        self.captures = decoder.device.type == "cuda"
        # sums beat the library for few rows only; on a CPU the rest is walked in parts of a few
        self._few = FEW_ROWS if decoder.device.type == "cpu" else 2
        self._in_parts = compile and decoder.device.type == "cpu"
        self._arange = torch.arange(decoder.layout.num_channels, device=decoder.device)
        self._kept: list[Batch] = []
        self._pool: Any = torch.cuda.graph_pool_handle() if self.captures else None
        # compiling all layers as one takes minutes, one by one costs a call for each: groups of equal size
        self._group = max(size for size in (1, 2, 3, 4, 5, 6) if len(decoder.layers) % size == 0)

    # --------------------------------------------------------------------------------- batches

    def slots(self, images: int) -> int:
        """Images rounded up to a size that is compiled or captured: 1, 2, 4, or a multiple of 8."""
        if not (self.compile or self.captures):
            return images
        return next((size for size in (1, 2, 4) if size >= images), -(-images // 8) * 8)

    def begin(
        self,
        class_labels: Tensor,
        tokens: Tensor,
        given: Tensor,
        uniforms: Tensor,
        scales: Tensor,
        guided: bool,
    ) -> Batch:
        """A batch that has fed nothing yet.

        Args:
            class_labels: (b,) int64.
            tokens: (b k) int64: k is the most that will be drawn; the first given[i] of row i are read, not drawn.
            given: (b,) int64.
            uniforms: (b k) in [0, 1).
            scales: (C,), guidance at each position.
            guided: whether any of them is not 1.
        """
        device, layout = self.decoder.device, self.decoder.layout
        batch = self._acquire(len(class_labels), tokens.shape[1], guided)
        rows = self._filled(range(len(class_labels)), batch.images)
        length = tokens.shape[1]
        batch.sequences[:, 0] = layout.class_rows(class_labels.to(device))[rows]
        batch.sequences[:, 1 : length + 1] = tokens.to(device)[rows]
        batch.uniforms[:, :length] = uniforms.to(device, batch.uniforms.dtype)[rows]
        batch.given.copy_(given.to(device)[rows])
        batch.scales.copy_(scales)
        batch.position.zero_()
        batch.log_likelihood.zero_()
        batch.next_position = 0
        return batch

    def select(self, batch: Batch, images: Sequence[int], guided: bool) -> Batch:
        """A batch of some images of another, in that order; an image may be named twice (a fork).

        The other batch is given up. `guided` may turn from true to false: the unconditional half is dropped.
        """
        chosen = self._acquire(len(images), batch.capacity, guided)
        rows = self._filled(images, chosen.images)
        for name in ("sequences", "null_rows", "uniforms", "given", "log_likelihood"):
            getattr(chosen, name).copy_(getattr(batch, name).index_select(0, rows))
        chosen.position.copy_(batch.position)
        chosen.scales.copy_(batch.scales)
        chosen.next_position = batch.next_position
        cache_rows = torch.cat([rows, rows + batch.images]) if guided else rows
        chosen.cache.take_rows(batch.cache, cache_rows, batch.next_position)
        self.release(batch)
        return chosen

    def release(self, batch: Batch) -> None:
        """Give a batch up; its buffers and graphs are kept for the next one of its size, unless sizes are any."""
        if self.captures or self.compile:
            self._kept = [*self._kept[-KEPT_BATCHES + 1 :], batch]

    def _filled(self, images: Sequence[int], slots: int) -> Tensor:
        """Indices of images, the first one again for each slot that is left over."""
        return torch.tensor([*images, *[images[0]] * (slots - len(images))], device=self.decoder.device)

    def _acquire(self, images: int, capacity: int, guided: bool) -> Batch:
        decoder, slots = self.decoder, self.slots(images)
        channels, device = decoder.layout.num_channels, decoder.device
        # whole views, so that how a position is computed hangs on the position alone and not on the k asked for
        capacity = min(-(-capacity // LENGTH_STEP) * LENGTH_STEP, channels)
        if self.compile or self.captures:
            # one layout of the cache, so that one program serves every k; the position too many keeps the
            # longest view from being contiguous, which would be another layout
            capacity = channels + 1
        for kept in self._kept:
            if (kept.images, kept.guided) == (slots, guided):
                self._kept.remove(kept)
                return kept
        null_row = decoder.layout.class_rows(torch.tensor(decoder.layout.null_label))
        return Batch(
            sequences=torch.zeros(slots, channels + 1, dtype=torch.long, device=device),
            null_rows=null_row.to(device).repeat(slots),
            uniforms=torch.zeros(
                slots, channels, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
            ),
            given=torch.zeros(slots, dtype=torch.long, device=device),
            position=torch.zeros(1, dtype=torch.long, device=device),
            scales=torch.ones(channels, device=device),
            log_likelihood=torch.zeros(slots, device=device),
            cache=decoder.new_cache(slots * (2 if guided else 1), capacity),
            capacity=capacity,
            guided=guided,
        )

    # --------------------------------------------------------------------------------- steps

    @torch.no_grad()
    def feed(self, batch: Batch) -> None:
        """Read one more token of a prefix, drawing nothing."""
        self._run(batch, "feed", partial(self._feed, batch, self._length(batch)))

    @torch.no_grad()
    def advance(self, batch: Batch, sampling: SamplingConfig, *, guided: bool, scored: bool) -> None:
        """Draw one more token of every image.

        Args:
            batch: its `sequences` hold the token at `next_position` afterwards.
            sampling: the filters.
            guided: whether this position's scale is not 1; the unconditional half is fed all the same.
            scored: add the tokens' log-likelihood (of the conditional model itself, before any filter).
        """
        key = (sampling.temperature, sampling.top_k, sampling.top_p, guided, scored)
        self._run(batch, key, partial(self._advance, batch, self._length(batch), sampling, guided, scored))

    def _length(self, batch: Batch) -> int:
        channels = self.decoder.layout.num_channels
        return min(-(-(batch.next_position + 1) // LENGTH_STEP) * LENGTH_STEP, batch.capacity, channels)

    def _run(self, batch: Batch, key: Any, step: Callable[[], None]) -> None:
        if not self.captures:
            step()
        else:
            full_key = (key, self._length(batch))
            if full_key not in batch.graphs:
                if len(batch.graphs) >= KEPT_GRAPHS:
                    batch.graphs.clear()
                batch.graphs[full_key] = self._capture(batch, step)
            batch.graphs[full_key].replay()
        batch.next_position += 1

    def _capture(self, batch: Batch, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record a step. Warming up runs it for real, so what it changed is put back; the cache is written again."""
        changed = (batch.sequences, batch.position, batch.log_likelihood)
        before = [tensor.clone() for tensor in changed]
        side = torch.cuda.Stream(self.decoder.device)
        side.wait_stream(torch.cuda.current_stream(self.decoder.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream(self.decoder.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph

    def _feed(self, batch: Batch, length: int) -> None:
        self._forward(batch, length, with_logits=False)
        batch.position.add_(1)

    def _advance(self, batch: Batch, length: int, sampling: SamplingConfig, guided: bool, scored: bool) -> None:
        logits = self._forward(batch, length, with_logits=True)
        conditional = logits[: batch.images]
        if guided:
            scale = batch.scales.index_select(0, batch.position)
            logits = guide(conditional, logits[batch.images :], scale)
        uniform = batch.uniforms.index_select(1, batch.position)[:, 0]
        drawn = draw(logits if guided else conditional, uniform, sampling)
        following = batch.position + 1
        earlier = batch.sequences.index_select(1, following)[:, 0]
        token = torch.where(batch.position < batch.given, earlier, drawn)
        batch.sequences.index_copy_(1, following, token[:, None])
        if scored:
            batch.log_likelihood += conditional.log_softmax(-1).gather(1, token[:, None])[:, 0]
        batch.position.add_(1)

    def _forward(self, batch: Batch, length: int, *, with_logits: bool) -> Tensor:
        """Feed each image's row at the batch's position: logits (rows codebook_size), or nothing of use."""
        rows = batch.sequences.index_select(1, batch.position)[:, 0]
        if batch.guided:
            # at position 0 the unconditional half reads the null class, later the tokens of its image
            rows = torch.cat([rows, torch.where(batch.position == 0, batch.null_rows, rows)])
        if length not in batch.views:
            batch.views[length] = self._parts(batch, len(rows), length)
        hidden = F.embedding(rows, self.decoder.embedding).float()
        if self.decoder.positions is not None:
            hidden = hidden + self.decoder.positions.index_select(0, batch.position)
        mask = self._arange[:length] <= batch.position
        if self.compile:
            torch._dynamo.mark_dynamic(mask, 0)  # noqa: SLF001
        outputs = []
        for start, end, caches in batch.views[length]:
            part = self._blocks(hidden[start:end], caches, batch.position, mask)
            outputs.append(self._head(part) if with_logits else part)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _parts(self, batch: Batch, num_rows: int, length: int) -> list[tuple[int, int, list[LayerCache]]]:
        size = self._few if self._in_parts else num_rows
        edges = [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
        parts = [(start, end, batch.cache.layers(start, end, length)) for start, end in edges]
        if self.compile:
            for entry in (entry for _, _, layers in parts for pair in layers for entry in pair):
                torch._dynamo.mark_dynamic(entry, 2)  # noqa: SLF001 - documented, in spite of its name
        return parts

    def _blocks(self, hidden: Tensor, caches: list[LayerCache], position: Tensor, mask: Tensor) -> Tensor:
        decoder, few = self.decoder, self.compile and len(hidden) <= self._few
        size = self._group if few else len(decoder.layers)
        function = _compiled(_summed_blocks, len(hidden)) if few else partial(blocks, LIBRARY)
        for start in range(0, len(decoder.layers), size):
            end = start + size
            hidden = function(
                hidden, decoder.layers[start:end], caches[start:end], decoder.rotation, position, mask, decoder.norm_eps
            )
        return hidden

    def _head(self, hidden: Tensor) -> Tensor:
        decoder, few = self.decoder, self.compile and len(hidden) <= self._few
        function = _compiled(_summed_head, len(hidden)) if few else partial(head, LIBRARY)
        return function(hidden, decoder.final_norm, decoder.code_head, decoder.norm_eps)
