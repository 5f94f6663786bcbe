"""The cached step against the model's own forward, and the model's blocks against those of transformers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import sharp_generator, tiny_config
from oracles.sampling import bits_of, code_log_probabilities

from evaluation.speed.samplers import llama_of
from generator.decode import CachedDecoder
from generator.engine import Batch, Engine
from generator.model import ChannelGPT, rotary_tables
from generator.sampling import code_log_probabilities as product_log_probabilities
from tokenizer import ChannelTokenizer

C, BITS, CODES = 16, 6, 64


def random_images(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A class and C tokens for each image."""
    rng = torch.Generator().manual_seed(batch_size)
    labels = torch.randint(0, 6, (batch_size,), generator=rng)
    return labels, torch.randint(0, CODES, (batch_size, C), generator=rng)


def started(engine: Engine, labels: torch.Tensor, tokens: torch.Tensor) -> Batch:
    """A batch that is given all tokens."""
    count, length = tokens.shape
    return engine.begin(labels, tokens, torch.full((count,), length), torch.zeros(count, length), torch.ones(C), False)


def stepped(engine: Engine, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all codes at each position (b k v), one position fed at a time."""
    batch = started(engine, labels, tokens)
    found = []
    for _ in range(tokens.shape[1]):
        with torch.no_grad():
            hidden = engine._blocks(batch, engine._length(batch))
            found.append(product_log_probabilities(*engine._odds(batch, hidden, False))[: len(labels)])
        batch.position.add_(1)
        batch.next_position += 1
    return torch.stack(found, dim=1)


@pytest.fixture(scope="module")
def compiled_engine(tiny_decoder: CachedDecoder) -> Engine:
    return Engine(tiny_decoder, compile=True)


@pytest.fixture(params=["eager", "compiled"])
def engine(request: pytest.FixtureRequest, tiny_engine: Engine, compiled_engine: Engine) -> Engine:
    return tiny_engine if request.param == "eager" else compiled_engine


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_step_gives_the_probabilities_of_the_models_forward(
    tiny_generator: ChannelGPT, engine: Engine, batch_size: int
) -> None:
    labels, tokens = random_images(batch_size)
    found = stepped(engine, labels, tokens)
    bits = torch.tensor([[bits_of(token, BITS) for token in row] for row in tokens.tolist()])
    with torch.no_grad():
        expected = F.logsigmoid(bits * tiny_generator(labels, bits)).sum(-1)
    assert expected.std() > 1  # even odds would make the comparison worthless
    torch.testing.assert_close(found.gather(2, tokens[..., None])[..., 0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(batch_size, C))
    for image, position in ((0, 0), (batch_size - 1, 7), (0, C - 1)):
        every_code = code_log_probabilities(tiny_generator, int(labels[image]), tokens[image, :position].tolist())
        torch.testing.assert_close(found[image, position], every_code[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 7, 16])
def test_probabilities_of_codes_are_those_of_their_bits(bits: int) -> None:
    """By the formula, bit by bit, for some codes of each size."""
    rng = torch.Generator().manual_seed(bits)
    log_odds = torch.randn(2, bits, generator=rng)
    pairs = torch.randn(2, bits, bits, generator=rng).tril(-1)
    found = product_log_probabilities(log_odds, pairs)
    assert found.shape == (2, 2**bits)
    torch.testing.assert_close(found.double().exp().sum(-1), torch.ones(2).double(), rtol=1e-5, atol=0)
    for token in torch.randint(2**bits, (20,), generator=rng).tolist():
        code = bits_of(token, bits)
        for row in range(2):
            total = 0.0
            for i in range(bits):
                odds = log_odds[row, i] + sum(pairs[row, i, j] * code[j] for j in range(i))
                total += float(F.logsigmoid(code[i] * odds))
            assert abs(float(found[row, token]) - total) < 1e-4


@torch.no_grad()
def test_blocks_are_those_of_transformers_llama(tiny_generator: ChannelGPT) -> None:
    llama = llama_of(tiny_generator)
    llama.model.norm.load_state_dict(tiny_generator.norm.state_dict())
    for layer, block in zip(llama.model.layers, tiny_generator.blocks, strict=True):
        query, key, value = block.query_key_value.weight.chunk(3)
        gate, up = block.gate_up.weight.chunk(2)
        weights = {
            "input_layernorm": block.attention_norm.weight,
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": block.attention_out.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.down.weight,
        }
        layer.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    x = torch.randn(3, C, 32, generator=torch.Generator().manual_seed(0))
    expected = llama.model(inputs_embeds=x, use_cache=False).last_hidden_state
    cos, sin = rotary_tables(C, 16, tiny_generator.config.rope_theta, x.device)
    for block in tiny_generator.blocks:
        x = block(x, cos, sin)
    torch.testing.assert_close(tiny_generator.norm(x), expected, rtol=1e-5, atol=1e-5)


def test_compiled_rows_do_not_depend_on_the_others_bit_for_bit(compiled_engine: Engine) -> None:
    """Alone, and among 3, 8 and 11 (processed as 8 and 3, rounded up): sums of a row have a fixed order."""
    labels, tokens = random_images(11)
    whole = stepped(compiled_engine, labels, tokens)
    for part in ([0], [10], [2, 5, 10], list(range(8)), list(range(10, -1, -1))):
        assert torch.equal(stepped(compiled_engine, labels[part], tokens[part]), whole[part]), part


def test_attention_reads_the_cache_in_steps_and_never_beyond_the_mask(
    tiny_generator: ChannelGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several lengths of view within one drawing give what one gives."""
    engine = Engine(CachedDecoder.from_model(tiny_generator))
    labels, tokens = random_images(2)
    whole = stepped(engine, labels, tokens)
    monkeypatch.setattr("generator.engine.LENGTH_STEP", 3)
    torch.testing.assert_close(stepped(engine, labels, tokens), whole, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_change_probabilities_little(
    tiny_tokenizer: ChannelTokenizer, tiny_generator: ChannelGPT
) -> None:
    labels, tokens = random_images(2)
    exact = stepped(Engine(CachedDecoder.from_model(tiny_generator)), labels, tokens)
    rounded = sharp_generator(tiny_config(tiny_tokenizer)).to(torch.bfloat16)
    engine = Engine(CachedDecoder.from_model(rounded))
    assert engine.decoder.dtype == torch.bfloat16
    found = stepped(engine, labels, tokens)
    assert found.dtype == torch.float32
    assert (found.exp() - exact.exp()).abs().sum(-1).mean() < 0.1
