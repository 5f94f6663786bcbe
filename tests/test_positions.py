"""Vectors of positions: a model learns with them, and is saved as a plain Llama whose first block makes them."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ScriptRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import GeneratorConfig, TokenLayout, llama_config
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import build_generator, load_generator
from generator.objective import NextTokenNats
from generator.positions import SPARE, check_can_count, counting_block, without_counting
from generator.sampling import SamplingConfig

SIZE = GeneratorConfig(num_layers=2, num_heads=4, hidden_size=64, intermediate_size=192)
RUN = {
    "num_layers": 2, "num_heads": 4, "hidden_size": 64, "intermediate_size": 192, "batch_size": 8, "warmup_steps": 0,
    "learning_rate": 0.01, "num_workers": 0, "mixed_precision": "no", "ema_decay": 0.5, "position_vectors": "true",
}  # fmt: skip


def layout_of(num_channels: int) -> TokenLayout:
    return TokenLayout(
        num_channels=num_channels, num_bits=6, class_names=["a", "b", "c"], tokenizer_fingerprint="0",
        has_null_label=True, first_block_counts=True,
    )  # fmt: skip


def batch(num_channels: int, count: int = 4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 4, (count,), generator=rng), torch.randint(0, 64, (count, num_channels), generator=rng)


def learned(num_channels: int, size: GeneratorConfig = SIZE, bit_vectors: bool = True) -> NextTokenNats:
    """As training leaves one: vectors, rows and weights of some size."""
    layout = layout_of(num_channels)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = NextTokenNats(build_generator(size, layout), layout, bit_vectors=bit_vectors, position_vectors=True)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
        assert model.positions is not None
        model.positions.vectors.normal_(std=0.1)
        for bits in (model.input_bits, model.head_bits):
            if bits is not None:
                bits.vectors.normal_(std=0.1)
    return model.eval()


def nats_of(llama: LlamaForCausalLM, labels: Tensor, tokens: Tensor) -> Tensor:
    logits = llama(input_ids=torch.cat([64 + labels[:, None], tokens[:, :-1]], dim=1)).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


# ------------------------------------------------------------------------------------- the block that counts


@torch.no_grad()
@pytest.mark.parametrize("num_channels", [1, 16, 48])
def test_the_plain_llama_knows_positions_as_the_model_did(num_channels: int) -> None:
    """The oracle is the model in training, which adds the vectors to its embedding."""
    model = learned(num_channels)
    labels, tokens = batch(num_channels)
    expected = model(labels, tokens)
    plain = model.plain()
    assert type(plain) is LlamaForCausalLM
    assert plain.config.num_hidden_layers == 3
    # what is left in the spare entries are thousandths, which so sharp a model sees
    assert (nats_of(plain, labels, tokens) - expected).abs().mean() < 0.02
    # positions do count: without the block the same weights say something else
    without = NextTokenNats(copy.deepcopy(model.llama), model.layout)
    assert (without(labels, tokens) - expected).abs().mean() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("theta", [1000.0, 10000.0])
def test_it_counts_to_256_and_in_bfloat16(theta: float) -> None:
    """Of the demo's width; rows are any, the vectors' share of what comes out is told apart from them."""
    size = GeneratorConfig(num_layers=1, num_heads=4, hidden_size=256, intermediate_size=704, rope_theta=theta)
    model = learned(256, size, bit_vectors=False)
    labels, tokens = batch(256)
    rows = torch.cat([64 + labels[:, None], tokens[:, :-1]], dim=1)
    assert model.positions is not None
    wanted = model.positions(model.llama.model.embed_tokens(rows))
    vectors = model.positions.vectors
    for dtype, largest in ((torch.float32, 1e-4), (torch.bfloat16, 1e-3)):
        plain = model.plain()
        plain.load_state_dict({name: weight.to(dtype).float() for name, weight in plain.state_dict().items()})
        made = plain.model(input_ids=rows, output_hidden_states=True).hidden_states[1]
        error = (made - wanted)[..., SPARE:].square().mean() / vectors.square().mean()
        assert error < largest, dtype


@torch.no_grad()
def test_each_position_is_right_and_not_the_mean_alone() -> None:
    vectors = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    layout = layout_of(48)
    config = llama_config(SIZE, layout)
    block = counting_block(config, vectors)
    llama = LlamaForCausalLM(config).model
    llama.layers[0].load_state_dict(block)
    rows = torch.zeros(1, 48, 64)
    rows[:, 0, 0] = rows[:, 1:, 1] = 1024
    places = torch.arange(48)[None]
    made = llama.layers[0](rows, position_embeddings=llama.rotary_emb(rows, places), position_ids=places)[0]
    nearest = torch.cdist(made[:, SPARE:], vectors[:, SPARE:]).argmin(1)
    assert nearest.tolist() == list(range(48))
    assert (made - vectors)[:, :SPARE].abs().max() < 0.05


def test_it_is_the_same_every_time_and_leaves_torch_s_numbers_alone() -> None:
    model = learned(16)
    torch.manual_seed(3)
    one = model.plain().state_dict()
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()) == drawn
    other = model.plain().state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_cached_step_draws_with_it_what_the_uncached_one_would() -> None:
    """Law 5, at temperature 0."""
    model = learned(16)
    llama = model.plain()
    *_, last = stream(
        Engine(CachedDecoder.from_llama(llama, model.layout)), [0, 2], [5, 6], 16, SamplingConfig(temperature=0)
    )
    rows = torch.tensor([[64], [66]])
    for _ in range(16):
        with torch.no_grad():
            logits = llama(input_ids=rows).logits[:, -1, :64]
        rows = torch.cat([rows, logits.argmax(1, keepdim=True)], dim=1)
    assert last.tokens.tolist() == rows[:, 1:].tolist()


@pytest.mark.parametrize(
    ("change", "num_channels", "says"),
    [
        ({"num_heads": 2}, 64, "num_heads is 2; position_vectors need 4"),
        ({"intermediate_size": 16}, 64, "intermediate_size is 16; position_vectors need 24"),
        ({"intermediate_size": 64}, 64, "intermediate_size 64"),
    ],
)
def test_a_size_that_cannot_count_is_refused(change: dict[str, int], num_channels: int, says: str) -> None:
    config = llama_config(dataclasses.replace(SIZE, **change), layout_of(num_channels))
    with pytest.raises(InputError, match=says) as caught:
        check_can_count(config, num_channels)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- what it is good for


def test_what_hangs_on_the_position_is_learned_much_sooner() -> None:
    """Each position has its one token, and half of the tokens are noise; two plain Llamas come out."""
    layout = dataclasses.replace(layout_of(64), class_names=["a"])
    right = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(5))
    found = {}
    for vectors in (False, True):
        torch.manual_seed(0)
        model = NextTokenNats(build_generator(SIZE, layout), layout, position_vectors=vectors)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rng = torch.Generator().manual_seed(1)
        for _ in range(60):
            noise = torch.randint(0, 64, (8, 64), generator=rng)
            tokens = torch.where(torch.rand(8, 64, generator=rng) < 0.5, noise, right)
            model(torch.zeros(8, dtype=torch.long), tokens).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            labels, tokens = torch.zeros(32, dtype=torch.long), torch.randint(0, 64, (32, 64), generator=rng)
            logits = model.plain()(input_ids=torch.cat([64 + labels[:, None], tokens[:, :-1]], dim=1)).logits
        found[vectors] = F.cross_entropy(logits.flatten(0, 1), right.repeat(32)).item()
    # the right token has half of the odds: log 2
    assert math.log(2) - 0.3 < found[True] < 1.2 < found[False] - 1, found


def test_a_fresh_model_knows_nothing() -> None:
    """Law 7."""
    layout = layout_of(16)
    torch.manual_seed(0)
    model = NextTokenNats(build_generator(SIZE, layout), layout, bit_vectors=True, position_vectors=True)
    model.begin_with_bits()
    assert float(model(*batch(16, 32)).detach().mean()) == pytest.approx(math.log(64 + 4), rel=0.02)


# ------------------------------------------------------------------------------------- a whole run, and what follows


def train(scripts: ScriptRunner, store: Path, folder: Path, code: int = 0, **more: object) -> str:
    flags = [word for name, value in {**RUN, **more}.items() for word in (f"--{name}", value)]
    done = scripts("train_ar.py", "--tokens", store, "--output-dir", folder, *flags)
    assert done.code == code, done.err
    return done.err


def test_a_run_saves_a_plain_llama_of_one_block_more(scripts: ScriptRunner, token_store: Path, tmp_path: Path) -> None:
    train(scripts, token_store, tmp_path / "run", steps=6)
    llama, layout = load_generator(tmp_path / "run/generator")
    assert llama.config.num_hidden_layers == 3
    assert layout.first_block_counts
    state = load_file(tmp_path / "run/checkpoints/step-00000006/training.safetensors")
    block = counting_block(llama.config, state["ema.positions.vectors"])
    for name, weight in llama.model.layers[0].state_dict().items():
        assert torch.equal(weight, block[name]), name
    for name, weight in llama.model.layers[1].state_dict().items():
        assert torch.equal(weight, state[f"ema.llama.model.layers.0.{name}"]), name


def test_a_run_goes_on_to_the_very_weights(scripts: ScriptRunner, token_store: Path, tmp_path: Path) -> None:
    train(scripts, token_store, tmp_path / "whole", steps=6, schedule="constant")
    train(scripts, token_store, tmp_path / "two", steps=3, schedule="constant")
    train(scripts, token_store, tmp_path / "two", steps=6, schedule="constant", resume="true")
    one, other = (load_file(tmp_path / name / "generator/model.safetensors") for name in ("whole", "two"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@torch.no_grad()
def test_the_block_can_be_taken_off_again() -> None:
    model = learned(48, bit_vectors=False)
    shorter, vectors = without_counting(model.plain(), 48)
    assert model.positions is not None
    assert torch.allclose(vectors[:, SPARE:], model.positions.vectors[:, SPARE:], atol=2e-3)
    assert torch.allclose(vectors[:, :SPARE], model.positions.vectors[:, :SPARE], atol=0.05)
    for name, weight in model.llama.state_dict().items():
        found = shorter.state_dict()[name]
        kept = slice(SPARE if "embed" in name else 0, None)
        assert torch.equal(found[..., kept], weight[..., kept]), name


def test_further_training_goes_on_with_the_vectors(scripts: ScriptRunner, token_store: Path, tmp_path: Path) -> None:
    """With so much decay and dropout that flags which were trained would be lost."""
    train(scripts, token_store, tmp_path / "run", steps=60)
    sizes = ("num_layers", "num_heads", "hidden_size", "intermediate_size", "position_vectors")
    flags = [word for name, value in RUN.items() if name not in sizes for word in (f"--{name}", value)]
    done = scripts(
        "train_ar.py", "--tokens", token_store, "--output-dir", tmp_path / "more", "--init-from", tmp_path / "run",
        "--steps", 60, "--weight-decay", 0.5, "--dropout", 0.1, *flags,
    )  # fmt: skip
    assert done.code == 0, done.err
    llama, layout = load_generator(tmp_path / "more/generator")
    assert layout.first_block_counts
    assert llama.config.num_hidden_layers == 3
    assert llama.model.embed_tokens.weight[:, :SPARE].unique().tolist() == [0, 1024]
    state = load_file(tmp_path / "more/checkpoints/step-00000060/training.safetensors")
    _, vectors = without_counting(llama, 16)
    assert torch.allclose(vectors[:, SPARE:], state["ema.positions.vectors"][:, SPARE:], atol=2e-3)
    before, after = (
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["evaluation"]["nats"]
        for name in ("run", "more")
    )
    assert after < before + 0.2
    # a step that changes next to nothing leaves the vectors that were there
    flags[flags.index("--learning_rate") + 1] = 1e-6
    done = scripts(
        "train_ar.py", "--tokens", token_store, "--output-dir", tmp_path / "same", "--init-from", tmp_path / "run",
        "--steps", 1, *flags,
    )  # fmt: skip
    assert done.code == 0, done.err
    old, same = (without_counting(load_generator(tmp_path / name / "generator")[0], 16)[1] for name in ("run", "same"))
    assert torch.allclose(old[:, SPARE:], same[:, SPARE:], atol=2e-3)


def test_what_cannot_be_is_refused_before_anything_is_written(
    scripts: ScriptRunner, token_store: Path, tmp_path: Path
) -> None:
    assert "num_heads is 2" in train(scripts, token_store, tmp_path / "run", code=2, steps=2, num_heads=2)
    assert "leave them out" in train(scripts, token_store, tmp_path / "run", code=2, steps=2, init_from="somewhere")
    assert not (tmp_path / "run").exists()


def test_a_card_of_before_is_read(scripts: ScriptRunner, token_store: Path, tmp_path: Path) -> None:
    train(scripts, token_store, tmp_path / "run", steps=2, position_vectors="false")
    card = tmp_path / "run/generator/channeltok.json"
    content = json.loads(card.read_text())
    assert content.pop("first_block_counts") is False
    card.write_text(json.dumps(content))
    _, layout = load_generator(tmp_path / "run/generator")
    assert not layout.first_block_counts
