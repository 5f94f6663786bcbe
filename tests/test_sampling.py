"""Guidance, filters and the inverse of the cumulative distribution: pure functions on logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import sampling as oracle

from common.config import InputError
from common.randomness import uniforms
from generator.config import SamplingConfig
from generator.sampling import draw, filter_logits, guidance_scales, invert_cdf

JUST_BELOW_ONE = math.nextafter(1.0, 0.0)
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def random_logits(seed: int, rows: int = 3, size: int = 40, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (rows, size)))


@FEW
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)
def test_filters_are_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(seed)
    found = filter_logits(logits.clone(), temperature, top_k, top_p)
    expected = oracle.filtered(logits, temperature, top_k, top_p)
    assert torch.equal(found > -math.inf, expected > -math.inf)
    # a constant added to a row changes no odds
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), rtol=1e-12, atol=1e-12)


def test_filters_remove_tokens() -> None:
    logits = random_logits(0)
    assert (filter_logits(logits, 1.0, 0, 1.0) > -math.inf).all()
    assert (filter_logits(logits, 1.0, 7, 1.0) > -math.inf).sum(-1).tolist() == [7, 7, 7]
    assert (filter_logits(logits, 1.0, 0, 1e-9) > -math.inf).sum(-1).tolist() == [1, 1, 1]
    # odds 4:2:1:1, exact in binary: half the mass is reached by one token, three quarters by two
    logits = torch.tensor([[1.0, 4, 1, 2]]).double().log()
    kept = {p: (filter_logits(logits, 1.0, 0, p) > -math.inf)[0].tolist() for p in (0.5, 0.51, 0.75, 0.76)}
    assert kept[0.5] == [False, True, False, False]
    assert kept[0.51] == kept[0.75] == [False, True, False, True]
    assert kept[0.76] == [True, True, False, True]


def test_top_k_keeps_ties_and_top_p_the_fewest() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    assert (filter_logits(logits, 1.0, 2, 1.0) > -math.inf).tolist() == [[True, True, True, True, False]]
    even = torch.zeros(1, 8, dtype=torch.float64)
    assert int((filter_logits(even, 1.0, 0, 0.5) > -math.inf).sum()) == 4


@FEW
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.1, 30.0),
    top_k=st.integers(1, 40),
    uniform=st.one_of(st.sampled_from([0.0, 0.25, 0.5]), st.floats(0.0, 1 - 1e-9)),
)
def test_invert_cdf_is_the_plain_loop(seed: int, scale: float, top_k: int, uniform: float) -> None:
    logits = filter_logits(random_logits(seed, scale=scale).float(), 1.0, top_k, 1.0)
    found = invert_cdf(logits, torch.full((3,), uniform, dtype=torch.float64)).tolist()
    assert found == [oracle.inverse_cdf(row, uniform) for row in logits.double().tolist()]


def test_just_below_one_is_the_last_token_with_mass() -> None:
    logits = filter_logits(random_logits(3, rows=200, scale=1.0).float(), 1.0, 5, 1.0)
    last = [max(i for i, logit in enumerate(row) if logit > -math.inf) for row in logits.tolist()]
    assert invert_cdf(logits, torch.full((200,), JUST_BELOW_ONE, dtype=torch.float64)).tolist() == last
    # a device without float64 rounds that number up to 1
    assert invert_cdf(logits, torch.ones(200)).tolist() == last


def test_invert_cdf_at_the_thresholds() -> None:
    even = torch.zeros(1, 4)
    numbers = torch.tensor([0.0, math.nextafter(0.25, 0), 0.25, 0.5, 0.75, JUST_BELOW_ONE], dtype=torch.float64)
    assert invert_cdf(even.expand(6, 4), numbers).tolist() == [0, 0, 1, 2, 3, 3]
    # a token of mass 1e-12 is reached by a float64 sum; float32 would have lost it
    tail = torch.tensor([[0.0, math.log(1e-12)]])
    assert invert_cdf(tail, torch.tensor([1 - 5e-13], dtype=torch.float64)).tolist() == [1]
    assert invert_cdf(tail, torch.tensor([1 - 2e-12], dtype=torch.float64)).tolist() == [0]


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(), SamplingConfig(temperature=0.7, top_k=12, top_p=0.9)],
    ids=["plain", "filtered"],
)
def test_drawn_frequencies_follow_the_odds(config: SamplingConfig) -> None:
    count = 40_000
    logits = random_logits(4, rows=1, size=20, scale=1.0).float()
    numbers = torch.from_numpy(np.random.default_rng(7).random(count))
    found = torch.bincount(draw(logits.expand(count, 20), numbers, config), minlength=20).double()
    row = oracle.filtered(logits.double(), config.temperature, config.top_k, config.top_p)[0].tolist()
    expected = count * torch.tensor(oracle.probabilities(row), dtype=torch.float64)
    possible = expected > 0
    assert found[~possible].sum() == 0
    statistic = float(((found - expected)[possible] ** 2 / expected[possible]).sum())
    # the 0.9999 quantile of chi-square with 19 degrees of freedom is 50.8
    assert statistic < 50.8


@pytest.mark.parametrize("temperature", [0, 1e-3, 1e-20, 1e-38, 1e-45, 1e-300])
def test_temperatures_near_zero_take_the_most_likely(temperature: float) -> None:
    """Also where the quotient overflows float32."""
    logits = random_logits(5, rows=50).float()
    numbers = torch.from_numpy(np.random.default_rng(1).random(50))
    for filters in ({}, {"top_k": 3, "top_p": 0.2}):
        found = draw(logits, numbers, SamplingConfig(temperature=temperature, **filters))
        assert found.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "interval"])
def test_guidance_scales_are_their_formulas(schedule: str) -> None:
    shares = {"cfg_start": 0.25, "cfg_end": 0.5} if schedule == "interval" else {}
    found = guidance_scales(SamplingConfig(cfg_scale=3.0, cfg_schedule=schedule, **shares), 256)
    expected = [oracle.scale_at(j / 256, 3.0, schedule, 0.25, 0.5) for j in range(256)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_uniforms_are_a_function_of_seed_and_position() -> None:
    whole = uniforms([11, 5, 2**63 - 1, 0], 16)
    assert whole.shape == (4, 16)
    assert whole.dtype == torch.float64
    assert ((whole >= 0) & (whole < 1)).all()
    assert len(set(whole.flatten().tolist())) == 64
    for k in (1, 7, 16):
        assert torch.equal(uniforms([5], k)[0], whole[1, :k])
        assert torch.equal(uniforms([0, 5, 5], k)[[0, 2]], whole[[3, 1], :k])
    assert [uniforms([5], 16)[0, j].item() for j in range(16)] == [oracle.uniform_at(5, j) for j in range(16)]


def test_uniforms_never_change() -> None:
    """A seed must give the same picture in later versions."""
    expected = {
        0: [0.011546754286331562, 0.24154919656271812, 0.11142585551493822],
        12345: [0.6463801884227345, 0.7742675977164786, 0.7864362639285933],
    }
    assert {seed: uniforms([seed], 3)[0].tolist() for seed in expected} == expected


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match="seed"):
        uniforms([0, seed], 4)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        *(({"temperature": value}, "temperature") for value in (-0.1, -1e-9, math.nan, math.inf, -math.inf)),
        *(({"top_k": value}, "top_k") for value in (-1, -100)),
        *(({"top_p": value}, "top_p") for value in (0.0, -0.5, 1.0001, math.nan, math.inf)),
        *(({"cfg_scale": value}, "cfg_scale") for value in (-0.1, math.nan, math.inf, -math.inf)),
        ({"cfg_schedule": "square"}, "square"),
        ({"cfg_schedule": "interval", "cfg_start": 0.5, "cfg_end": 0.5}, "cfg_start"),
        ({"cfg_schedule": "interval", "cfg_start": -0.1}, "cfg_start"),
        ({"cfg_schedule": "interval", "cfg_end": 1.1}, "cfg_end"),
        ({"cfg_schedule": "interval", "cfg_end": math.nan}, "cfg_end"),
        ({"cfg_schedule": "linear", "cfg_end": 0.5}, "interval"),
    ],
)
def test_bad_sampling_settings_are_refused(settings_: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        SamplingConfig(**settings_)
    assert "\n" not in str(caught.value)
    if len(settings_) == 1:
        assert str(*settings_.values()) in str(caught.value)
