"""The engine: runs the cached step of a batch eagerly, compiled, or captured as a CUDA graph; the same formulas.

A `Batch` is the state of some images on the device; `Engine.advance` draws one more token of each of
them without waiting for the device. `generate.stream` decides which images continue.
"""

import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from common.bit_prior import token_bits
from common.runtime import check_can_compile
from generator.config import SamplingConfig
from generator.decode import LIBRARY, SUMS, Cache, CachedDecoder, LayerCache, blocks, embed, head, prior
from generator.sampling import code_log_probabilities, draw, guide

FEW_ROWS = 8  # compiled sums serve up to so many rows at once; more would spill the processor's registers
LENGTH_STEP = 64  # attention reads the cache in multiples of this many positions
KEPT_BATCHES = 4  # how many batches' buffers and graphs a compiled or captured engine keeps for the next drawing
KEPT_GRAPHS = 64  # of one batch; each setting of the filters and each length of view has its own


@dataclass(kw_only=True, eq=False)
class Batch:
    """Images drawn together. All tensors stay at their addresses on the device, since a graph may hold them.

    There is a row for each image, and with guidance, from row `images` on, another one without class.
    """

    tokens: Tensor  # (images, C) int64; those not drawn yet have no meaning
    bits: Tensor  # (images, C + 1, n) float32: row 0 is zeros, row c + 1 has the bits of token c
    class_vectors: Tensor  # (rows, d) float32
    class_odds: Tensor  # (rows, C, n) float32: what the class adds to the log-odds of bits
    uniforms: Tensor  # (images, C) float64 (float32 where the device has no other): one number for each token
    given: Tensor  # (images,) int64: tokens of a prefix, which are read and not drawn
    position: Tensor  # (1,) int64: the channel to predict next
    scales: Tensor  # (C,) float32: guidance at each position
    log_likelihood: Tensor  # (images,) float32: nats, of the tokens so far
    cache: Cache
    capacity: int
    guided: bool
    next_position: int = 0  # the host's copy of `position`
    views: dict[int, list[list[LayerCache]]] = field(default_factory=dict)  # by length, for each part of the rows
    graphs: dict[Any, torch.cuda.CUDAGraph] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images, including those that fill up a rounded-up batch."""
        return len(self.tokens)


@cache
def _compiled(function: types.FunctionType, rows: int) -> Callable[..., Tensor]:
    """Compile a function for so many rows.

    Each number of rows gets its own code object: torch.compile falls back to eager, without a warning, after a limited
    number of versions of one.
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
        # sums beat the library for few rows only; on a CPU more rows are processed a few at a time
        self._few = FEW_ROWS if decoder.device.type == "cpu" else 2
        self._in_parts = compile and decoder.device.type == "cpu"
        self._arange = torch.arange(decoder.config.num_channels, device=decoder.device)
        self._kept: list[Batch] = []
        self._lock = threading.Lock()  # threads share the kept batches and the graphs' memory
        self._pool: Any = torch.cuda.graph_pool_handle() if self.captures else None
        # compiling all layers as one takes minutes, and each call has a cost: groups of equal size
        self._group = max(size for size in (1, 2, 3, 4, 5, 6) if len(decoder.layers) % size == 0)

    def slots(self, images: int) -> int:
        """Images rounded up to a size that is compiled or captured: 1, 2, 4, or a multiple of 8."""
        if not (self.compile or self.captures):
            return images
        return next((size for size in (1, 2, 4) if size >= images), -(-images // 8) * 8)

    def begin(
        self, class_labels: Tensor, tokens: Tensor, given: Tensor, uniforms: Tensor, scales: Tensor, guided: bool
    ) -> Batch:
        """Start a batch at position 0: labels (b,), tokens (b k) of which the first given[i] are read and not drawn.

        k is the most that will be drawn, `uniforms` (b k) are in [0, 1), `scales` (C,) is the guidance at each
        position, and `guided` whether any of them is not 1.
        """
        device, length, tables = self.decoder.device, tokens.shape[1], self.decoder.tables
        batch = self._acquire(len(class_labels), length, guided)
        rows = self._filled(range(len(class_labels)), batch.images)
        labels = class_labels.to(device)[rows]
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.decoder.config.null_label)])
        batch.class_vectors.copy_(tables.class_vectors[labels])
        batch.class_odds.copy_(tables.class_odds[labels])
        self.set_prefix(batch, tokens.to(device)[rows], given.to(device)[rows])
        batch.uniforms[:, :length] = uniforms.to(device, batch.uniforms.dtype)[rows]
        batch.scales.copy_(scales)
        batch.position.zero_()
        batch.log_likelihood.zero_()
        batch.next_position = 0
        return batch

    def set_prefix(self, batch: Batch, tokens: Tensor, given: Tensor) -> None:
        """Set tokens (images k) of a batch, of which the first given[i] of row i are read, not drawn."""
        tokens = tokens.to(batch.tokens.device)
        batch.tokens[: len(tokens), : tokens.shape[1]] = tokens
        batch.bits[: len(tokens), 1 : tokens.shape[1] + 1] = token_bits(tokens, batch.bits.shape[2])
        batch.given[: len(tokens)] = given.to(batch.given.device)

    def select(self, batch: Batch, images: Sequence[int], guided: bool) -> Batch:
        """A batch of some images of another, in that order; an image may be named twice (a fork).

        The other batch is released. `guided` may change from true to false: the rows without class are dropped.
        """
        chosen = self._acquire(len(images), batch.capacity, guided)
        indices = self._filled(images, chosen.images)
        for name in ("tokens", "bits", "uniforms", "given", "log_likelihood"):
            getattr(chosen, name).copy_(getattr(batch, name).index_select(0, indices))
        rows = torch.cat([indices, indices + batch.images]) if guided else indices
        for name in ("class_vectors", "class_odds"):
            getattr(chosen, name).copy_(getattr(batch, name).index_select(0, rows))
        chosen.position.copy_(batch.position)
        chosen.scales.copy_(batch.scales)
        chosen.next_position = batch.next_position
        chosen.cache.take_rows(batch.cache, rows, batch.next_position)
        self.release(batch)
        return chosen

    def release(self, batch: Batch) -> None:
        """Release a batch; compiled and captured engines keep its buffers and graphs for the next one of its size."""
        if self.captures or self.compile:
            with self._lock:
                self._kept = [*self._kept[-KEPT_BATCHES + 1 :], batch]

    def _filled(self, images: Sequence[int], slots: int) -> Tensor:
        """Indices of images; the first one fills the remaining slots."""
        return torch.tensor([*images, *[images[0]] * (slots - len(images))], device=self.decoder.device)

    def _acquire(self, images: int, capacity: int, guided: bool) -> Batch:
        decoder, config, slots = self.decoder, self.decoder.config, self.slots(images)
        channels, bits, device = config.num_channels, config.num_bits, decoder.device
        # whole views, so that the computation of a position does not depend on the requested k
        capacity = min(-(-capacity // LENGTH_STEP) * LENGTH_STEP, channels)
        if self.compile or self.captures:
            # one layout of the cache, so that one program serves every k; one position more than needed keeps the
            # longest view from being contiguous, which would be another layout
            capacity = channels + 1
        with self._lock:
            for kept in self._kept:
                if (kept.images, kept.guided) == (slots, guided):
                    self._kept.remove(kept)
                    return kept
        rows = slots * (2 if guided else 1)
        exact = torch.float32 if device.type == "mps" else torch.float64
        return Batch(
            tokens=torch.zeros(slots, channels, dtype=torch.long, device=device),
            bits=torch.zeros(slots, channels + 1, bits, device=device),
            class_vectors=torch.zeros(rows, config.hidden_size, device=device),
            class_odds=torch.zeros(rows, channels, bits, device=device),
            uniforms=torch.zeros(slots, channels, dtype=exact, device=device),
            given=torch.zeros(slots, dtype=torch.long, device=device),
            position=torch.zeros(1, dtype=torch.long, device=device),
            scales=torch.ones(channels, device=device),
            log_likelihood=torch.zeros(slots, device=device),
            cache=decoder.new_cache(rows, capacity),
            capacity=capacity,
            guided=guided,
        )

    @torch.no_grad()
    def feed(self, batch: Batch) -> None:
        """Read one more token of a prefix without drawing."""
        self._run(batch, "feed", partial(self._feed, batch, self._length(batch)))

    @torch.no_grad()
    def advance(self, batch: Batch, sampling: SamplingConfig, *, guided: bool, scored: bool) -> None:
        """Draw one more token of every image.

        `guided` tells whether this position's scale is not 1; rows without class are computed in any case. `scored`
        adds the tokens' log-likelihood (of the conditional model itself, before any filter).
        """
        key = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.autoguidance, guided, scored)
        self._run(batch, key, partial(self._advance, batch, self._length(batch), sampling, guided, scored))

    def _length(self, batch: Batch) -> int:
        channels = self.decoder.config.num_channels
        return min(-(-(batch.next_position + 1) // LENGTH_STEP) * LENGTH_STEP, batch.capacity, channels)

    def _run(self, batch: Batch, key: Any, step: Callable[[], None]) -> None:
        key = (key, self._length(batch))
        if self.captures:
            if key not in batch.graphs:
                if len(batch.graphs) >= KEPT_GRAPHS:
                    batch.graphs.clear()
                with self._lock:
                    batch.graphs[key] = self._capture(batch, step)
            batch.graphs[key].replay()
        else:
            step()
        batch.next_position += 1

    def _capture(self, batch: Batch, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record a step. Warming up changes the batch, so its state is restored; the cache is written again."""
        changed = (batch.tokens, batch.bits, batch.position, batch.log_likelihood)
        before = [tensor.clone() for tensor in changed]
        side, current = torch.cuda.Stream(self.decoder.device), torch.cuda.current_stream(self.decoder.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph

    def _feed(self, batch: Batch, length: int) -> None:
        self._blocks(batch, length)
        batch.position.add_(1)

    def _advance(self, batch: Batch, length: int, sampling: SamplingConfig, guided: bool, scored: bool) -> None:
        hidden = self._blocks(batch, length)
        logits = code_log_probabilities(*self._odds(batch, hidden, guided, sampling.autoguidance))
        conditional = logits[: batch.images]
        if guided:
            scale = batch.scales.index_select(0, batch.position)
            logits = guide(conditional, logits[batch.images :], scale)
        if scored and sampling.autoguidance != 1:
            conditional = code_log_probabilities(*self._odds(batch, hidden, guided=False))
        uniform = batch.uniforms.index_select(1, batch.position)[:, 0]
        drawn = draw(logits, uniform, sampling)
        earlier = batch.tokens.index_select(1, batch.position)[:, 0]
        token = torch.where(batch.position < batch.given, earlier, drawn)
        if scored:
            batch.log_likelihood += conditional.gather(1, token[:, None])[:, 0]
        batch.tokens.index_copy_(1, batch.position, token[:, None])
        batch.position.add_(1)
        batch.bits.index_copy_(1, batch.position, token_bits(token, batch.bits.shape[2])[:, None])

    def _blocks(self, batch: Batch, length: int) -> Tensor:
        """Output of the last block at the batch's position, (rows d)."""
        decoder, position = self.decoder, batch.position
        previous = batch.bits.index_select(1, position)[:, 0]
        if batch.guided:
            previous = torch.cat([previous, previous])
        if length not in batch.views:
            batch.views[length] = [batch.cache.layers(part, length) for part in self._parts(len(previous))]
            if self.compile:
                for entry in (entry for layers in batch.views[length] for pair in layers for entry in pair):
                    torch._dynamo.mark_dynamic(entry, 2)  # noqa: SLF001 - documented, in spite of its name
        mask = torch.where(self._arange[:length] <= position, 0.0, -torch.inf)
        if self.compile:
            torch._dynamo.mark_dynamic(mask, 0)  # noqa: SLF001
        outputs = []
        for part, caches in zip(self._parts(len(previous)), batch.views[length], strict=True):
            hidden = self._call(embed, previous[part], batch.class_vectors[part], decoder.tables, position)
            size = self._group if self._uses_sums(len(hidden)) else len(decoder.layers)
            for first in range(0, len(decoder.layers), size):
                group = slice(first, first + size)
                hidden = self._call(
                    blocks, hidden, decoder.layers[group], caches[group], decoder.rotation, position, mask
                )
            outputs.append(hidden)
        return torch.cat(outputs)

    def _odds(self, batch: Batch, hidden: Tensor, guided: bool, autoguidance: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-odds (rows n) and pairs (rows n n) of the next code; rows without class only where `guided`."""
        decoder, position, bits = self.decoder, batch.position, batch.bits.shape[2]
        rows = batch.images * (2 if guided else 1)
        trunk = torch.cat([self._call(head, hidden[part], decoder.tables, position) for part in self._parts(rows)])
        if autoguidance != 1:
            trunk = trunk * autoguidance
        linear = torch.cat(
            [self._call(prior, batch.bits[part], decoder.tables, position) for part in self._parts(batch.images)]
        )
        if guided:
            linear = torch.cat([linear, linear])
        class_odds = batch.class_odds[:rows].index_select(1, position)[:, 0]
        pairs = trunk[:, bits:] + decoder.tables.pairs.index_select(0, position)
        return trunk[:, :bits] + linear + class_odds, pairs.unflatten(1, (bits, bits))

    def _parts(self, num_rows: int) -> list[slice]:
        """Rows that are computed together: a few where a CPU's sums are compiled, else all."""
        size = self._few if self._in_parts else num_rows
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def _uses_sums(self, rows: int) -> bool:
        return self.compile and rows <= self._few

    def _call(self, function: Any, rows: Tensor, *arguments: Any) -> Tensor:
        """Call a function of generator.decode: compiled sums for few rows, otherwise the library's products."""
        if self._uses_sums(len(rows)):
            return _compiled(function, len(rows))(SUMS, rows, *arguments)
        result: Tensor = function(LIBRARY, rows, *arguments)
        return result
