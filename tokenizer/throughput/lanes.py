"""A variant in one direction: what it gives beside the plain network, its times and its memory."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import InputError
from common.images import to_uint8
from common.measuring import MemoryWatch, held_bytes
from common.peak import timed
from common.runtime import is_out_of_memory
from tokenizer.throughput.config import COMPILED
from tokenizer.throughput.variants import Variant

OUT_OF_MEMORY = "out of memory"
# what rounding may do to float32: a bit of a token turns where a number is next to zero, seldom; a wrong network
# gives half of all bits another value, and so nearly every token. A decoded value moves by one grey level at most.
TOKENS_OF_ROUNDING = 0.02
LEVELS_OF_ROUNDING = 1.0


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What eager float32 gives: of images (b 3 H W) in [-1, 1] the tokens (b c), and of those decoded (b 3 H W)."""

    images: Tensor
    tokens: Tensor
    decoded: Tensor

    def given(self, task: str, batch_size: int) -> Tensor:
        """What a variant gets."""
        return (self.images if task == "encode" else self.tokens)[:batch_size]

    def difference(self, task: str, result: Tensor) -> float:
        """Share of tokens that differ, or the largest difference of a decoded value in grey levels (of 255)."""
        if task == "encode":
            return float((result != self.tokens[: len(result)]).double().mean())
        expected = self.decoded[: len(result)]
        if result.dtype == torch.uint8:
            return float((result.int() - to_uint8(expected).int()).abs().max())
        return float((result.float() - expected).abs().max() * 127.5)


@dataclass(kw_only=True)
class Lane:
    """One variant in one direction, at one batch size, and what is known of it so far.

    `variant` is None where it could not be built; `error` says why it is not timed.
    `difference`: see `Reference.difference`; `memory`: bytes at the peak, None where it cannot be told.
    """

    name: str
    dtype: str
    task: str
    batch_size: int
    variant: Variant | None
    given: Tensor
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    difference: float | None = None
    error: str | None = None

    def prepare(self, reference: Reference, device: torch.device, max_seconds: float) -> None:
        """Warm up, compare with the reference, measure memory. A run beyond `max_seconds` is the one that counts."""

        def first() -> None:
            seconds, growth, result = self._watched(device)
            self.difference = reference.difference(self.task, result)
            self.error = self._wrong(len(result) * reference.tokens.shape[1])
            if self.error is None and (self.name in COMPILED or seconds < max_seconds):
                seconds, growth, _ = self._watched(device)
            if seconds >= max_seconds:
                self.seconds.append(seconds)
            self.memory = None if growth is None else held_bytes(self._built.holder) + growth

        self._unless_out_of_memory(first)

    def repeat(self, device: torch.device, max_seconds: float) -> None:
        """Time one run more, unless those so far took `max_seconds` together."""

        def again() -> None:
            if sum(self.seconds) < max_seconds:
                self.seconds.append(timed(device, self._run)[0])

        self._unless_out_of_memory(again)

    @property
    def _built(self) -> Variant:
        if self.variant is None:
            raise AssertionError(f"{self.name} was not built ({self.error}), so it must not run")
        return self.variant

    def _run(self) -> Tensor:
        return self._built.work[self.task](self.given)

    def _watched(self, device: torch.device) -> tuple[float, int | None, Tensor]:
        with MemoryWatch(device) as watch:
            seconds, result = timed(device, self._run)
        return seconds, watch.growth, result

    def _wrong(self, num_tokens: int) -> str | None:
        """What is said of a float32 result that rounding does not explain; one token may always differ."""
        if self.dtype != "float32" or self.difference is None:
            return None
        if self.task == "encode":
            right = self.difference <= max(TOKENS_OF_ROUNDING, 1 / num_tokens)
            return None if right else f"wrong: {self.difference:.1%} of tokens differ"
        right = self.difference <= LEVELS_OF_ROUNDING
        return None if right else f"wrong: differs by {self.difference:.1f} grey levels"

    def _unless_out_of_memory(self, action: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except (RuntimeError, MemoryError, InputError) as error:
            if not ran_out(error):
                raise
            self.error = OUT_OF_MEMORY
        if self.error is not None:
            self.seconds.clear()
            self.memory = None


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out; also where that has been put into a user's words already."""
    return is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
