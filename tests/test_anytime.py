"""Stopping at any k: images that stop separately, deadlines, stable pictures, prefixes, forks, guidance schedules."""

import gc
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import sampling as oracle

from common.config import InputError
from generator.config import SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import Step, stream
from generator.model import ChannelGPT
from generator.stopping import Deadline, WhenStable

C, CODES = 16, 64
LABELS, SEEDS = [0, 4, 2, 5, 2, 1, 3], [10, 11, 0, 2**62, 11, 5, 6]  # 5 is the null label
PLAIN = SamplingConfig()
SAMPLINGS = [
    PLAIN,
    SamplingConfig(temperature=0, cfg_scale=3),
    SamplingConfig(temperature=1.3, top_k=30, top_p=0.95),
    SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, autoguidance=1.4, cfg_scale=1.7),
    SamplingConfig(cfg_scale=2.5, cfg_schedule="linear"),
    SamplingConfig(cfg_scale=0.5, cfg_schedule="cosine", top_k=30),
    SamplingConfig(cfg_scale=3, cfg_schedule="interval", cfg_start=0.2, cfg_end=0.6),
]
MANY = settings(max_examples=40, deadline=None, derandomize=True)
Steps = list[tuple[int, int, bool]]


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(request: pytest.FixtureRequest, tiny_decoder: CachedDecoder) -> Engine:
    return Engine(tiny_decoder, compile=request.param == "compiled")


@pytest.fixture
def steps(engine: Engine, watch_steps: Callable[[Engine], Steps]) -> Steps:
    """(rows, position, whether odds are computed) of every step from now on."""
    return watch_steps(engine)


@pytest.fixture(scope="module")
def uncached(tiny_generator: ChannelGPT) -> Callable[[SamplingConfig], list[list[int]]]:
    """What the plain sampler without a cache draws of `LABELS` and `SEEDS`."""

    @cache
    def drawn(sampling: SamplingConfig) -> list[list[int]]:
        images = zip(LABELS, SEEDS, strict=True)
        return [oracle.draw_one(tiny_generator, label, seed, C, **vars(sampling)) for label, seed in images]

    return drawn


def whole(engine: Engine, sampling: SamplingConfig, images: Sequence[int] = range(7)) -> list[list[int]]:
    *_, last = stream(engine, [LABELS[i] for i in images], [SEEDS[i] for i in images], C, sampling)
    rows: list[list[int]] = last.tokens.tolist()
    return rows


def assert_begins(step: Step, expected: list[list[int]]) -> None:
    """Every image has the first lengths[i] tokens of its uninterrupted run, then zeros."""
    for row, length, uninterrupted in zip(step.tokens.tolist(), step.lengths, expected, strict=True):
        assert row == uninterrupted[:length] + [0] * (len(row) - length)


# ------------------------------------------------------------------------------------- cached = uncached (law 5)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_stream_equals_the_uncached_sampler(
    uncached: Callable[[SamplingConfig], list[list[int]]], engine: Engine, sampling: SamplingConfig
) -> None:
    assert whole(engine, sampling) == uncached(sampling)


def test_rows_without_class_are_dropped_after_the_last_guided_position(engine: Engine, steps: Steps) -> None:
    sampling = SamplingConfig(cfg_scale=2, cfg_schedule="interval", cfg_start=0.25, cfg_end=0.5)
    # a k inside the interval only changes the end; one below it never needs rows without class
    for k, rows in ((C, [8] * 8 + [4] * 8), (6, [8] * 6), (4, [4] * 4)):
        steps.clear()
        list(stream(engine, LABELS[:4], SEEDS[:4], k, sampling))
        assert [found for found, _, _ in steps] == rows


# ------------------------------------------------------------------------------------- images stop separately


