"""Reasons to stop a drawing before its last channel: a clock, the picture itself, and a better sketch.

A rule is called after every step and names the images to stop there; `generate.Step.stop` does the rest.
"""

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
        seconds: from now to the finished pictures.
        decode_seconds: what decoding all of them takes, measured.
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
        check_deadline(seconds)
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
    """Stop an image when further channels have stopped to change its picture.

    After every C/16 tokens the pictures are decoded, and each is compared with itself one such stride
    before: the mean absolute difference over its pixels and colours, in grey levels of 0..255. An image
    stops when that is below `epsilon`. The full picture then differs by one to two times that, as
    channels are ordered by what they bring.

    Args:
        epsilon: grey levels, above 0.
        decode: tokens to pictures.
        num_channels: C of the model; the stride does not depend on the number of tokens that was requested.

    Raises:
        InputError: an epsilon that is not above 0.
    """

    def __init__(self, epsilon: float, decode: Decode, num_channels: int):
        check_epsilon(epsilon)
        self._epsilon, self._decode = epsilon, decode
        self._stride = max(1, num_channels // 16)
        self._before: dict[int, Tensor] = {}

    def __call__(self, step: Step) -> Sequence[int]:
        """The images whose pictures are stable by now."""
        if step.num_tokens % self._stride or not step.drawing:
            return ()
        pictures = self._decode(step.tokens[list(step.drawing)]).short()
        before, self._before = self._before, dict(zip(step.drawing, pictures, strict=True))
        known = [image for image in step.drawing if image in before]
        if not known:
            return ()
        changes = torch.stack([(self._before[i] - before[i]).abs().float().mean() for i in known]).tolist()
        return [image for image, change in zip(known, changes, strict=True) if change < self._epsilon]


def check_deadline(seconds: float) -> None:
    """Refuse a deadline that is no time from now."""
    if not 0 < seconds < float("inf"):
        raise InputError(f"deadline is {seconds}; it must be a number of seconds above 0")


def check_epsilon(epsilon: float) -> None:
    """Refuse a threshold that nothing could be below."""
    if not 0 < epsilon < float("inf"):
        raise InputError(f"stop_when_stable is {epsilon}; it must be a number of grey levels above 0")


def waiter(device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        return lambda: torch.cuda.current_stream(device).synchronize()
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


def log_likelihood_scorer(step: Step) -> Sequence[float]:
    """The built-in scorer: the generator's own log-likelihood of each image's tokens, in nats."""
    if step.log_likelihood is None:
        raise InputError("the stream carries no log-likelihood; ask for it with scored=True")
    scores: list[float] = step.log_likelihood.tolist()
    return scores


def best_of_each_class(class_labels: Sequence[int], scores: Sequence[float], keep: int) -> list[int]:
    """Indices of the `keep` highest scores of each class, in their order; ties go to the earlier image."""
    ranked = sorted(range(len(scores)), key=lambda image: -scores[image])
    chosen: list[int] = []
    for label in dict.fromkeys(class_labels):
        chosen += [image for image in ranked if class_labels[image] == label][:keep]
    return sorted(chosen)


def keep_best(
    steps: Iterator[Step], class_labels: Sequence[int], sketch_tokens: int, keep: int, scorer: Scorer
) -> Iterator[Step]:
    """Steps of a stream of which, from sketch_tokens on, only the `keep` best images of each class continue.

    Raises:
        InputError: scores of another number than there are images.
    """
    for step in steps:
        if step.num_tokens == sketch_tokens:
            scores = list(scorer(step))
            if len(scores) != len(class_labels):
                raise InputError(f"the scorer gave {len(scores)} numbers for {len(class_labels)} images")
            step.keep(best_of_each_class(class_labels, scores, keep))
        yield step
