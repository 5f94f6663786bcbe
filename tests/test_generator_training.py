"""Training the generator: its loss, what it learns, its export, and runs that are killed and resumed (laws 7 and 8)."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, ScriptRunner
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import generator.progress
from common.errors import InputError
from common.randomness import generator_for
from common.steps import LoopConfig, StepPlan, StepSampler
from generator.config import GeneratorConfig, TokenLayout
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import load_generator, save_generator
from generator.objective import NextTokenNats
from generator.pipeline import ChannelTokPipeline
from generator.progress import draw_sheet
from generator.sampling import SamplingConfig
from generator.token_data import TokenDataset, whole_batch
from generator.tokens import TokenStore
from generator.training import GeneratorTrainingConfig, train_generator
from tokenizer import ChannelTokenizer

C, CODES = 16, 64
SIZE = GeneratorConfig(num_layers=2, num_heads=2, hidden_size=32, intermediate_size=64)


def settings(store: Path, output_dir: Path, **changes: object) -> GeneratorTrainingConfig:
    values = {
        "tokens": str(store),
        "output_dir": str(output_dir),
        "steps": 10,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "ema_decay": 0.9,
        "mixed_precision": "no",
        "num_workers": 0,
    }
    return GeneratorTrainingConfig(**(values | changes))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def trained(token_store: Path, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer) -> Path:
    """64 sequences learned by heart."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = settings(token_store, folder, steps=400, batch_size=64, label_dropout=0.05, checkpoint_every=400)
    size = dataclasses.replace(SIZE, hidden_size=64, intermediate_size=128)
    train_generator(run, size, lambda device: tiny_tokenizer.detokenize, "train_ar.py --tokens store")
    return folder


def test_a_small_set_is_learned_by_heart(trained: Path) -> None:
    evaluation = log_of(trained)[-1]["evaluation"]
    # 64 first tokens over 5 classes are even chances; what follows hangs on the first token alone
    assert evaluation["nats_by_position"][0] == pytest.approx(math.log(64 / 5), abs=0.4)
    assert max(evaluation["nats_by_position"][1:]) < 0.3
    assert evaluation["nats"] < 0.35 < evaluation["unigram_nats"]


def test_a_run_leaves_a_folder_to_draw_from(trained: Path, token_store: Path) -> None:
    pipeline = ChannelTokPipeline.from_pretrained(trained, "cpu")
    assert pipeline.layout.class_names == CLASS_NAMES
    assert pipeline.layout.has_null_label
    assert (trained / "checkpoints" / "step-00000400" / "training.safetensors").is_file()
    assert (trained / "samples" / "step-00000400.png").is_file()
    # what it draws is what it has learned, of the class that was asked for
    known = np.concatenate([np.load(path) for path in sorted(token_store.glob("train-*.tokens.npy"))])[:, 0]
    drawn = pipeline([2] * 12, seed=0, temperature=0.5).tokens
    of_class = {tuple(row) for row in known[2::5].tolist()}
    assert sum(tuple(row) in of_class for row in drawn.tolist()) >= 9


def test_exported_folder_is_a_plain_transformers_model(trained: Path) -> None:
    """Greedy generation by transformers, among the code rows, is our stream at temperature 0."""
    model = AutoModelForCausalLM.from_pretrained(trained / "generator").eval()
    assert type(model) is LlamaForCausalLM
    layout = ChannelTokPipeline.from_pretrained(trained, "cpu").layout
    labels = [0, 3, 5]
    rows = torch.tensor(labels)[:, None] + CODES
    whole = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=C,
        do_sample=False,
        suppress_tokens=list(range(CODES, layout.vocab_size)),
    )
    *_, last = stream(
        Engine(CachedDecoder.from_llama(model, layout)), labels, [0, 1, 2], C, SamplingConfig(temperature=0)
    )
    assert whole[:, 1:].tolist() == last.tokens.tolist()


