"""A run that overfits exports the weights of its lowest validation loss."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, Finished, ScriptRunner

from common.files import folder_written_whole
from generator.model import ChannelGPT
from generator.objective import GeneratorObjective
from generator.tokens import StoreHeader, TokenStore
from tokenizer import ChannelTokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer) -> TokenStore:
    """Random tokens for training and others for validation, which have nothing in common."""
    rng = np.random.default_rng(0)
    header = StoreHeader(
        tokenizer_fingerprint=tiny_tokenizer.token_fingerprint(), num_channels=16, num_bits=6, class_names=CLASS_NAMES,
        views="none", shard_size=32, split_files={"train": 32, "val": 32}, listings={"train": "a", "val": "b"},
    )  # fmt: skip
    store = TokenStore.create(tmp_path_factory.mktemp("random"), header)
    with folder_written_whole(store.tokenizer_folder) as temporary:
        tiny_tokenizer.save_pretrained(temporary)
    for split in ("train", "val"):
        store.write_shard(split, 0, torch.from_numpy(rng.integers(0, 64, (32, 1, 16))), torch.arange(32) % 5, [])
    return store


def train(scripts: ScriptRunner, store: TokenStore, folder: Path, *more: object) -> Finished:
    given = {
        "tokens": store.folder, "output_dir": folder, "steps": 40, "batch_size": 32, "warmup_steps": 0,
        "learning_rate": 0.02, "schedule": "constant", "ema_decay": 0.5, "mixed_precision": "no", "num_workers": 0,
        "evaluate_every": 5, "checkpoint_every": 20, "num_layers": 1, "num_heads": 2, "hidden_size": 32,
        "intermediate_size": 64, "label_dropout": 0, "prior_steps": 0,
    }  # fmt: skip
    return scripts("train_ar.py", *(word for name, value in given.items() for word in (f"--{name}", value)), *more)


@torch.no_grad()
def exported_nats(store: TokenStore, folder: Path) -> float:
    objective = GeneratorObjective(ChannelGPT.from_pretrained(folder / "generator"))
    tokens, labels = store.read_shard("val", 0)
    loss = objective(torch.from_numpy(labels), torch.from_numpy(tokens[:, 0].astype(np.int64)))
    return loss.nats.double().mean().item()


def validation(folder: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["evaluation"]["nats"] for entry in entries if "evaluation" in entry}


def test_the_lowest_validation_loss_is_exported(scripts: ScriptRunner, store: TokenStore, tmp_path: Path) -> None:
    best, last = tmp_path / "best", tmp_path / "last"
    # stopped and resumed after the lowest loss
    assert train(scripts, store, best, "--keep-best", "--steps", 20).code == 0
    done = train(scripts, store, best, "--keep-best", "--resume")
    assert done.code == 0, done.err
    assert train(scripts, store, last).code == 0
    found = validation(last)
    step = min(found, key=lambda step: found[step])
    assert step < 20
    assert found[40] > found[step] + 0.5  # it has overfitted
    assert validation(best) == found
    assert exported_nats(store, best) == pytest.approx(found[step], abs=1e-4)
    assert exported_nats(store, last) == pytest.approx(found[40], abs=1e-4)
