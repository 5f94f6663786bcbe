"""Rules that stop images before their last channel: a deadline, a stable image, better images of the same class.

A rule is called after every step and names the images to stop there; `generate.Step.stop` does the rest.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.config import InputError
from generator.generate import Step

StopRule = Callable[[Step], Sequence[int]]
Scorer = Callable[[Step], Sequence[float]]


def ruled(steps: Iterator[Step], rules: Sequence[StopRule]) -> Iterator[Step]:
    """Steps of a stream in which images are stopped where a rule says so."""
    for step in steps:
        for rule in rules:
            step.stop(rule(step))
        yield step


class Deadline:
    """Stop all images when one more token and the decoding, of `decode_seconds`, might not be ready in time.

    The `seconds` begin when the rule is made. A step is taken to last as long as the slowest of the last
    eight did. At least one token is drawn, however short the time. The device is waited for before the clock is read.

    Raises:
        InputError: seconds that are not above 0.
    """

    def __init__(
        self,
        seconds: float,
        decode_seconds: float,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if not 0 < seconds < math.inf:
            raise InputError(f"deadline is {seconds}; it must be a number of seconds above 0")
        self._clock, self._device = clock, device
        self._latest = clock()
        self._end = self._latest + seconds - decode_seconds
        self._steps: list[float] = []

    def __call__(self, step: Step) -> Sequence[int]:
        """All images, or none."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        elif self._device.type == "mps":
            torch.mps.synchronize()
        now = self._clock()
        self._steps = [*self._steps[-7:], now - self._latest]
        self._latest = now
        return step.drawing if now + max(self._steps) > self._end else ()


class WhenStable:
    """Stop an image when further channels no longer change it.

    After every C/16 tokens all images are decoded, and each is compared with itself C/16 tokens before: the mean
    absolute difference over pixels and colours, in grey levels of 0..255. An image stops when that is below `epsilon`;
    the full image then differs by one to two times that. `decode` maps tokens (b k) to images (b 3 H W) uint8.

    Raises:
        InputError: an epsilon that is not above 0.
    """

    def __init__(self, epsilon: float, decode: Callable[[Tensor], Tensor], num_channels: int):
        if not 0 < epsilon < math.inf:
            raise InputError(f"stop_when_stable is {epsilon}; it must be a number of grey levels above 0")
        self._epsilon, self._decode = epsilon, decode
        self._stride = max(1, num_channels // 16)
        self._before: dict[int, Tensor] = {}

    def __call__(self, step: Step) -> Sequence[int]:
        """The images that are stable at this step."""
        if step.num_tokens % self._stride or not step.drawing:
            return ()
        pictures = self._decode(step.tokens[list(step.drawing)]).short()
        before, self._before = self._before, dict(zip(step.drawing, pictures, strict=True))
        known = [image for image in step.drawing if image in before]
        changes = [(self._before[image] - before[image]).abs().float().mean() for image in known]
        changes = torch.stack(changes).tolist() if known else []  # waits for the device once
        return [image for image, change in zip(known, changes, strict=True) if change < self._epsilon]


def log_likelihood_scorer(step: Step) -> Sequence[float]:
    """The built-in scorer: the generator's own log-likelihood of each image's tokens, in nats."""
    if step.log_likelihood is None:
        raise InputError("the stream has no log-likelihood; set scored=True")
    scores: list[float] = step.log_likelihood.tolist()
    return scores


class KeepBest:
    """At k = num_tokens, stop all images but the `keep` best of each class; ties go to the earlier image.

    `scorer` maps a step to a number for each image, higher is better.
    """

    def __init__(self, class_labels: Sequence[int], num_tokens: int, keep: int, scorer: Scorer):
        self._labels, self._num_tokens, self._keep, self._scorer = class_labels, num_tokens, keep, scorer

    def __call__(self, step: Step) -> Sequence[int]:
        """The images that are not kept, at the given k.

        Raises:
            InputError: scores of another number than there are images.
        """
        if step.num_tokens != self._num_tokens:
            return ()
        scores = list(self._scorer(step))
        if len(scores) != len(self._labels):
            raise InputError(f"the scorer gave {len(scores)} numbers for {len(self._labels)} images")
        stopped: list[int] = []
        for label in dict.fromkeys(self._labels):
            own = [image for image, other in enumerate(self._labels) if other == label]
            stopped += sorted(own, key=lambda image: -scores[image])[self._keep :]
        return stopped
