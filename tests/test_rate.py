"""The rate term of the tokenizer's training, and noise on its bits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.randomness import Stream
from tokenizer.bsq import pack_bits, signs_to_codes
from tokenizer.rate import RateTerm, bit_flips, rate_figures, rate_weights
from tokenizer.settings import RateConfig
from tokenizer.tokenizer import ChannelTokenizer
from training.schedule import Part

B, C, BITS, CLASSES = 4, 5, 3, 2
PART = Part(seed=3, step=9, rows=range(B), batch_size=B)
LABELS = torch.tensor([0, 1, 1, 0])
KEEP = torch.arange(C) < torch.tensor([1, 3, C, 2])[:, None]


def term(**settings: Any) -> RateTerm:
    """With a prior of random weights."""
    found = RateTerm(RateConfig(**{"rate_warmup_steps": 0, "prior_label_dropout": 0} | settings), C, BITS, CLASSES)
    rng = torch.Generator().manual_seed(0)
    for parameter in found.prior.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    return found


def random_vectors() -> Tensor:
    vectors = torch.randn(B, C, BITS, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(vectors, dim=-1).requires_grad_()


def test_the_rate_is_the_weighted_nats_of_kept_channels_with_gradients_for_the_encoder_only() -> None:
    rate, vectors = term(rate_weight=0.1, late_rate_weight=0.3), random_vectors()
    terms, _ = rate.losses(vectors, KEEP, LABELS, PART)
    with torch.no_grad():
        nats = rate.prior(vectors.sign(), LABELS)
    weights = [0.1, 0.15, 0.2, 0.25, 0.3]
    kept = [weights[c] * float(nats[i, c]) for i in range(B) for c in range(C) if KEEP[i, c]]
    assert terms["rate"].item() == pytest.approx(math.fsum(kept) / (B * C), rel=1e-5)
    assert float(terms["nats_per_token"]) == pytest.approx(float(nats.mean()), rel=1e-5)
    assert torch.equal(rate.nats(pack_bits(signs_to_codes(vectors)), LABELS), nats)
    terms["rate"].backward()
    assert vectors.grad is not None
    assert all(parameter.grad is None for parameter in rate.prior.parameters())
    last = int(KEEP.sum(1)[0])
    assert (vectors.grad[0, last:] == 0).all()  # a dropped channel costs nothing
    assert (vectors.grad[0, :last] != 0).all()


def test_the_prior_s_loss_is_its_nats_with_a_penalty_and_has_gradients_for_the_prior_only() -> None:
    rate, vectors = term(rate_weight=0.1, prior_l2_weight=0.01), random_vectors()
    terms, prior_loss = rate.losses(vectors, KEEP, LABELS, PART)
    loss = prior_loss(rate.prior)["loss"]
    squares = float(rate.prior.weight.detach().square().sum() + rate.prior.class_bias.detach().square().sum())
    assert float(loss.detach() - terms["nats_per_token"]) == pytest.approx(0.01 * squares, rel=1e-4)
    loss.backward()
    assert vectors.grad is None
    assert all(parameter.grad is not None for parameter in rate.prior.parameters())


def test_a_dropped_label_becomes_the_null_label() -> None:
    rate, vectors = term(rate_weight=0.1, prior_label_dropout=0.5), random_vectors()
    part = Part(seed=0, step=1, rows=range(B), batch_size=B)
    terms, _ = rate.losses(vectors, KEEP, LABELS, part)
    dropped = part.drops(0.5, Stream.PRIOR_LABELS)
    assert 0 < dropped.sum() < B
    with torch.no_grad():
        nats = rate.prior(vectors.sign(), torch.where(dropped, CLASSES, LABELS))
    assert float(terms["nats_per_token"]) == pytest.approx(float(nats.mean()), rel=1e-5)


def test_the_rows_dropped_do_not_depend_on_the_micro_batch() -> None:
    whole = Part(seed=0, step=1, rows=range(5000), batch_size=5000).drops(0.3)
    # five standard deviations of a share of 5,000 draws are 0.032
    assert float(whole.float().mean()) == pytest.approx(0.3, abs=0.032)
    assert torch.equal(Part(seed=0, step=1, rows=range(1, 5000, 2), batch_size=5000).drops(0.3), whole[1::2])


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (4, 0.5), (9, 1), (500, 1)])
def test_weights_rise_over_the_warm_up_and_along_the_channels(step: int, share: float) -> None:
    rising = RateConfig(rate_weight=0.02, late_rate_weight=0.1, rate_warmup_steps=10)
    assert rate_weights(rising, step, 3).tolist() == pytest.approx([share * 0.02, share * 0.06, share * 0.1])
    constant = RateConfig(rate_weight=0.2, rate_warmup_steps=0)
    assert rate_weights(constant, step, 3).tolist() == pytest.approx([0.2] * 3)


def test_figures_are_means_over_ranges_of_positions() -> None:
    nats = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    found = {name: float(value) for name, value in rate_figures(nats).items()}
    names = {
        "nats_per_token": (0, 20),
        "nats_1": (0, 1),
        "nats_2_4": (1, 4),
        "nats_5_16": (4, 16),
        "nats_17_20": (16, 20),
    }
    expected = {name: nats.numpy()[:, start:end].mean() for name, (start, end) in names.items()}
    assert found == pytest.approx(expected | {"bits_per_image": 20 * expected["nats_per_token"] / math.log(2)})


def test_flips_are_more_frequent_in_later_channels_in_any_micro_batch() -> None:
    batch, channels, bits = 2000, 4, 5
    whole = Part(seed=0, step=1, rows=range(batch), batch_size=batch)
    flips = bit_flips(channels, bits, 0.4, whole, torch.device("cpu"))
    assert flips.shape == (batch, channels, bits)
    assert set(flips.unique().tolist()) == {-1.0, 1.0}
    # five standard deviations of a share of 10,000 draws are 0.025
    assert (flips < 0).float().mean((0, 2)).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.025)
    part = Part(seed=0, step=1, rows=range(1, batch, 2), batch_size=batch)
    assert torch.equal(bit_flips(channels, bits, 0.4, part, torch.device("cpu")), flips[1::2])


def test_flips_change_the_decoder_s_input_only(tiny_tokenizer: ChannelTokenizer) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keep = torch.ones(2, 16, dtype=torch.bool)
    flips = torch.ones(2, 16, 6)
    flips[1, 3, 2] = -1
    with torch.no_grad():
        plain, vectors = tiny_tokenizer(images, keep)
        flipped, same = tiny_tokenizer(images, keep, flips)
        tokens = tiny_tokenizer.tokenize(images)
    tokens[1, 3] ^= 1 << 3  # the third of six bits, the first being the most significant
    torch.testing.assert_close(flipped, tiny_tokenizer.detokenize(tokens))
    assert torch.equal(vectors, same)
    assert torch.equal(flipped[0], plain[0])
