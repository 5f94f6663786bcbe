"""The cached step against transformers' own forward."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import GeneratorConfig, TokenLayout, llama_config
from generator.decode import CachedDecoder
from generator.engine import Engine

C, CODES = 16, 64


def random_rows(batch_size: int) -> torch.Tensor:
    """A class row and C - 1 tokens for each sequence."""
    rng = torch.Generator().manual_seed(batch_size)
    labels = CODES + torch.randint(0, 6, (batch_size, 1), generator=rng)
    return torch.cat([labels, torch.randint(0, CODES, (batch_size, C - 1), generator=rng)], dim=1)


def stepped(engine: Engine, rows: torch.Tensor, length: int = C) -> torch.Tensor:
    """Logits after each of the rows (b t v), fed one by one."""
    batch = engine.begin(
        rows[:, 0] - CODES,
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.zeros(len(rows), dtype=torch.long),
        torch.zeros(len(rows), length),
        torch.ones(C),
        guided=False,
    )
    batch.sequences[: len(rows), : rows.shape[1]] = rows
    logits = []
    for _ in range(rows.shape[1]):
        with torch.no_grad():
            logits.append(engine._forward(batch, engine._length(batch), with_logits=True)[: len(rows)])
        batch.position.add_(1)
        batch.next_position += 1
    return torch.stack(logits, dim=1)


@pytest.fixture(scope="module")
def compiled_engine(tiny_decoder: CachedDecoder) -> Engine:
    return Engine(tiny_decoder, compile=True)


@pytest.fixture(params=["eager", "compiled"])
def engine(request: pytest.FixtureRequest, tiny_engine: Engine, compiled_engine: Engine) -> Engine:
    return tiny_engine if request.param == "eager" else compiled_engine


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_step_is_transformers_forward_at_every_position(
    tiny_generator: LlamaForCausalLM, engine: Engine, batch_size: int
) -> None:
    rows = random_rows(batch_size)
    found = stepped(engine, rows)
    assert found.shape == (batch_size, C, CODES)
    assert found.dtype == torch.float32
    with torch.no_grad():
        expected = tiny_generator(input_ids=rows, use_cache=False).logits[..., :CODES]
    assert expected.std() > 1  # a flat head would make the comparison worthless
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compiled_rows_do_not_know_their_neighbours_bit_for_bit(compiled_engine: Engine) -> None:
    """Alone, among 3, 8 and 11 (walked as 8 and 3, rounded up): the sums of a row are added in the same order."""
    rows = random_rows(11)
    whole = stepped(compiled_engine, rows)
    for part in ([0], [10], [2, 5, 10], list(range(8)), list(range(10, -1, -1))):
        assert torch.equal(stepped(compiled_engine, rows[part]), whole[part]), part


def test_logits_hang_on_the_whole_prefix(tiny_engine: Engine) -> None:
    """The fixture is worth comparing with: any earlier row changes the last logits by a lot."""
    rows = random_rows(1)
    last = stepped(tiny_engine, rows)[:, -1]
    for position in range(C):
        changed = rows.clone()
        first, size = (0, CODES) if position else (CODES, 6)
        changed[0, position] = first + (changed[0, position] - first + 1) % size
        assert (stepped(tiny_engine, changed)[:, -1] - last).abs().max() > 1e-3, position


def test_a_longer_cache_does_not_matter(tiny_engine: Engine) -> None:
    rows = random_rows(3)[:, :5]
    assert torch.equal(stepped(tiny_engine, rows, length=C), stepped(tiny_engine, rows, length=5))


def test_attention_reads_the_cache_in_steps_and_never_beyond_the_mask(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several lengths of view within one drawing give what one gives."""
    engine = Engine(CachedDecoder.from_llama(tiny_generator, tiny_layout))
    rows = random_rows(2)
    whole = stepped(engine, rows)
    monkeypatch.setattr("generator.engine.LENGTH_STEP", 3)
    torch.testing.assert_close(stepped(engine, rows), whole, rtol=1e-5, atol=1e-5)


def test_head_covers_the_code_rows_alone(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> None:
    decoder = CachedDecoder.from_llama(tiny_generator, tiny_layout)
    assert decoder.code_head.shape == (CODES, 32)
    assert torch.equal(decoder.code_head, tiny_generator.lm_head.weight[:CODES])


def test_decoder_holds_its_own_weights(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> None:
    rows = random_rows(2)
    model = copy.deepcopy(tiny_generator)
    engine = Engine(CachedDecoder.from_llama(model, tiny_layout))
    expected = stepped(engine, rows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(stepped(engine, rows), expected)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_bfloat16_is_as_near_to_its_own_weights_as_transformers(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, compile: bool
) -> None:
    """The truth is float32 arithmetic over the rounded weights: transformers' bfloat16 is further from it than ours."""
    model = copy.deepcopy(tiny_generator)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rows = random_rows(3)
    found = stepped(Engine(CachedDecoder.from_llama(model, tiny_layout), compile=compile), rows)
    assert found.dtype == torch.float32
    with torch.no_grad():
        theirs = model(input_ids=rows, use_cache=False).logits[..., :CODES].float()
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        truth = model(input_ids=rows, use_cache=False).logits[..., :CODES]
    assert (found - truth).abs().mean() < (theirs - truth).abs().mean() < 0.1 * truth.std()


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"mlp_bias": True}, {"num_key_value_heads": 1}])
def test_other_llamas_are_refused(tiny_layout: TokenLayout, change: dict[str, object]) -> None:
    size = GeneratorConfig(num_layers=1, num_heads=2, hidden_size=32, intermediate_size=64)
    config = llama_config(size, tiny_layout)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match="plain multi-head"):
        CachedDecoder.from_llama(LlamaForCausalLM(config), tiny_layout)