def test_pictures_of_an_evaluation_show_each_class_once(
    tiny_generator: LlamaForCausalLM,
    tiny_layout: TokenLayout,
    tiny_tokenizer: ChannelTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captions: list[list[str]] = []
    real = generator.progress.captioned_table

    def spy(rows: Any, row_labels: list[str], column_labels: list[str]) -> Image.Image:
        captions[:] = [list(row_labels), list(column_labels)]
        return real(rows, row_labels, column_labels)

    monkeypatch.setattr(generator.progress, "captioned_table", spy)
    path = tmp_path / "samples" / "sheet.png"
    draw_sheet(tiny_generator, tiny_layout, tiny_tokenizer.detokenize, path)
    with Image.open(path) as picture:
        picture.verify()
    assert captions[0] == [name.split(",")[0][:20] for name in CLASS_NAMES]
    assert captions[1] == ["k=4", "k=16"]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_label_dropout_has_its_share(
    token_store: Path,
    tmp_path: Path,
    tiny_tokenizer: ChannelTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    shown: list[Tensor] = []
    evaluated: list[Tensor] = []
    real = NextTokenNats.forward

    def spy(model: NextTokenNats, labels: Tensor, tokens: Tensor) -> Tensor:
        (shown if torch.is_grad_enabled() else evaluated).append(labels)
        return real(model, labels, tokens)

    monkeypatch.setattr(NextTokenNats, "forward", spy)
    run = settings(token_store, tmp_path / "run", steps=40, batch_size=64, label_dropout=share)
    train_generator(run, SIZE, lambda device: tiny_tokenizer.detokenize, "")
    labels = torch.cat(shown)
    assert len(labels) == 2560
    # 4 sigma of 2560 draws at 0.3
    assert float((labels == 5).float().mean()) == pytest.approx(share, abs=0.037)
    assert len({tuple((batch == 5).tolist()) for batch in shown}) > (30 if share else 0)
    assert not (torch.cat(evaluated) == 5).any()
    assert json.loads((tmp_path / "run/generator/channeltok.json").read_text())["has_null_label"] is (share > 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"label_dropout": -0.1}, "label_dropout"),
        ({"label_dropout": math.nan}, "label_dropout"),
        ({"validation_images": 0}, "validation_images"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"beta2": 1.0}, "beta2"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        settings(Path("store"), Path("run"), **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_heads": 5}, "num_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_heads": 768}, "hidden_size"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_bad_sizes_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        GeneratorConfig(**change)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_logits_are_those_saved(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, tmp_path: Path, dtype: str
) -> None:
    """Law 8, first half: bit for bit."""
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    save_generator(tiny_generator, tiny_layout, tmp_path, dtype)
    loaded, layout = load_generator(tmp_path, torch_dtype)
    assert layout == tiny_layout
    assert loaded.dtype == torch_dtype
    assert tiny_generator.dtype == torch.float32  # saving leaves the model as it is
    model = copy.deepcopy(tiny_generator)
    for parameter in model.parameters():
        # weights alone: the rotary table stays float32, as in every model that transformers loads
        parameter.data = parameter.data.to(torch_dtype)
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, CODES, (3, C), generator=rng), torch.randint(0, 5, (3,), generator=rng)
    with torch.no_grad():
        rows = tiny_layout.inputs(labels, tokens)
        assert torch.equal(loaded(input_ids=rows).logits, model(input_ids=rows).logits)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_card_of_another_model_is_refused(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, tmp_path: Path
) -> None:
    save_generator(tiny_generator, tiny_layout, tmp_path)
    card = tmp_path / "channeltok.json"
    content = json.loads(card.read_text())
    for damaged in (
        json.dumps(content | {"class_names": CLASS_NAMES[:4]}),
        json.dumps(content | {"num_bits": 7}),
        json.dumps(content | {"colour": "red"}),
        json.dumps({"num_bits": 6}),
        "{",
    ):
        card.write_text(damaged)
        with pytest.raises(InputError, match=r"channeltok\.json") as caught:
            load_generator(tmp_path)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- order of the data


def order(
    rank: int, world_size: int, *, first_step: int = 0, length: int = 10, seed: int = 4, micro: int | None = None
) -> list[list[tuple[int, int]]]:
    config = LoopConfig(output_dir="unused", steps=9, batch_size=4, seed=seed, micro_batch_size=micro)
    plan = StepPlan(config, rank, world_size)
    sampler = StepSampler(length, plan, first_step)
    batches = list(sampler)
    parts = len(plan.parts(0))
    assert len(sampler) == len(batches) == (9 - first_step) * parts
    return [[entry for part in batches[i : i + parts] for entry in part] for i in range(0, len(batches), parts)]


@pytest.mark.parametrize(("length", "micro"), [(10, None), (10, 2), (7, 1), (3, None), (1, 2)])
def test_the_order_is_that_of_a_plain_loop(length: int, micro: int | None) -> None:
    stream: list[tuple[int, int]] = []
    for epoch in range(36):
        permuted = torch.randperm(length, generator=generator_for(4, 1, epoch)).tolist()
        stream += [(index, epoch) for index in permuted]
    found = order(1, 2, first_step=2, length=length, micro=micro)
    assert found == [stream[4 * step + 1 : 4 * step + 4 : 2] for step in range(2, 9)]
    assert {type(number) for step in found for entry in step for number in entry} == {int}


