"""A variant in one direction: what it gives beside the plain network, its times and its memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.images import to_uint8
from common.measuring import held_bytes
from common.turns import Contender
from tokenizer.throughput.config import COMPILED
from tokenizer.throughput.variants import Variant

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
class Lane(Contender):
    """One variant in one direction, at one batch size, and what is known of it so far.

    `variant` is None where it could not be built. `difference`: see `Reference.difference`.
    """

    name: str
    dtype: str
    task: str
    batch_size: int
    variant: Variant | None
    given: Tensor
    difference: float | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name}, {self.dtype}, batch {self.batch_size}, {self.task}"

    @property
    def settles(self) -> bool:
        """Whether its first run is unlike the others: it compiles."""
        return self.name in COMPILED

    def prepare(self, reference: Reference, device: torch.device, max_seconds: float) -> None:
        """Warm up, compare with the reference, measure memory. A run beyond `max_seconds` is the one that counts."""

        def judge(result: Tensor) -> str | None:
            self.difference = reference.difference(self.task, result)
            return self._wrong(len(result) * reference.tokens.shape[1])

        self.first_runs(device, max_seconds, judge)

    def run(self) -> Tensor:
        """Encode or decode."""
        return self._built.work[self.task](self.given)

    def held(self) -> int:
        """Bytes of the weights of encoder and decoder."""
        return held_bytes(self._built.holder)

    @property
    def _built(self) -> Variant:
        if self.variant is None:
            raise AssertionError(f"{self.name} was not built ({self.error}), so it must not run")
        return self.variant

    def _wrong(self, num_tokens: int) -> str | None:
        """What is said of a float32 result that rounding does not explain; one token may always differ."""
        if self.dtype != "float32" or self.difference is None:
            return None
        if self.task == "encode":
            right = self.difference <= max(TOKENS_OF_ROUNDING, 1 / num_tokens)
            return None if right else f"wrong: {self.difference:.1%} of tokens differ"
        right = self.difference <= LEVELS_OF_ROUNDING
        return None if right else f"wrong: differs by {self.difference:.1f} grey levels"