@MANY
@given(data=st.data(), sampling=st.sampled_from(SAMPLINGS), count=st.integers(1, 7))
def test_images_stop_separately_and_do_not_change_each_other(
    engine: Engine, data: st.DataObject, sampling: SamplingConfig, count: int
) -> None:
    """Laws 3, 4 and 6: any images in any order, with any ends, stops, prefixes and guidance, begin as in one run."""
    order = data.draw(st.permutations(range(7)), label="order")[:count]
    all_images = whole(engine, sampling)
    expected = [all_images[image] for image in order]
    ends = data.draw(st.lists(st.integers(2, C), min_size=count, max_size=count), label="num_tokens")
    begun = data.draw(st.none() | st.lists(st.integers(1, C - 1), min_size=count, max_size=count), label="prefix")
    stops = data.draw(st.dictionaries(st.integers(1, C), st.sets(st.integers(0, count - 1))), label="stops")
    prefix, lengths = None, None
    if begun is not None:
        lengths = [min(length, end - 1) for length, end in zip(begun, ends, strict=True)]
        prefix = torch.tensor(expected)
    labels, seeds = [LABELS[image] for image in order], [SEEDS[image] for image in order]
    running = stream(engine, labels, seeds, ends, sampling, prefix, lengths)
    reached = list(ends)
    stopped: set[int] = set()
    lengths = lengths or [0] * count
    first = min(lengths)
    for number, step in enumerate(running, start=first + 1):
        assert step.num_tokens == number
        assert step.lengths == tuple(max(begun, min(end, number)) for begun, end in zip(lengths, reached, strict=True))
        assert set(step.drawing) == {image for image in range(count) if number < reached[image]} - stopped
        assert_begins(step, expected)
        step.stop(stops.get(number, set()))
        stopped |= stops.get(number, set())
        for image in stopped:
            reached[image] = max(min(reached[image], number), lengths[image])
        if stopped | {image for image in range(count) if reached[image] <= number} == set(range(count)):
            assert next(running, None) is None
            break


def test_finished_images_leave_the_batch(engine: Engine, steps: Steps) -> None:
    list(stream(engine, LABELS, SEEDS, [3, 16, 16, 7, 7, 3, 3], PLAIN))
    sizes = [7] * 3 + [4] * 4 + [2] * 9
    assert [rows for rows, _, _ in steps] == [engine.slots(size) for size in sizes]


def test_keep_stops_all_other_images(engine: Engine, steps: Steps) -> None:
    expected = whole(engine, PLAIN)
    steps.clear()
    for step in stream(engine, LABELS, SEEDS, C, PLAIN):
        if step.num_tokens == 4:
            step.keep([5, 1])
    assert step.lengths == (4, 16, 4, 4, 4, 16, 4)
    assert_begins(step, expected)
    assert [rows for rows, _, _ in steps] == [engine.slots(7)] * 4 + [2] * 12


def test_a_step_does_not_change_later(engine: Engine) -> None:
    seen = []
    for step in stream(engine, LABELS, SEEDS, C, PLAIN, scored=True):
        seen.append((step, step.tokens.tolist(), step.log_likelihood.tolist()))
        step.stop([step.num_tokens % 7])
    for step, tokens, scores in seen:
        assert step.tokens.tolist() == tokens
        assert step.log_likelihood.tolist() == scores


@pytest.mark.parametrize("verb", ["stop", "keep"])
@pytest.mark.parametrize("image", [-1, 7])
def test_images_that_do_not_exist_are_refused(engine: Engine, verb: str, image: int) -> None:
    step = next(stream(engine, LABELS, SEEDS, C, PLAIN))
    with pytest.raises(InputError, match=str(image)):
        getattr(step, verb)([0, image])


# ------------------------------------------------------------------------------------- prefixes and likelihood


def test_a_shared_prefix_is_read_once_and_forked(engine: Engine, steps: Steps) -> None:
    prefix = torch.randint(0, CODES, (1, 5), generator=torch.Generator().manual_seed(0)).expand(6, -1)
    labels, seeds = [2, 2, 0, 2, 2, 0], [1, 2, 3, 4, 5, 6]
    sampling = SamplingConfig(cfg_scale=2)
    *_, last = stream(engine, labels, seeds, C, sampling, prefix)
    assert steps[:5] == [(4, p, False) for p in range(5)]  # two classes, each also without class
    assert steps[5:] == [(2 * engine.slots(6), p, True) for p in range(5, C)]
    assert torch.equal(last.tokens[:, :5], prefix)
    assert len({tuple(row) for row in last.tokens.tolist()}) == 6
    for image in range(6):
        *_, alone = stream(engine, [labels[image]], [seeds[image]], C, sampling, prefix[:1])
        assert alone.tokens[0].tolist() == last.tokens[image].tolist()


