"""Stopping at any k, in all its ways: rows that stop apart, clocks, stable pictures, prefixes, forks, schedules."""

import gc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import sampling as oracle
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import TokenLayout
from generator.decode import CachedDecoder
from generator.engine import Batch, Engine
from generator.generate import Step, stream
from generator.sampling import SamplingConfig
from generator.stopping import Deadline, WhenStable

C, CODES = 16, 64
LABELS, SEEDS = [0, 4, 2, 5, 2, 1, 3], [10, 11, 0, 2**62, 11, 5, 6]  # 5 is the null label
PLAIN = SamplingConfig()
SAMPLINGS = [
    PLAIN,
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, cfg_scale=1.7),
    SamplingConfig(cfg_scale=2.5, cfg_schedule="linear"),
    SamplingConfig(cfg_scale=0.5, cfg_schedule="cosine", top_k=30),
    SamplingConfig(cfg_scale=3, cfg_schedule="interval", cfg_start=0.2, cfg_end=0.6),
]
MANY = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(request: pytest.FixtureRequest, tiny_decoder: CachedDecoder) -> Engine:
    return Engine(tiny_decoder, compile=request.param == "compiled")


@pytest.fixture
def fed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(rows, position, whether with the head) of every forward from now on."""
    calls: list[tuple[int, int, bool]] = []
    real = engine._forward

    def forward(batch: Batch, length: int, *, with_logits: bool) -> torch.Tensor:
        calls.append((batch.cache.entries.shape[2], int(batch.position), with_logits))
        return real(batch, length, with_logits=with_logits)

    monkeypatch.setattr(engine, "_forward", forward)
    return calls


def whole(engine: Engine, sampling: SamplingConfig, images: Sequence[int] = range(7)) -> list[list[int]]:
    *_, last = stream(engine, [LABELS[i] for i in images], [SEEDS[i] for i in images], C, sampling)
    rows: list[list[int]] = last.tokens.tolist()
    return rows


def assert_begins(step: Step, expected: list[list[int]]) -> None:
    """Every image holds the first lengths[i] tokens of its unbroken run, and zeros."""
    for row, length, unbroken in zip(step.tokens.tolist(), step.lengths, expected, strict=True):
        assert row == unbroken[:length] + [0] * (len(row) - length)


# ------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_every_schedule_equals_the_uncached_sampler(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, engine: Engine, sampling: SamplingConfig
) -> None:
    expected = [
        oracle.draw_one(tiny_generator, tiny_layout, label, seed, C, **vars(sampling))
        for label, seed in zip(LABELS, SEEDS, strict=True)
    ]
    assert whole(engine, sampling) == expected


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "interval"])
def test_scales_are_their_formulas(schedule: str) -> None:
    config = SamplingConfig(cfg_scale=3.0, cfg_schedule=schedule)
    expected = [oracle.scale_at(j / 256, 3.0, schedule, 0.0, 1.0) for j in range(256)]
    np.testing.assert_allclose(config.scales(256).numpy(), expected, rtol=1e-6)


def test_the_unconditional_half_is_dropped_when_it_has_had_its_say(
    engine: Engine, fed: list[tuple[int, int, bool]]
) -> None:
    sampling = SamplingConfig(cfg_scale=2, cfg_schedule="interval", cfg_start=0.25, cfg_end=0.5)
    list(stream(engine, LABELS[:4], SEEDS[:4], C, sampling))
    assert [rows for rows, _, _ in fed] == [8] * 8 + [4] * 8
    fed.clear()
    # a k inside the interval changes nothing but the end
    list(stream(engine, LABELS[:4], SEEDS[:4], 6, sampling))
    assert [rows for rows, _, _ in fed] == [8] * 6
    fed.clear()
    # one that ends before guidance begins never needs the other half
    list(stream(engine, LABELS[:4], SEEDS[:4], 4, sampling))
    assert [rows for rows, _, _ in fed] == [4] * 4


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"cfg_schedule": "square"}, "square"),
        ({"cfg_schedule": "interval", "cfg_start": 0.5, "cfg_end": 0.5}, "cfg_start"),
        ({"cfg_schedule": "interval", "cfg_start": -0.1}, "cfg_start"),
        ({"cfg_schedule": "interval", "cfg_end": 1.1}, "cfg_end"),
        ({"cfg_schedule": "interval", "cfg_end": float("nan")}, "cfg_end"),
        ({"cfg_schedule": "linear", "cfg_end": 0.5}, "interval"),
    ],
)
def test_bad_schedules_are_refused(settings_: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        SamplingConfig(cfg_scale=2, **settings_)


# ------------------------------------------------------------------------------------- rows stop apart


@MANY
@given(data=st.data(), sampling=st.sampled_from(SAMPLINGS), count=st.integers(1, 7))
def test_rows_stop_apart_and_the_others_do_not_notice(
    engine: Engine, data: st.DataObject, sampling: SamplingConfig, count: int
) -> None:
    """Laws 3, 4 and 6 for any ends, stops, prefixes and guidance: every image is the start of its unbroken run."""
    expected = whole(engine, sampling)[:count]
    ends = data.draw(st.lists(st.integers(2, C), min_size=count, max_size=count), label="num_tokens")
    begun = data.draw(st.none() | st.lists(st.integers(1, C - 1), min_size=count, max_size=count), label="prefix")
    stops = data.draw(st.dictionaries(st.integers(1, C), st.sets(st.integers(0, count - 1))), label="stops")
    prefix, lengths = None, None
    if begun is not None:
        lengths = [min(length, end - 1) for length, end in zip(begun, ends, strict=True)]
        prefix = torch.tensor(expected)
    steps = stream(engine, LABELS[:count], SEEDS[:count], ends, sampling, prefix, lengths)
    reached = list(ends)
    stopped: set[int] = set()
    lengths = lengths or [0] * count
    first = min(lengths)
    for number, step in enumerate(steps, start=first + 1):
        assert step.num_tokens == number
        assert step.lengths == tuple(max(begun, min(end, number)) for begun, end in zip(lengths, reached, strict=True))
        assert set(step.drawing) == {image for image in range(count) if number < reached[image]} - stopped
        assert_begins(step, expected)
        step.stop(stops.get(number, set()))
        stopped |= stops.get(number, set())
        for image in stopped:
            reached[image] = max(min(reached[image], number), lengths[image])
        if stopped | {image for image in range(count) if reached[image] <= number} == set(range(count)):
            assert next(steps, None) is None
            break


def test_finished_rows_leave_the_batch(engine: Engine, fed: list[tuple[int, int, bool]]) -> None:
    list(stream(engine, LABELS, SEEDS, [3, 16, 16, 7, 7, 3, 3], PLAIN))
    sizes = [7] * 3 + [4] * 4 + [2] * 9
    assert [rows for rows, _, _ in fed] == [engine.slots(size) for size in sizes]


def test_keep_is_to_stop_all_others(engine: Engine, fed: list[tuple[int, int, bool]]) -> None:
    expected = whole(engine, PLAIN)
    fed.clear()
    for step in stream(engine, LABELS, SEEDS, C, PLAIN):
        if step.num_tokens == 4:
            step.keep([5, 1])
    assert step.lengths == (4, 16, 4, 4, 4, 16, 4)
    assert_begins(step, expected)
    assert [rows for rows, _, _ in fed] == [engine.slots(7)] * 4 + [2] * 12


def test_a_step_keeps_showing_what_it_showed(engine: Engine) -> None:
    steps = []
    for step in stream(engine, LABELS, SEEDS, C, PLAIN, scored=True):
        steps.append((step, step.tokens.tolist(), step.log_likelihood.tolist()))
        step.stop([step.num_tokens % 7])
    for step, tokens, scores in steps:
        assert step.tokens.tolist() == tokens
        assert step.log_likelihood.tolist() == scores


@pytest.mark.parametrize("verb", ["stop", "keep"])
@pytest.mark.parametrize("image", [-1, 7])
def test_stopping_what_is_not_there_is_refused(engine: Engine, verb: str, image: int) -> None:
    step = next(stream(engine, LABELS, SEEDS, C, PLAIN))
    with pytest.raises(InputError, match=str(image)):
        getattr(step, verb)([0, image])


# ------------------------------------------------------------------------------------- prefixes and forks


def test_a_shared_prefix_is_read_once_and_forked(engine: Engine, fed: list[tuple[int, int, bool]]) -> None:
    prefix = torch.randint(0, CODES, (1, 5), generator=torch.Generator().manual_seed(0)).expand(6, -1)
    labels, seeds = [2, 2, 0, 2, 2, 0], [1, 2, 3, 4, 5, 6]
    sampling = SamplingConfig(cfg_scale=2)
    *_, last = stream(engine, labels, seeds, C, sampling, prefix)
    assert fed[:5] == [(4, p, False) for p in range(5)]  # two classes, each with its unconditional half
    assert fed[5:] == [(2 * engine.slots(6), p, True) for p in range(5, C)]
    assert len({tuple(row) for row in last.tokens.tolist()}) == 6
    for image in range(6):
        *_, alone = stream(engine, [labels[image]], [seeds[image]], C, sampling, prefix[:1])
        assert alone.tokens[0].tolist() == last.tokens[image].tolist()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_tokens": [4]}, "num_tokens"),
        ({"num_tokens": [4, 0]}, "num_tokens"),
        ({"num_tokens": [4, 17]}, "17"),
        ({"prefix": torch.zeros(2, 3, dtype=torch.long), "prefix_lengths": [3]}, "prefix"),
        ({"prefix": torch.zeros(2, 3, dtype=torch.long), "prefix_lengths": [3, 4]}, "prefix"),
        ({"prefix": torch.zeros(2, 3, dtype=torch.long), "prefix_lengths": [0, 3]}, "prefix"),
        ({"prefix": torch.zeros(2, 5, dtype=torch.long), "num_tokens": [5, 6]}, "prefix"),
    ],
)
def test_bad_lengths_are_refused_at_the_call(engine: Engine, change: dict[str, object], named: str) -> None:
    arguments = {"class_labels": [0, 1], "seeds": [0, 1], "num_tokens": C, "sampling": PLAIN} | change
    with pytest.raises(InputError, match=named):
        stream(engine, **arguments)


# ------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("sampling", [PLAIN, SAMPLINGS[2]], ids=["plain", "guided"])
def test_log_likelihood_is_that_of_the_conditional_model(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, engine: Engine, sampling: SamplingConfig
) -> None:
    expected = whole(engine, sampling)
    for prefix in (None, torch.tensor(expected)[:, :6]):
        for step in stream(engine, LABELS, SEEDS, [9, *[C] * 6], sampling, prefix, scored=True):
            found = step.log_likelihood.tolist()
            for image, length in enumerate(step.lengths):
                wanted = oracle.log_likelihood(tiny_generator, tiny_layout, LABELS[image], expected[image][:length])
                assert found[image] == pytest.approx(wanted, rel=1e-4)
    assert next(stream(engine, [0], [0], C, PLAIN)).log_likelihood is None


# ------------------------------------------------------------------------------------- rules


class FakeClock:
    """A clock that goes on by what `costs` says each time a step is over."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "decode", "costs", "k"),
    [
        (1.0, 0.25, [0.125] * 16, 6),  # 6 steps end at 0.75, and the pictures are ready at 1.0 sharp
        (1.0, 0.26, [0.125] * 16, 5),
        (1.0, 0.0, [0.125] * 16, 8),
        (100.0, 5.0, [0.125] * 16, 16),
        (0.01, 5.0, [0.125] * 16, 1),  # too short for anything: one token is drawn all the same
        (1.0, 0.0, [0.25, *[0.125] * 15], 6),  # a slow step is expected to come again
    ],
)
def test_deadline_stops_where_one_more_token_would_be_late(
    engine: Engine, seconds: float, decode: float, costs: list[float], k: int
) -> None:
    clock = FakeClock()
    rule = Deadline(seconds, decode, lambda: None, clock)
    for step in stream(engine, LABELS, SEEDS, C, PLAIN):
        clock.now += costs[step.num_tokens - 1]
        step.stop(rule(step))
    assert step.num_tokens == k


@pytest.mark.parametrize(("channels", "stride"), [(C, 1), (64, 4)])
def test_stable_pictures_stop(engine: Engine, channels: int, stride: int) -> None:
    """Token j changes a picture by 64 >> j grey levels, but image 1 by nothing at all."""
    asked = []

    def level(k: int) -> int:
        return sum(64 >> j for j in range(k))

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(tokens.shape))
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
    assert asked[0] == (7, stride)
    assert asked[-1][0] < 7  # finished images are not decoded any more


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rules_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="deadline"):
        Deadline(value, 0, lambda: None)
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
