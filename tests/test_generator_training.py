"""Training the generator: what it learns, its export, the order of data, and kills with resumes (laws 7 and 8)."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, ScriptRunner
from oracles.sampling import bits_of
from torch import Tensor

from common.bit_prior import BitPrior, fit_bit_prior
from common.config import InputError, LoopConfig
from common.randomness import generator_for
from generator.config import GeneratorConfig, GeneratorTrainingConfig
from generator.model import ChannelGPT
from generator.objective import GeneratorLoss, GeneratorObjective
from generator.pipeline import ChannelTokPipeline
from generator.tokens import TokenStore
from generator.training import GeneratorTrainer
from tokenizer import ChannelTokenizer
from training.schedule import Part, StepSampler, split_batch

C, BITS = 16, 6
SIZE = GeneratorConfig(num_layers=2, num_heads=2, hidden_size=32, intermediate_size=64)


def settings(store: Path, output_dir: Path, **changes: object) -> GeneratorTrainingConfig:
    values = {
        "tokens": str(store), "output_dir": str(output_dir), "steps": 10, "batch_size": 32, "learning_rate": 1e-2,
        "warmup_steps": 10, "weight_decay": 0.0, "ema_decay": 0.9, "mixed_precision": "no", "num_workers": 0,
        "prior_steps": 0,
    }  # fmt: skip
    return GeneratorTrainingConfig(**(values | changes))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(token_store: Path, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer) -> Path:
    """A run that memorizes 64 sequences."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = settings(token_store, folder, steps=150, batch_size=64, label_dropout=0.05, checkpoint_every=150)
    size = dataclasses.replace(SIZE, hidden_size=64, intermediate_size=128)
    GeneratorTrainer(run, size, lambda device: tiny_tokenizer.detokenize).run()
    return folder


def test_a_small_set_is_memorized(trained: Path) -> None:
    evaluation = log_of(trained)[-1]["evaluation"]
    # given the class, 16 or 8 first tokens are equally likely; the other tokens depend on the first
    expected = 0.75 * math.log(16) + 0.25 * math.log(8)
    assert evaluation["nats_by_position"][0] == pytest.approx(expected, abs=0.2)
    assert max(evaluation["nats_by_position"][1:]) < 0.3
    assert evaluation["nats"] < 0.35 < evaluation["unigram_nats"]


def test_a_run_writes_a_folder_to_draw_from(trained: Path, token_store: Path) -> None:
    pipeline = ChannelTokPipeline.from_pretrained(trained, "cpu")
    assert pipeline.config.class_names == CLASS_NAMES
    assert pipeline.config.has_null_label
    assert (trained / "checkpoints" / "step-00000150" / "training.safetensors").is_file()
    assert (trained / "samples" / "step-00000150.png").is_file()
    # it draws what it has memorized, of the requested class
    known = np.concatenate([np.load(path) for path in sorted(token_store.glob("train-*.tokens.npy"))])[:, 0]
    drawn = pipeline([2] * 12, seed=0, temperature=0.5).tokens
    of_class = {tuple(row) for row in known[32:48].tolist()}
    assert sum(tuple(row) in of_class for row in drawn.tolist()) >= 9


def test_the_prior_is_fitted_before_the_first_step_and_trained_at_its_own_rate(
    token_store: Path, tmp_path: Path, tiny_tokenizer: ChannelTokenizer
) -> None:
    """Fitted again here, on batches of a plain loop; then one step of AdamW moves it by its learning rate."""
    run = settings(
        token_store, tmp_path, steps=1, warmup_steps=0, prior_steps=20, prior_learning_rate=0.5, label_dropout=0.3
    )
    GeneratorTrainer(run, SIZE, lambda device: tiny_tokenizer.detokenize).run()
    shards = [TokenStore.open(token_store).read_shard("train", shard) for shard in (0, 1)]
    tokens, labels = (np.concatenate(parts) for parts in zip(*shards, strict=True))
    bits = torch.tensor([[bits_of(token, BITS) for token in row] for row in tokens[:, 0].tolist()])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(20):
            epochs = [
                torch.randperm(64, generator=generator_for(0, 1, epoch)) for epoch in range(8 * step, 8 * step + 8)
            ]
            rows = torch.cat(epochs)
            yield bits[rows], torch.from_numpy(labels.astype(np.int64))[rows]

    expected = BitPrior(C, BITS, 5)
    fit_bit_prior(expected, batches(), steps=20, label_dropout=0.3)
    found = ChannelGPT.from_pretrained(tmp_path / "generator").prior
    assert expected.weight.std() > 0.01
    assert all(parameter.grad is None for parameter in expected.parameters())  # of the last step, not to be added to
    for name, parameter in found.named_parameters():
        change = (parameter - expected.get_parameter(name)).abs().max().item()
        assert change == pytest.approx(0.005, rel=1e-3, abs=1e-6), name