def test_micro_batches_are_the_steps_cut_up() -> None:
    assert order(0, 1, micro=1) == order(0, 1, micro=2) == order(0, 1)
    assert order(1, 2, micro=1) == order(1, 2)
    with pytest.raises(InputError, match="micro_batch_size 3"):
        order(0, 1, micro=3)


def test_what_is_random_about_a_row_hangs_on_its_place_in_the_step_alone() -> None:
    config = LoopConfig(output_dir="unused", steps=9, batch_size=12, seed=4)

    def drawn(step: int, world_size: int, micro: int | None) -> dict[int, float]:
        found = {}
        for rank in range(world_size):
            plan = StepPlan(dataclasses.replace(config, micro_batch_size=micro), rank, world_size)
            for part in plan.parts(step):
                values = torch.rand(part.batch_size, generator=part.rng())
                found |= {row: values[row].item() for row in part.rows}
        return found

    whole = drawn(3, 1, None)
    assert sorted(whole) == list(range(12))
    assert len(set(whole.values())) == 12
    for world_size, micro in ((1, 4), (1, 1), (2, None), (3, 2), (4, 1)):
        assert drawn(3, world_size, micro) == whole
    assert drawn(4, 1, None) != whole


def test_each_epoch_shows_every_image_once() -> None:
    flat = [entry for step in order(0, 1) for entry in step]
    for epoch in range(3):
        assert sorted(index for index, at in flat if at == epoch) == list(range(10))
    assert [at for _, at in flat] == sorted(at for _, at in flat)
    epochs = [[index for index, at in flat if at == epoch] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(0, 1, seed=5) != order(0, 1)
    assert order(0, 1) == order(0, 1)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("first_step", [0, 1, 4, 8])
def test_processes_share_what_one_would_see(world_size: int, first_step: int) -> None:
    """Law 8 and 4 for data: the steps do not know how many processes there are, nor where a run was resumed."""
    one = order(0, 1)[first_step:]
    ranks = [order(rank, world_size, first_step=first_step) for rank in range(world_size)]
    for step, expected in enumerate(one):
        shares = [rank[step] for rank in ranks]
        assert {len(share) for share in shares} == {4 // world_size}
        assert sorted(entry for share in shares for entry in share) == sorted(expected)


def test_going_on_within_an_epoch_neither_shuffles_anew_nor_shows_anything_twice(token_store: Path) -> None:
    """What accelerate's loaders got wrong (its issues 2016 and 3242): through a real loader, for several epochs."""
    dataset = TokenDataset(TokenStore.open(token_store), "train", 7)
    config = LoopConfig(output_dir="unused", steps=20, batch_size=12, seed=4)  # 64 sequences: epochs end within steps

    def seen(first_step: int, workers: int) -> list[list[int]]:
        sampler = StepSampler(len(dataset), StepPlan(config, 0, 1), first_step)
        torch.manual_seed(first_step)  # the state of a resumed process is another one
        loader: Any = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=whole_batch)
        return [batch.tokens[:, 0].tolist() for batch in loader]  # the first token tells sequences apart

    whole = seen(0, 0)
    for first_step, workers in ((1, 0), (3, 1), (6, 0), (11, 1)):
        assert seen(first_step, workers) == whole[first_step:]
    flat = [token for batch in whole for token in batch]
    epochs = [flat[i : i + 64] for i in range(0, len(flat) - 63, 64)]
    assert len(epochs) == 3
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_larger_than_the_set_goes_round(token_store: Path) -> None:
    flat = [entry for step in order(0, 1, length=3) for entry in step]
    assert sorted(flat[:6]) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size"):
        order(0, 3)


# ------------------------------------------------------------------------------------- killed and resumed

KILLED_BETWEEN = """
import os, signal, common.training
real = common.training.learning_rate_at
def rate(step, config):
    if step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, config)
common.training.learning_rate_at = rate
"""
KILLED_IN_CHECKPOINT = """
import os, signal, common.resuming
real = common.resuming.save_tensors
def save(path, tensors):
    real(path, tensors)
    if "step-00000016" in str(path):
        path.write_bytes(path.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
common.resuming.save_tensors = save
"""
KILLED_IN_EXPORT = """
import os, signal, transformers
real = transformers.LlamaForCausalLM.save_pretrained
calls = []
def save(self, folder, **kwargs):
    real(self, folder, **kwargs)
    calls.append(folder)
    if len(calls) == 2:
        weights = os.path.join(folder, "model.safetensors")
        open(weights, "r+b").truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
transformers.LlamaForCausalLM.save_pretrained = save
"""


def words(store: Path, output_dir: Path, *more: object) -> list[object]:
    given = {
        "tokens": store, "output_dir": output_dir, "steps": 24, "batch_size": 16, "warmup_steps": 4,
        "learning_rate": 0.01, "ema_decay": 0.9, "mixed_precision": "no", "num_workers": 0, "evaluate_every": 8,
        "checkpoint_every": 8, "attention_dropout": 0.1, "num_layers": 1, "num_heads": 2, "hidden_size": 32,
        "intermediate_size": 64,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", value)] + list(more)


@pytest.fixture(scope="module")
def unbroken(scripts: ScriptRunner, token_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("law8") / "unbroken"
    done = scripts("train_ar.py", *words(token_store, folder))
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def killed(scripts: ScriptRunner, token_store: Path, unbroken: Path) -> Path:
    """A run killed at step 13, after its checkpoint at 8. Tests resume a copy."""
    folder = unbroken.parent / "killed"
    assert scripts("train_ar.py", *words(token_store, folder), before=KILLED_BETWEEN).code == -9
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000008"]
    return folder


def same_run(found: Path, expected: Path) -> None:
    for name in ("generator/model.safetensors", "checkpoints/step-00000024/training.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert log_of(found) == log_of(expected)


def test_training_changes_the_weights_and_logs_it(unbroken: Path) -> None:
    """What the comparisons below compare is not trivially equal."""
    states = [load_file(unbroken / f"checkpoints/step-000000{step}/training.safetensors") for step in (16, 24)]
    assert not torch.equal(states[0]["model.llama.lm_head.weight"], states[1]["model.llama.lm_head.weight"])
    assert not torch.equal(states[1]["ema.llama.lm_head.weight"], states[1]["model.llama.lm_head.weight"])
    log = log_of(unbroken)
    assert [entry["step"] for entry in log] == sorted(entry["step"] for entry in log)
    assert [entry["step"] for entry in log if "evaluation" in entry] == [8, 16, 24]
    assert {20, 24} <= {entry["step"] for entry in log if "loss" in entry}
    exported = load_file(unbroken / "generator/model.safetensors")
    # the embedding and the head have their bits' vectors in them: tests/test_bit_vectors.py
    for name in exported.keys() - {"model.embed_tokens.weight", "lm_head.weight"}:
        assert torch.equal(exported[name], states[1][f"ema.llama.{name}"])


def test_killed_and_resumed_is_the_unbroken_run(
    scripts: ScriptRunner, token_store: Path, unbroken: Path, killed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    done = scripts("train_ar.py", *words(token_store, folder, "--resume", "true"))
    assert done.code == 0, done.err
    assert "resumed at step 8" in done.err
    same_run(folder, unbroken)


@pytest.mark.parametrize("before", [KILLED_IN_CHECKPOINT, KILLED_IN_EXPORT], ids=["checkpoint", "export"])
def test_killed_while_writing_and_resumed_is_the_unbroken_run(
    scripts: ScriptRunner, token_store: Path, unbroken: Path, tmp_path: Path, before: str
) -> None:
    folder = tmp_path / "run"
    assert scripts("train_ar.py", *words(token_store, folder), before=before).code == -9
    # what was exported before is still whole
    load_generator(folder / "generator")
    done = scripts("train_ar.py", *words(token_store, folder, "--resume", "true"))
    assert done.code == 0, done.err
    same_run(folder, unbroken)


def test_a_half_written_log_line_does_not_stop_a_resume(
    scripts: ScriptRunner, token_store: Path, unbroken: Path, killed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "learning_ra')
    done = scripts("train_ar.py", *words(token_store, folder, "--resume", "true"))
    assert done.code == 0, done.err
    same_run(folder, unbroken)


def test_resuming_otherwise_is_refused(
    scripts: ScriptRunner, token_store: Path, unbroken: Path, killed: Path, tmp_path: Path
) -> None:
    cases = [
        ([killed], "--resume"),
        ([killed, "--resume", "true", "--weight_decay", "0.02"], "weight_decay"),
        ([killed, "--resume", "true", "--hidden_size", "64"], "size"),
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