@pytest.mark.parametrize("sampling", [PLAIN, SAMPLINGS[3]], ids=["plain", "guided"])
def test_log_likelihood_is_that_of_the_conditional_model(
    tiny_generator: ChannelGPT, engine: Engine, sampling: SamplingConfig
) -> None:
    expected = whole(engine, sampling)
    for prefix in (None, torch.tensor(expected)[:, :6]):
        for step in stream(engine, LABELS, SEEDS, [9, *[C] * 6], sampling, prefix, scored=True):
            found = step.log_likelihood.tolist()
            for image, length in enumerate(step.lengths):
                wanted = oracle.log_likelihood(tiny_generator, LABELS[image], expected[image][:length])
                assert found[image] == pytest.approx(wanted, rel=1e-4)
    assert next(stream(engine, [0], [0], C, PLAIN)).log_likelihood is None


# ------------------------------------------------------------------------------------- rules


class FakeClock:
    """A clock that is set by the test."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "decode", "costs", "k"),
    [
        (1.0, 0.25, [0.125] * 16, 6),  # 6 steps end at 0.75, and the pictures are ready at exactly 1.0
        (1.0, 0.26, [0.125] * 16, 5),
        (1.0, 0.0, [0.125] * 16, 8),
        (100.0, 5.0, [0.125] * 16, 16),
        (0.01, 5.0, [0.125] * 16, 1),  # too short for anything: one token is drawn nevertheless
        (1.0, 0.0, [0.25, *[0.125] * 15], 6),  # a slow step is expected to occur again
    ],
)
def test_deadline_stops_before_the_token_that_would_be_late(
    tiny_engine: Engine, seconds: float, decode: float, costs: list[float], k: int
) -> None:
    clock = FakeClock()
    rule = Deadline(seconds, decode, torch.device("cpu"), clock)
    for step in stream(tiny_engine, LABELS, SEEDS, C, PLAIN):
        clock.now += costs[step.num_tokens - 1]
        step.stop(rule(step))
    assert step.num_tokens == k


@pytest.mark.parametrize(("channels", "stride"), [(C, 1), (64, 4)])
def test_stable_pictures_stop(engine: Engine, channels: int, stride: int) -> None:
    """Token j changes a picture by 64 >> j grey levels, except that of image 1, which is constant."""
    decoded = []

    def level(k: int) -> int:
        return sum(64 >> j for j in range(k))

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(tuple(tokens.shape))
        pictures = torch.full((len(tokens), 3, 2, 2), level(tokens.shape[1]), dtype=torch.uint8)
        pictures[tokens[:, 0] == marked] = 7
        return pictures

    expected = whole(engine, PLAIN)
    marked = expected[1][0]
    rule = WhenStable(1.5, decode, channels)
    for step in stream(engine, LABELS, SEEDS, C, PLAIN):
        step.stop(rule(step))
    checks = range(2 * stride, C + 1, stride)
    end = next(k for k in checks if level(k) - level(k - stride) < 1.5)
    assert step.lengths == tuple(2 * stride if expected[i][0] == marked else end for i in range(7))
    assert_begins(step, expected)
    assert decoded[0] == (7, stride)
    assert decoded[-1][0] < 7  # finished images are no longer decoded


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rules_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="deadline"):
        Deadline(value, 0, torch.device("cpu"))
    with pytest.raises(InputError, match="stop_when_stable"):
        WhenStable(value, lambda tokens: tokens, C)


# ------------------------------------------------------------------------------------- memory


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_memory_does_not_grow_with_the_number_of_images(tiny_engine: Engine) -> None:
    sampling = SamplingConfig(cfg_scale=2, cfg_schedule="interval", cfg_end=0.5)

    def batch(seed: int) -> None:
        for step in stream(tiny_engine, [0, 1, 2], [seed, seed, seed], [4, 8, 8], sampling):
            if seed % 3 == 0 and step.num_tokens == 6:
                break

    batch(0)
    before = tensors_alive()
    for seed in range(1, 201):
        batch(seed)
    assert tensors_alive() <= before + 5
