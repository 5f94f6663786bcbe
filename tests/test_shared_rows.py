"""Rows that codes share in training: a plain sum of vectors, which a plain Llama has when it is saved."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ScriptRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import GeneratorConfig, TokenLayout
from generator.model import build_generator
from generator.objective import NextTokenNats
from generator.shared_rows import SharedRows


def layout_of(num_bits: int, num_channels: int = 8) -> TokenLayout:
    return TokenLayout(
        num_channels=num_channels, num_bits=num_bits, class_names=["a", "b", "c"], tokenizer_fingerprint="0",
        has_null_label=True,
    )  # fmt: skip


def filled(model: NextTokenNats) -> NextTokenNats:
    """With shared rows of some size, as training leaves them."""
    rng = torch.Generator().manual_seed(4)
    assert model.shared is not None
    with torch.no_grad():
        for table in model.shared.parameters():
            table.copy_(torch.randn(table.shape, generator=rng) * 0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_bits", "num_groups", "sizes"), [(6, 2, [3, 3]), (7, 3, [3, 2, 2]), (5, 1, [5]), (4, 4, [1] * 4)]
)
def test_a_row_is_the_sum_of_its_groups_rows(num_bits: int, num_groups: int, sizes: list[int]) -> None:
    shared = SharedRows(layout_of(num_bits), num_groups, 5)
    assert [len(table) for table in shared.tables] == [2**size for size in sizes]
    for i, table in enumerate(shared.tables):
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(i)))
    rows = shared()
    assert rows.shape == (2**num_bits + 3 + 1, 5)
    for code in range(2**num_bits):
        word, start, expected = format(code, f"0{num_bits}b"), 0, torch.zeros(5)
        for table, size in zip(shared.tables, sizes, strict=True):
            expected = expected + table[int(word[start : start + size], 2)]
            start += size
        assert torch.allclose(rows[code], expected, atol=1e-6)
    assert not rows[2**num_bits :].any()


@pytest.mark.parametrize("count", [7, 100])
def test_more_groups_than_bits_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"bit_groups is {count}; tokens of 6 bits allow 0..6"):
        SharedRows(layout_of(6), count, 5)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [0, 10])
def test_the_plain_llama_has_learned_what_the_shared_rows_have(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, chunk: int
) -> None:
    model = filled(NextTokenNats(copy.deepcopy(tiny_generator), tiny_layout, chunk=chunk, bit_groups=2)).eval()
    rng = torch.Generator().manual_seed(0)
    labels, tokens = torch.randint(0, 6, (3,), generator=rng), torch.randint(0, 64, (3, 16), generator=rng)
    before = model(labels, tokens)
    llama = model.plain()
    logits = llama(input_ids=torch.cat([64 + labels[:, None], tokens[:, :-1]], dim=1)).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(3, 16)
    assert torch.allclose(before, expected, atol=1e-4, rtol=1e-4)
    # the shared rows do something, and the model under training stays as it is
    without = NextTokenNats(copy.deepcopy(tiny_generator), tiny_layout)(labels, tokens)
    assert (before - without).abs().max() > 0.1
    assert torch.equal(model(labels, tokens), before)
    assert llama.state_dict().keys() == tiny_generator.state_dict().keys()


@torch.no_grad()
def test_a_model_begins_as_one_without_them(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> None:
    """So a trained generator can be gone on from, with them or without."""
    model = NextTokenNats(copy.deepcopy(tiny_generator), tiny_layout, bit_groups=3)
    plain = model.plain().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in tiny_generator.state_dict().items())


def tokens_of_halves(count: int, rng: torch.Generator) -> Tensor:
    """Sequences whose first four bits stay what they are, while the other four are noise: (count 8)."""
    first = torch.randint(0, 16, (count, 1), generator=rng).expand(-1, 8)
    return first * 16 + torch.randint(0, 16, (count, 8), generator=rng)


def test_what_groups_of_bits_say_is_learned_sooner() -> None:
    layout = layout_of(8)
    size = GeneratorConfig(num_layers=2, num_heads=2, hidden_size=32, intermediate_size=64)
    learned = {}
    for bit_groups in (0, 2, 8):
        torch.manual_seed(0)
        model = NextTokenNats(build_generator(size, layout), layout, bit_groups=bit_groups)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rng = torch.Generator().manual_seed(1)
        for _ in range(30):
            nats = model(torch.zeros(32, dtype=torch.long), tokens_of_halves(32, rng))
            nats.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        learned[bit_groups] = nats[:, 1:].mean().item()
    best = 2.773  # the logarithm of 16
    assert best < learned[8] < learned[2] < learned[0] - 1


def test_a_run_saves_the_sum_of_the_averages(scripts: ScriptRunner, token_store: Path, tmp_path: Path) -> None:
    flags = ("--num-layers", 1, "--num-heads", 2, "--hidden-size", 32, "--intermediate-size", 64, "--bit-groups", 3)
    flags = (*flags, "--steps", 6, "--batch-size", 8, "--warmup-steps", 0, "--learning-rate", 0.01, "--num-workers", 0)
    flags = (*flags, "--mixed-precision", "no", "--ema-decay", 0.5)
    done = scripts("train_ar.py", "--tokens", token_store, "--output-dir", tmp_path / "run", *flags)
    assert done.code == 0, done.err
    state = load_file(tmp_path / "run/checkpoints/step-00000006/training.safetensors")
    saved = load_file(tmp_path / "run/generator/model.safetensors")
    for own, place in (("model.embed_tokens", "input"), ("lm_head", "head")):
        tables = [state[f"ema.shared.{place}.tables.{i}"] for i in range(3)]
        assert all(table.abs().max() > 1e-3 for table in tables)
        expected = state[f"ema.llama.{own}.weight"]
        codes = torch.arange(64)
        for table, shift in zip(tables, (4, 2, 0), strict=True):
            expected[:64] += table[codes >> shift & 3]
        assert torch.allclose(saved[f"{own}.weight"], expected, atol=1e-6)
    assert not any("shared" in name for name in saved)


def test_too_many_groups_are_one_line(scripts: ScriptRunner, token_store: Path, tmp_path: Path) -> None:
    for count, told in ((7, "bit_groups is 7; tokens of 6 bits allow 0..6"), (-1, "bit_groups is -1; it must be 0")):
        done = scripts("train_ar.py", "--tokens", token_store, "--output-dir", tmp_path / "run", "--bit-groups", count)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert told in done.err
        assert not (tmp_path / "run").exists()


def test_layouts_differ_in_their_unshared_rows_alone(tiny_layout: TokenLayout) -> None:
    fewer = dataclasses.replace(tiny_layout, class_names=tiny_layout.class_names[:1])
    assert len(SharedRows(tiny_layout, 2, 4)()) - len(SharedRows(fewer, 2, 4)()) == len(tiny_layout.class_names) - 1
