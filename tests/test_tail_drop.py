import pytest
import torch

from tokenizer.settings import TailDropConfig
from tokenizer.tail_drop import draw_num_tokens, drop_tail, prefix_mask

DRAWS = 40_000
POWER = {"uniform": 1.0, "low": 2.0, "high": 0.5}


def draw(batch_size, num_channels, seed=0, **config):
    config = TailDropConfig(**config)
    return draw_num_tokens(batch_size, num_channels, config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distribution", POWER)
@pytest.mark.parametrize("num_channels", [1, 2, 16])
def test_lengths_follow_the_distribution_and_reach_1_and_all_channels(distribution, num_channels):
    lengths = draw(DRAWS, num_channels, mask_probability=1.0, keep_distribution=distribution)
    assert lengths.dtype == torch.int64
    assert (lengths.min().item(), lengths.max().item()) == (1, num_channels)
    # k = 1 + floor(C f**p) is at most j where f is below (j/C)**(1/p)
    edges = torch.arange(num_channels + 1, dtype=torch.float64) / num_channels
    expected = DRAWS * (edges ** (1 / POWER[distribution])).diff()
    counts = torch.bincount(lengths, minlength=num_channels + 1)[1:]
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = num_channels - 1
    assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


def test_mask_probability_is_the_share_of_images_that_lose_a_tail():
    assert (draw(1000, 8, mask_probability=0.0) == 8).all()
    share = (draw(DRAWS, 1000, mask_probability=0.3) < 1000).double().mean().item()
    assert abs(share - 0.3 * 0.999) < 0.012


@pytest.mark.parametrize("mask_probability", [0.0, 0.5])
def test_a_draw_depends_on_the_seed_and_the_place_in_the_batch_alone(mask_probability):
    config = {"mask_probability": mask_probability, "keep_distribution": "low"}
    assert torch.equal(draw(5, 64, **config), draw(9, 64, **config)[:5])
    assert torch.equal(draw(5, 64, **config), draw(5, 64, seed=1, **config)) == (mask_probability == 0)


@pytest.mark.parametrize("filler", [1.0, float("inf"), float("nan")])
def test_dropped_channels_are_exactly_zero_and_get_no_gradient(filler):
    keep = prefix_mask(torch.tensor([1, 3]), 4)
    assert keep.tolist() == [[True, False, False, False], [True, True, True, False]]
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = torch.where(keep[:, :, None, None], latents, filler).requires_grad_()
    out = drop_tail(latents, keep)
    assert torch.equal(out[keep], latents[keep])
    assert (out[~keep] == 0).all()
    (out * 3).sum().backward()
    assert (latents.grad[~keep] == 0).all()
    assert (latents.grad[keep] == 3).all()
