"""The linear prior against a float64 loop over bits."""

import copy
import math

import pytest
import torch
from oracles import bit_prior as oracle
from torch import Tensor

from common.bit_prior import BitPrior, fit_bit_prior
from common.config import InputError

C, BITS, CLASSES = 5, 3, 4


def random_prior(channels: int = C, bits: int = BITS, classes: int = CLASSES) -> BitPrior:
    prior = BitPrior(channels, bits, classes)
    rng = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.7
    return prior


def uniform_null(prior: BitPrior) -> BitPrior:
    """A copy whose null class has no biases of its own."""
    changed = copy.deepcopy(prior)
    changed.class_bias.data[changed.null_label] = 0
    return changed


def random_bits(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 2, (count, C, BITS), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


LABELS = torch.tensor([0, 3, CLASSES, 1, 2, 0])


@torch.no_grad()
def test_nats_match_a_loop_over_bits() -> None:
    prior, bits = random_prior(), random_bits(6)
    found = prior(bits, LABELS)
    assert found.shape == (6, C)
    for i in range(6):
        loop = oracle.nats(prior, bits[i].flatten().tolist(), int(LABELS[i]))
        expected = [math.fsum(loop[start : start + BITS]) for start in range(0, C * BITS, BITS)]
        assert found[i].tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_log_odds_depend_on_earlier_bits_only() -> None:
    prior, bits = random_prior(), random_bits(1)
    before = prior.log_odds(bits, LABELS[:1]).flatten()
    for j in range(C * BITS):
        changed = bits.clone().flatten()
        changed[j] *= -1
        after = prior.log_odds(changed.reshape(bits.shape), LABELS[:1]).flatten()
        assert torch.equal(after[: j + 1], before[: j + 1])
        assert (after[j + 1 :] != before[j + 1 :]).all()


def test_gradients_reach_bits_as_targets_and_as_context() -> None:
    """d nats / d bit_j = -log-odds_j * s(-m_j) - sum over i > j of bit_i * weight_ij * s(-m_i), m = bit * log-odds."""
    prior, bits = random_prior(), random_bits(1).requires_grad_()
    prior(bits, LABELS[:1]).sum().backward()
    assert bits.grad is not None
    values = bits.flatten().tolist()
    odds = [oracle.log_odds(prior, values[:i], int(LABELS[0])) for i in range(len(values))]
    wrong = [1 / (1 + math.exp(bit * odd)) for bit, odd in zip(values, odds, strict=True)]
    for j, found in enumerate(bits.grad.flatten().tolist()):
        later = sum(values[i] * oracle.weight(prior, i, j) * wrong[i] for i in range(j + 1, len(values)))
        assert found == pytest.approx(-odds[j] * wrong[j] - later, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_autocast_does_not_change_nats() -> None:
    prior, bits = random_prior(), random_bits(6)
    with torch.autocast("cpu", torch.bfloat16):
        half = prior(bits.bfloat16(), LABELS)
    assert torch.equal(half, prior(bits, LABELS))


@torch.no_grad()
@pytest.mark.parametrize("label", [1, CLASSES])
def test_sample_frequencies_match_probabilities(label: int) -> None:
    prior, count = random_prior(channels=2, bits=2), 20_000
    drawn = prior.sample(torch.full((count,), label), range(count)).flatten(1)
    found = {tuple(image.tolist()): 0 for image in drawn.unique(dim=0)}
    for image in drawn.tolist():
        found[tuple(image)] += 1
    expected = oracle.probabilities(prior, label)
    assert math.fsum(expected.values()) == pytest.approx(1)
    # chi-square with 15 degrees of freedom: 37.7 is exceeded once in a thousand
    assert sum((found.get(k, 0) - count * p) ** 2 / (count * p) for k, p in expected.items()) < 37.7


@torch.no_grad()
def test_a_sample_depends_on_its_seed_and_class_alone() -> None:
    prior, seeds = random_prior(channels=40), [7, 0, 2**63 - 1, 12, 7, 3]
    together = prior.sample(LABELS, seeds)
    assert set(together.unique().tolist()) == {-1.0, 1.0}
    for i, seed in enumerate(seeds):
        assert torch.equal(prior.sample(LABELS[i : i + 1], [seed])[0], together[i])
    assert not torch.equal(together[1], together[5])


def test_a_fit_recovers_the_prior_that_generated_the_data() -> None:
    true = random_prior()
    labels = torch.arange(4096) % CLASSES
    bits = true.sample(labels, range(4096))
    fitted, ridge = BitPrior(C, BITS, CLASSES), BitPrior(C, BITS, CLASSES)
    fit_bit_prior(fitted, [(bits, labels)] * 400, steps=400, learning_rate=0.05, l2_weight=0)
    fit_bit_prior(ridge, [(bits, labels)] * 400, steps=400, learning_rate=0.05, l2_weight=0.1)
    with torch.no_grad():
        held_labels = torch.arange(2000) % CLASSES
        held = true.sample(held_labels, range(10_000, 12_000))
        best, found = true(held, held_labels).mean(), fitted(held, held_labels).mean()
        unknown = torch.full((2000,), CLASSES)
        null, unfitted = (fitted(held, unknown).mean(), uniform_null(fitted)(held, unknown).mean())
    assert found < best + 0.01
    assert found < null - 0.05
    assert null < unfitted  # the null class is fitted, too
    assert ridge.penalty() < 0.5 * fitted.penalty()


def test_seeds_and_labels_out_of_range_are_refused() -> None:
    prior = random_prior()
    for label in (-1, CLASSES + 1):
        with pytest.raises(InputError, match="class label is out of range; allowed are"):
            prior.sample(torch.tensor([0, label]), [0, 1])
    with pytest.raises(InputError, match="2 seeds for 6 class labels"):
        prior.sample(LABELS, [0, 1])
    with pytest.raises(InputError, match="out of range"):
        prior.sample(LABELS[:1], [2**63])
