"""What training minimises: the cross-entropy of every token, in whatever way memory is saved (law 7)."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from generator.config import GeneratorConfig, TokenLayout
from generator.model import build_generator
from generator.objective import NextTokenNats, flops_per_token, position_weights

C, CODES = 16, 64


def random_tokens(count: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 5, (count,), generator=rng), torch.randint(0, CODES, (count, C), generator=rng)


def objective(model: LlamaForCausalLM, layout: TokenLayout, **settings: Any) -> NextTokenNats:
    return NextTokenNats(copy.deepcopy(model), layout, **settings)


@torch.no_grad()
def test_a_fresh_model_knows_nothing(tiny_layout: TokenLayout) -> None:
    """Law 7: the loss is the logarithm of the number of rows that are scored."""
    model = build_generator(GeneratorConfig(num_layers=2, num_heads=4, hidden_size=64), tiny_layout).eval()
    nats = objective(model, tiny_layout)(*random_tokens(64))
    assert nats.shape == (64, C)
    assert float(nats.mean()) == pytest.approx(math.log(CODES + 5 + 1), rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [0, 7, 16, 1000])
def test_the_loss_is_that_of_a_plain_loop(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, chunk: int
) -> None:
    labels, tokens = random_tokens(3)
    found = objective(tiny_generator, tiny_layout, chunk=chunk)(labels, tokens)
    for i in range(3):
        rows = [CODES + int(labels[i])]
        for j in range(C):
            # what predicts token j has read the class and the tokens before it, and nothing else
            odds = tiny_generator(input_ids=torch.tensor([rows])).logits[0, -1].double().log_softmax(-1)
            assert float(found[i, j]) == pytest.approx(-float(odds[tokens[i, j]]), rel=1e-4, abs=1e-4)
            rows.append(int(tokens[i, j]))


def gradients(model: NextTokenNats) -> dict[str, Tensor]:
    model.train()
    nats = model(*random_tokens(6))
    # not the mean: every token has a weight of its own
    (nats * torch.linspace(0.5, 2, nats.numel()).reshape(nats.shape)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("settings", [{"chunk": 10}, {"chunk": 96}, {"gradient_checkpointing": True}])
def test_saving_memory_leaves_the_gradients_alone(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, settings: dict[str, Any]
) -> None:
    expected = gradients(objective(tiny_generator, tiny_layout))
    found = gradients(objective(tiny_generator, tiny_layout, **settings))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_logits_of_a_whole_batch_are_never_held(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> None:
    """The largest tensors that the backward pass keeps, by what autograd is asked to save."""

    def largest_saved(**settings: Any) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            objective(tiny_generator, tiny_layout, **settings).train()(*random_tokens(32))
        return max(sizes)

    rows = CODES + 6
    assert largest_saved() >= 32 * C * rows
    # what is left: activations of 64 numbers at most, for each token
    assert largest_saved(chunk=64) <= 32 * C * 64 < 32 * C * rows


def test_dropout_drops_its_share_in_training_only_and_is_a_function_of_the_seed(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout
) -> None:
    model = objective(tiny_generator, tiny_layout, dropout=0.25)
    seen: list[Tensor] = []
    first_norm = model.llama.model.layers[0].input_layernorm
    first_norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    model.train()
    torch.manual_seed(3)
    first = model(*random_tokens(64))
    # 64 * 16 * 32 entries: four sigma is 0.01
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    torch.manual_seed(3)
    assert torch.equal(model(*random_tokens(64)), first)
    assert not torch.equal(model(*random_tokens(64)), first)
    plain = objective(tiny_generator, tiny_layout).eval()
    assert torch.equal(model.eval()(*random_tokens(4)), plain(*random_tokens(4)))
    assert model.llama.state_dict().keys() == tiny_generator.state_dict().keys()


def test_position_weights_have_mean_one() -> None:
    for count in (2, 16, 256):
        assert position_weights("none", count).tolist() == [1.0] * count
        for kind, ratio in (("linear", 2), ("exponential", 16)):
            weights = position_weights(kind, count)  # type: ignore[arg-type]
            assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
            assert float(weights[0] / weights[-1]) == pytest.approx(ratio, rel=1e-5)
            assert (weights[1:] < weights[:-1]).all()
    linear, exponential = position_weights("linear", 17), position_weights("exponential", 17)
    assert float(linear[0] + linear[-1]) == pytest.approx(2 * float(linear[8]))
    assert float(exponential[0] * exponential[-1]) == pytest.approx(float(exponential[8]) ** 2)


def test_operations_of_a_token_are_those_that_torch_counts(tiny_layout: TokenLayout) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    size = GeneratorConfig(num_layers=3, num_heads=2, hidden_size=32, intermediate_size=64)
    model = NextTokenNats(build_generator(size, tiny_layout), tiny_layout)
    labels, tokens = random_tokens(4)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(labels, tokens).mean().backward()
    square = 6 * 3 * 32 * C  # torch counts the whole square of attention, of which half looks ahead
    counted = counter.get_total_flops() / tokens.numel()
    # some versions of transformers turn positions into angles by a product, too
    assert counted == pytest.approx(flops_per_token(model.llama, C) + square, rel=1e-4)
