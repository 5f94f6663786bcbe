"""Vectors that codes share in training: a plain sum, which a plain Llama has in its rows when it is saved."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ScriptRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from generator.bit_vectors import BitVectors
from generator.config import GeneratorConfig, TokenLayout
from generator.model import build_generator
from generator.objective import NextTokenNats
from tokenizer.bsq import unpack_bits

RUN = {
    "num_layers": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "batch_size": 8, "warmup_steps": 0,
    "learning_rate": 0.01, "num_workers": 0, "mixed_precision": "no", "ema_decay": 0.5,
}  # fmt: skip


def layout_of(num_bits: int) -> TokenLayout:
    return TokenLayout(
        num_channels=8, num_bits=num_bits, class_names=["a", "b", "c"], tokenizer_fingerprint="0", has_null_label=True
    )


def filled(model: NextTokenNats) -> NextTokenNats:
    """With vectors of some size, as training leaves them."""
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for bits in (model.input_bits, model.head_bits):
            assert bits is not None
            bits.vectors.copy_(torch.randn(bits.vectors.shape, generator=rng) * 0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("num_bits", [1, 6, 10])
def test_a_row_is_the_sum_of_its_bits_vectors_as_the_tokenizer_counts_bits(num_bits: int) -> None:
    bits = BitVectors(layout_of(num_bits), 5)
    bits.vectors.copy_(torch.randn(num_bits, 5, generator=torch.Generator().manual_seed(1)))
    rows = bits()
    assert rows.shape == (2**num_bits + 3 + 1, 5)
    signs = unpack_bits(torch.arange(2**num_bits), num_bits).sign()
    for code in range(2**num_bits):
        expected = sum((sign * vector for sign, vector in zip(signs[code], bits.vectors, strict=True)), torch.zeros(5))
        assert torch.allclose(rows[code], expected, atol=1e-5)
    assert not rows[2**num_bits :].any()
    some = torch.tensor([[0, 2**num_bits], [2**num_bits - 1, 1]])
    assert torch.allclose(bits(some), rows[some], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [0, 10])
def test_the_plain_llama_has_learned_what_the_vectors_have(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, chunk: int
) -> None:
    model = filled(NextTokenNats(copy.deepcopy(tiny_generator), tiny_layout, chunk=chunk, bit_vectors=True)).eval()
    rng = torch.Generator().manual_seed(0)
    labels, tokens = torch.randint(0, 6, (3,), generator=rng), torch.randint(0, 64, (3, 16), generator=rng)
    before = model(labels, tokens)
    llama = model.plain()
    logits = llama(input_ids=torch.cat([64 + labels[:, None], tokens[:, :-1]], dim=1)).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(3, 16)
    assert torch.allclose(before, expected, atol=1e-4, rtol=1e-4)
    # the vectors do something, and the model under training stays as it is
    without = NextTokenNats(copy.deepcopy(tiny_generator), tiny_layout)(labels, tokens)
    assert (before - without).abs().max() > 0.1
    assert torch.equal(model(labels, tokens), before)
    assert llama.state_dict().keys() == tiny_generator.state_dict().keys()


@torch.no_grad()
def test_a_trained_model_goes_on_with_them_as_it_was(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout
) -> None:
    plain = NextTokenNats(copy.deepcopy(tiny_generator), tiny_layout, bit_vectors=True).plain().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in tiny_generator.state_dict().items())


@torch.no_grad()
def test_a_fresh_model_begins_with_what_bits_say_and_knows_nothing(tiny_layout: TokenLayout) -> None:
    """Codes that differ in one bit are nearer than any two; vectors are as long as ever; law 7 holds."""
    torch.manual_seed(0)
    usual = build_generator(GeneratorConfig(num_layers=2, num_heads=4, hidden_size=64), tiny_layout)
    model = NextTokenNats(copy.deepcopy(usual), tiny_layout, bit_vectors=True)
    model.begin_with_bits()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, before = model.plain().state_dict()[name], usual.state_dict()[name]
        assert torch.equal(rows[64:], before[64:])
        assert rows[:64].std().item() == pytest.approx(before[:64].std().item(), rel=0.2)
        neighbours = torch.tensor([[code ^ 1 << bit for bit in range(6)] for code in range(64)])
        assert (rows[:64, None] - rows[neighbours]).norm(dim=-1).mean() < 0.7 * torch.pdist(rows[:64]).mean()
    rng = torch.Generator().manual_seed(0)
    labels, tokens = torch.randint(0, 5, (64,), generator=rng), torch.randint(0, 64, (64, 16), generator=rng)
    assert float(model.eval()(labels, tokens).mean()) == pytest.approx(math.log(64 + 5 + 1), rel=0.01)


@torch.no_grad()
def test_a_model_without_them_begins_as_ever(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> None:
    model = NextTokenNats(copy.deepcopy(tiny_generator), tiny_layout)
    model.begin_with_bits()
    plain = model.plain().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in tiny_generator.state_dict().items())


def tokens_of_halves(count: int, rng: torch.Generator) -> Tensor:
    """Sequences whose first four bits stay what they are, while the other four are noise: (count 8)."""
    first = torch.randint(0, 16, (count, 1), generator=rng).expand(-1, 8)
    return first * 16 + torch.randint(0, 16, (count, 8), generator=rng)


def test_what_bits_say_is_learned_much_sooner() -> None:
    layout = layout_of(8)
    size = GeneratorConfig(num_layers=2, num_heads=2, hidden_size=32, intermediate_size=64)
    learned = {}
    for bit_vectors in (False, True):
        torch.manual_seed(0)
        model = NextTokenNats(build_generator(size, layout), layout, bit_vectors=bit_vectors)
        model.begin_with_bits()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rng = torch.Generator().manual_seed(1)
        for _ in range(30):
            nats = model(torch.zeros(32, dtype=torch.long), tokens_of_halves(32, rng))
            nats.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        learned[bit_vectors] = nats[:, 1:].mean().item()
    assert math.log(16) < learned[True] < learned[False] - 1


@pytest.mark.parametrize("bit_vectors", [True, False])
def test_a_run_saves_the_sum_of_the_averages(
    scripts: ScriptRunner, token_store: Path, tmp_path: Path, bit_vectors: bool
) -> None:
    flags = [word for name, value in RUN.items() for word in (f"--{name}", value)]
    flags += ["--steps", 6, "--bit-vectors", str(bit_vectors).lower()]
    done = scripts("train_ar.py", "--tokens", token_store, "--output-dir", tmp_path / "run", *flags)
    assert done.code == 0, done.err
    state = load_file(tmp_path / "run/checkpoints/step-00000006/training.safetensors")
    saved = load_file(tmp_path / "run/generator/model.safetensors")
    for own, place in (("model.embed_tokens", "input_bits"), ("lm_head", "head_bits")):
        expected, name = state[f"ema.llama.{own}.weight"], f"ema.{place}.vectors"
        assert (name in state) == bit_vectors
        if bit_vectors:
            vectors = state[name]
            assert vectors.abs().max() > 1e-3
            expected[:64] += unpack_bits(torch.arange(64), 6).sign() @ vectors
        assert torch.allclose(saved[f"{own}.weight"], expected, atol=1e-6)
    assert len(saved) == 12  # nine of the block, the embedding, the head and the last norm: a plain Llama
