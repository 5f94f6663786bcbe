"""The cached step against transformers' own forward."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import GeneratorConfig, TokenLayout, llama_config
from generator.decode import CachedDecoder

C, CODES = 16, 64


def random_rows(batch_size: int) -> torch.Tensor:
    """A class row and C - 1 tokens for each sequence."""
    rng = torch.Generator().manual_seed(batch_size)
    labels = CODES + torch.randint(0, 6, (batch_size, 1), generator=rng)
    return torch.cat([labels, torch.randint(0, CODES, (batch_size, C - 1), generator=rng)], dim=1)


def stepped(decoder: CachedDecoder, rows: torch.Tensor, length: int = C) -> torch.Tensor:
    cache = decoder.new_cache(len(rows), length)
    return torch.stack([decoder.step(rows[:, p], p, cache) for p in range(rows.shape[1])], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_step_is_transformers_forward_at_every_position(
    tiny_generator: LlamaForCausalLM, tiny_decoder: CachedDecoder, batch_size: int
) -> None:
    rows = random_rows(batch_size)
    found = stepped(tiny_decoder, rows)
    assert found.shape == (batch_size, C, CODES)
    assert found.dtype == torch.float32
    with torch.no_grad():
        expected = tiny_generator(input_ids=rows, use_cache=False).logits[..., :CODES]
    assert expected.std() > 1  # a flat head would make the comparison worthless
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_logits_hang_on_the_whole_prefix(tiny_decoder: CachedDecoder) -> None:
    """The fixture is worth comparing with: any earlier row changes the last logits by a lot."""
    rows = random_rows(1)
    last = stepped(tiny_decoder, rows)[:, -1]
    for position in range(C):
        changed = rows.clone()
        first, size = (0, CODES) if position else (CODES, 6)
        changed[0, position] = first + (changed[0, position] - first + 1) % size
        assert (stepped(tiny_decoder, changed)[:, -1] - last).abs().max() > 1e-3, position


def test_longer_cache_and_its_garbage_do_not_matter(tiny_decoder: CachedDecoder) -> None:
    rows = random_rows(3)[:, :5]
    expected = stepped(tiny_decoder, rows, length=5)
    cache = tiny_decoder.new_cache(3, C)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    found = torch.stack([tiny_decoder.step(rows[:, p], p, cache) for p in range(5)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_head_covers_the_code_rows_alone(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> None:
    decoder = CachedDecoder.from_llama(tiny_generator, tiny_layout)
    assert decoder.code_head.shape == (CODES, 32)
    assert torch.equal(decoder.code_head, tiny_generator.lm_head.weight[:CODES])


def test_decoder_holds_its_own_weights(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> None:
    rows = random_rows(2)
    model = copy.deepcopy(tiny_generator)
    decoder = CachedDecoder.from_llama(model, tiny_layout)
    expected = stepped(decoder, rows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(stepped(decoder, rows), expected)


def test_bfloat16_follows_transformers_and_gives_float32_logits(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout
) -> None:
    model = copy.deepcopy(tiny_generator)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rows = random_rows(3)
    found = stepped(CachedDecoder.from_llama(model, tiny_layout), rows)
    assert found.dtype == torch.float32
    with torch.no_grad():
        expected = model(input_ids=rows, use_cache=False).logits[..., :CODES].float()
    # 8 bits of mantissa through two sharp layers: most logits agree closely, none is of another model
    assert (found - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"mlp_bias": True}, {"num_key_value_heads": 1}])
def test_other_llamas_are_refused(tiny_layout: TokenLayout, change: dict[str, object]) -> None:
    size = GeneratorConfig(num_layers=1, num_heads=2, hidden_size=32, intermediate_size=64)
    config = llama_config(size, tiny_layout)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match="plain multi-head"):
        CachedDecoder.from_llama(LlamaForCausalLM(config), tiny_layout)
