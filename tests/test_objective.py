"""The training objective: the cross-entropy of every token (law 7), and its gradients."""

import copy
import math

import pytest
import torch
from conftest import tiny_config
from oracles.sampling import code_log_probabilities
from torch import Tensor

from generator.model import ChannelGPT
from generator.objective import GeneratorObjective, position_weights
from tokenizer import ChannelTokenizer

C, CODES, BITS = 16, 64, 6


def random_images(count: int) -> tuple[Tensor, Tensor]:
    """A class, the null class among them, and C tokens for each image."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 6, (count,), generator=rng), torch.randint(0, CODES, (count, C), generator=rng)


@torch.no_grad()
def test_a_fresh_model_gives_all_codes_nearly_equal_odds(tiny_tokenizer: ChannelTokenizer) -> None:
    """Law 7: with a prior of zeros the loss is that of fair bits."""
    loss = GeneratorObjective(ChannelGPT(tiny_config(tiny_tokenizer)))(*random_images(64))
    assert loss.nats.shape == (64, C)
    assert float(loss.nats.mean()) == pytest.approx(BITS * math.log(2), rel=1e-3)
    assert float(loss.penalty) == 0


@torch.no_grad()
def test_the_loss_is_that_of_a_plain_loop(tiny_generator: ChannelGPT) -> None:
    labels, tokens = random_images(3)
    loss = GeneratorObjective(tiny_generator)(labels, tokens)
    for i in range(3):
        for j in range(C):
            # what predicts token j has read the class and the tokens before it, and nothing else
            odds = code_log_probabilities(tiny_generator, int(labels[i]), tokens[i, :j].tolist())[0]
            assert float(loss.nats[i, j]) == pytest.approx(-float(odds[tokens[i, j]]), rel=1e-4, abs=1e-4)
    prior = tiny_generator.prior
    total = prior.matrix().square().sum() + prior.class_bias.square().sum()
    assert float(loss.penalty) == pytest.approx(float(total), rel=1e-5)
    shorter = GeneratorObjective(tiny_generator)(labels, tokens[:, :5])
    torch.testing.assert_close(shorter.nats, loss.nats[:, :5], rtol=1e-4, atol=1e-5)


def gradients(objective: GeneratorObjective) -> dict[str, Tensor]:
    nats, penalty = objective.train()(*random_images(6))
    # not the mean, so that every token has a different weight
    ((nats * torch.linspace(0.5, 2, nats.numel()).reshape(nats.shape)).sum() + penalty).backward()
    return {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing_does_not_change_gradients(tiny_generator: ChannelGPT) -> None:
    expected = gradients(GeneratorObjective(copy.deepcopy(tiny_generator)))
    model = copy.deepcopy(tiny_generator)
    model.checkpoints_blocks = True
    found = gradients(GeneratorObjective(model))
    assert found.keys() == expected.keys() == {name for name, _ in GeneratorObjective(model).named_parameters()}
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_dropout_drops_its_share_in_training_only_and_is_a_function_of_the_seed(tiny_generator: ChannelGPT) -> None:
    generator = ChannelGPT(tiny_generator.config, dropout=0.25)
    generator.load_state_dict(tiny_generator.state_dict())
    model = GeneratorObjective(generator)
    seen: list[Tensor] = []
    generator.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model.train()
    torch.manual_seed(3)
    first = model(*random_images(64)).nats
    # 64 * 16 * 32 entries: four sigma is 0.01
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    torch.manual_seed(3)
    assert torch.equal(model(*random_images(64)).nats, first)
    assert not torch.equal(model(*random_images(64)).nats, first)
    plain = GeneratorObjective(tiny_generator)
    assert torch.equal(model.eval()(*random_images(4)).nats, plain(*random_images(4)).nats)


def test_position_weights_have_mean_one() -> None:
    for count in (2, 17, 256):
        assert position_weights("none", count).tolist() == [1.0] * count
        weights = position_weights("linear", count)
        assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
        assert float(weights[0] / weights[-1]) == pytest.approx(2, rel=1e-5)
        assert torch.allclose(weights.diff(), weights.diff().mean(), atol=1e-6)
