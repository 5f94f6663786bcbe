import pytest
import torch

from common.errors import InputError
from tokenizer.settings import TailDropConfig
from tokenizer.tail_drop import draw_num_tokens, drop_tail, prefix_mask

DRAWS = 40_000
POWER = {"uniform": 1.0, "low": 2.0, "high": 0.5}


def draw(batch_size, num_channels, seed=0, **config):
    config = TailDropConfig(**config)
    return draw_num_tokens(batch_size, num_channels, config, torch.Generator().manual_seed(seed))


def chances(num_channels, distribution):
    """P(k) for k = 1..C: k = 1 + floor(C f**p) is at most j where f is below (j/C)**(1/p)."""
    edges = torch.arange(num_channels + 1, dtype=torch.float64) / num_channels
    return (edges ** (1 / POWER[distribution])).diff()


@pytest.mark.parametrize("distribution", POWER)
@pytest.mark.parametrize("num_channels", [1, 2, 16])
def test_lengths_follow_the_distribution_and_reach_1_and_all_channels(distribution, num_channels):
    lengths = draw(DRAWS, num_channels, mask_probability=1.0, keep_distribution=distribution)
    assert lengths.dtype == torch.int64
    assert (lengths.min().item(), lengths.max().item()) == (1, num_channels)
    expected = DRAWS * chances(num_channels, distribution)
    counts = torch.bincount(lengths, minlength=num_channels + 1)[1:]
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = num_channels - 1
    assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


def test_mask_probability_is_the_share_of_images_that_lose_a_tail():
    assert (draw(1000, 8, mask_probability=0.0) == 8).all()
    share = (draw(DRAWS, 1000, mask_probability=0.3) < 1000).double().mean().item()
    assert abs(share - 0.3 * 0.999) < 0.012
    half = draw(DRAWS, 4, mask_probability=0.5)
    assert abs((half == 4).double().mean().item() - 0.625) < 0.012


@pytest.mark.parametrize("distribution", POWER)
@pytest.mark.parametrize("mask_probability", [0.0, 0.5, 1.0])
def test_an_images_draw_does_not_depend_on_the_batch_size(distribution, mask_probability):
    config = {"mask_probability": mask_probability, "keep_distribution": distribution}
    small, large = draw(5, 64, **config), draw(9, 64, **config)
    assert torch.equal(small, large[:5])


def test_the_generators_state_alone_decides():
    assert torch.equal(draw(20, 64), draw(20, 64))
    assert not torch.equal(draw(20, 64), draw(20, 64, seed=1))
    ours, plain = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    draw_num_tokens(3, 64, TailDropConfig(mask_probability=0.0), ours)
    torch.rand(3, 2, generator=plain, dtype=torch.float64)
    assert torch.equal(ours.get_state(), plain.get_state())


def test_prefix_mask_is_true_below_the_length():
    assert prefix_mask(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("filler", [1.0, float("inf"), float("-inf"), float("nan")])
def test_dropped_channels_are_exactly_zero_and_get_no_gradient(filler):
    keep = prefix_mask(torch.tensor([1, 3]), 4)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = torch.where(keep[:, :, None, None], latents, filler).requires_grad_()
    out = drop_tail(latents, keep)
    assert torch.equal(out[keep], latents[keep])
    assert (out[~keep] == 0).all()
    assert out.dtype == latents.dtype
    (out * 3).sum().backward()
    assert (latents.grad[~keep] == 0).all()
    assert (latents.grad[keep] == 3).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("mask_probability", -0.1), ("mask_probability", 1.1), ("mask_probability", float("nan")),
     ("keep_distribution", "middle")],
)  # fmt: skip
def test_bad_settings_are_named(field, value):
    with pytest.raises(InputError, match=field):
        TailDropConfig(**{field: value})