def test_labels_are_dropped_in_training_only(
    token_store: Path, tmp_path: Path, tiny_tokenizer: ChannelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, Tensor]] = []
    real = GeneratorObjective.forward

    def spy(model: GeneratorObjective, labels: Tensor, tokens: Tensor) -> GeneratorLoss:
        calls.append((torch.is_grad_enabled(), labels))
        return real(model, labels, tokens)

    monkeypatch.setattr(GeneratorObjective, "forward", spy)
    run = settings(token_store, tmp_path / "run", steps=40, batch_size=64, label_dropout=0.3)
    GeneratorTrainer(run, SIZE, lambda device: tiny_tokenizer.detokenize).run()
    batches = [labels for training, labels in calls if training]
    dropped = torch.cat(batches) == 5
    assert len(dropped) == 2560
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.037)  # 4 sigma
    assert len({tuple((batch == 5).tolist()) for batch in batches}) > 30
    evaluated = [labels for training, labels in calls if not training]
    assert evaluated
    assert not any((labels == 5).any() for labels in evaluated)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label_dropout": math.nan}, "label_dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"prior_l2_weight": math.inf}, "prior_l2_weight"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        settings(Path("store"), Path("run"), **change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"num_heads": 32}, "hidden_size"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"num_bits": 17}, "num_bits is 17"),
        ({"class_names": []}, "class_names is empty"),
    ],
)
def test_bad_sizes_are_refused(tiny_generator: ChannelGPT, change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        dataclasses.replace(tiny_generator.config, **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_are_those_saved(tiny_generator: ChannelGPT, tmp_path: Path, dtype: torch.dtype) -> None:
    """Law 8, first half: bit for bit."""
    tiny_generator.save_pretrained(tmp_path, dtype)
    assert tiny_generator.dtype == torch.float32  # saving does not change the model
    loaded = ChannelGPT.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.config == tiny_generator.config
    assert (loaded.dtype, loaded.training) == (dtype, False)
    assert loaded.state_dict().keys() == tiny_generator.state_dict().keys()
    for name, value in tiny_generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(dtype)), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    if dtype == torch.float32:
        rng = torch.Generator().manual_seed(0)
        bits, labels = torch.randn(3, C, BITS, generator=rng).sign(), torch.tensor([0, 5, 3])
        assert torch.equal(loaded(labels, bits), tiny_generator(labels, bits))


def order(
    rank: int, world_size: int, *, first_step: int = 0, length: int = 10, seed: int = 4, micro: int | None = None
) -> list[list[tuple[int, int]]]:
    config = LoopConfig(output_dir="unused", steps=9, batch_size=4, seed=seed, micro_batch_size=micro)
    rows = split_batch(config, rank, world_size)
    sampler = StepSampler(length, config, rows, first_step)
    batches = list(sampler)
    parts = len(rows)
    assert len(sampler) == len(batches) == (9 - first_step) * parts
    return [[entry for part in batches[i : i + parts] for entry in part] for i in range(0, len(batches), parts)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("length", "micro"), [(10, None), (7, 1), (3, None), (1, 1)])
@pytest.mark.parametrize("first_step", [0, 8])
def test_the_order_is_that_of_a_plain_loop(length: int, micro: int | None, world_size: int, first_step: int) -> None:
    """Laws 4 and 8 for data: it does not depend on processes, micro-batches, or where a run was resumed."""
    stream: list[tuple[int, int]] = []
    for epoch in range(36):
        permuted = torch.randperm(length, generator=generator_for(4, 1, epoch)).tolist()
        stream += [(index, epoch) for index in permuted]
    for rank in range(world_size):
        found = order(rank, world_size, first_step=first_step, length=length, micro=micro)
        assert found == [stream[4 * step + rank : 4 * step + 4 : world_size] for step in range(first_step, 9)]
        assert {type(number) for step in found for entry in step for number in entry} == {int}
    assert order(0, 1, seed=5) != order(0, 1)
    with pytest.raises(InputError, match="micro_batch_size 3"):
        order(0, 1, micro=3)
    with pytest.raises(InputError, match="batch_size 4 does not divide among 3"):
        order(0, 3)


def test_random_numbers_of_a_row_depend_on_its_place_in_the_step_only() -> None:
    config = LoopConfig(output_dir="unused", steps=9, batch_size=12, seed=4)

    def drawn(step: int, world_size: int, micro: int | None) -> dict[int, bool]:
        found = {}
        for rank in range(world_size):
            for rows in split_batch(dataclasses.replace(config, micro_batch_size=micro), rank, world_size):
                part = Part(seed=4, step=step, rows=rows, batch_size=12)
                found |= dict(zip(rows, part.drops(0.5).tolist(), strict=True))
        return found

    whole = drawn(3, 1, None)
    assert sorted(whole) == list(range(12))
    for world_size, micro in ((1, 4), (1, 1), (2, None), (3, 2), (4, 1)):
        assert drawn(3, world_size, micro) == whole
    assert drawn(4, 1, None) != whole


KILLED_WRITING = """
import os, signal, common.checkpoint
real = common.checkpoint.save_file
calls = []
def save(tensors, path, *arguments):
    real(tensors, path, *arguments)
    if "{name}" in str(path):
        calls.append(path)
    if len(calls) == 2:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
common.checkpoint.save_file = save
"""


def words(store: Path, output_dir: Path, *more: object) -> list[object]:
    given = {
        "tokens": store, "output_dir": output_dir, "steps": 24, "batch_size": 16, "warmup_steps": 4,
        "learning_rate": 0.01, "ema_decay": 0.9, "mixed_precision": "no", "num_workers": 0, "evaluate_every": 8,
        "checkpoint_every": 8, "attention_dropout": 0.1, "dropout": 0.1, "prior_steps": 3,
        "num_layers": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", value)] + list(more)


@pytest.fixture(scope="module")
def unbroken(scripts: ScriptRunner, token_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("law8") / "unbroken"
    done = scripts("train_ar.py", *words(token_store, folder))
    assert done.code == 0, done.err
    return folder


def same_run(found: Path, expected: Path) -> None:
    for name in ("generator/model.safetensors", "checkpoints/step-00000024/training.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert log_of(found) == log_of(expected)


@pytest.mark.parametrize("name", ["training.safetensors", "model.safetensors"])
def test_killed_while_writing_and_resumed_is_the_unbroken_run(
    scripts: ScriptRunner, token_store: Path, unbroken: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    before = KILLED_WRITING.format(name=name)
    assert scripts("train_ar.py", *words(token_store, folder), before=before).code == -9
    ChannelGPT.from_pretrained(folder / "generator")  # of the first evaluation, complete
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 17, "learning_ra')  # a line that the kill cut short
    done = scripts("train_ar.py", *words(token_store, folder, "--resume", "true"))
    assert done.code == 0, done.err
    same_run(folder, unbroken)


def test_resuming_with_other_settings_is_refused(
    scripts: ScriptRunner, token_store: Path, unbroken: Path, tmp_path: Path
) -> None:
    cases = [
        ([unbroken], "--resume"),
        ([unbroken, "--resume", "true", "--weight_decay", "0.02"], "weight_decay"),
        ([unbroken, "--resume", "true", "--hidden_size", "64"], "size"),
        ([tmp_path / "nothing", "--resume", "true"], "nothing to resume"),
    ]
    for (folder, *more), named in cases:
        before = sorted(path.name for path in Path(folder).rglob("*"))
        done = scripts("train_ar.py", *words(token_store, Path(folder), *more))
        lines = done.err.strip().splitlines()
        assert done.code == 2, done.err
        assert len(lines) == 1, done.err
        assert named in lines[0]
        assert sorted(path.name for path in Path(folder).rglob("*")) == before


def test_a_store_with_another_tokenizer_is_refused(
    scripts: ScriptRunner, token_store: Path, tiny_tokenizer: ChannelTokenizer, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(token_store, store)
    header = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(header | {"tokenizer_fingerprint": "f" * 16}))
    done = scripts("train_ar.py", *words(store, tmp_path / "run"))
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
