"""Rules that stop images before their last channel: a deadline, a stable image, better images of the same class.

A rule is called after every step and names the images to stop there; `generate.Step.stop` does the rest.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.errors import InputError
from generator.generate import Step

StopRule = Callable[[Step], Sequence[int]]
Clock = Callable[[], float]
Decode = Callable[[Tensor], Tensor]  # tokens (b k) -> images (b 3 H W) uint8
Scorer = Callable[[Step], Sequence[float]]


def ruled(steps: Iterator[Step], rules: Sequence[StopRule]) -> Iterator[Step]:
    """Steps of a stream in which images are stopped where a rule says so."""
    for step in steps:
        for rule in rules:
            step.stop(rule(step))
        yield step


class Deadline:
    """Stop all images when one more token and the decoding might not be ready in time.

    The clock starts when the rule is made. A step is taken to last as long as the slowest of the last
    eight did. At least one token is drawn, however short the time.

    Args:
        seconds: from now to the finished images.
        decode_seconds: measured time to decode all of them.
        wait: called before the clock is read; waits for the device, or does nothing on a CPU.
        clock: seconds, only differences count.

    Raises:
        InputError: seconds that are not above 0.
    """

    def __init__(
        self,
        seconds: float,
        decode_seconds: float,
        wait: Callable[[], None],
        clock: Clock = time.perf_counter,
    ):
        if not 0 < seconds < math.inf:
            raise InputError(f"deadline is {seconds}; it must be a number of seconds above 0")
        self._clock, self._wait = clock, wait
        self._latest = clock()
        self._end = self._latest + seconds - decode_seconds
        self._steps: list[float] = []

    def __call__(self, step: Step) -> Sequence[int]:
        """All images, or none."""
        self._wait()
        now = self._clock()
        self._steps = [*self._steps[-7:], now - self._latest]
        self._latest = now
        return step.drawing if now + max(self._steps) > self._end else ()


class WhenStable:
    """Stop an image when further channels no longer change it.

    After every C/16 tokens all images are decoded, and each is compared with itself C/16 tokens before: the mean
    absolute difference over pixels and colours, in grey levels of 0..255. An image stops when that is below `epsilon`;
    the full image then differs by one to two times that.

    Args:
        epsilon: grey levels, above 0.
        decode: tokens to images.
        num_channels: C of the model; the stride does not depend on the number of tokens that was requested.

    Raises:
        InputError: an epsilon that is not above 0.
    """

    def __init__(self, epsilon: float, decode: Decode, num_channels: int):
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
        if not known:
            return ()
        changes = torch.stack([(self._before[i] - before[i]).abs().float().mean() for i in known]).tolist()
        return [image for image, change in zip(known, changes, strict=True) if change < self._epsilon]


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that waits for the device; it does nothing on a CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.current_stream(device).synchronize()
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


def log_likelihood_scorer(step: Step) -> Sequence[float]:
    """The built-in scorer: the generator's own log-likelihood of each image's tokens, in nats."""
    if step.log_likelihood is None:
        raise InputError("the stream has no log-likelihood; set scored=True")
    scores: list[float] = step.log_likelihood.tolist()
    return scores


class KeepBest:
    """At a given k, stop all images but the best of each class; ties go to the earlier image.

    Args:
        class_labels: of the images.
        num_tokens: the k at which images are compared.
        keep: number of images of each class that continue.
        scorer: a step -> a number for each image, higher is better.

    Raises:
        InputError: scores of another number than there are images.
    """

    def __init__(self, class_labels: Sequence[int], num_tokens: int, keep: int, scorer: Scorer):
        self._labels, self._num_tokens, self._keep, self._scorer = class_labels, num_tokens, keep, scorer

    def __call__(self, step: Step) -> Sequence[int]:
        """The images that are not kept, at the given k."""
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
