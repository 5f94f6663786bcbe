"""Reading a token store for training."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ScriptRunner
from tiny_store import CODES, TRAIN_ROWS, C, content, everything, fill, header
from torch.utils.data import DataLoader

from generator import token_data
from generator.token_data import TokenDataset, whole_batch
from generator.tokens import TokenStore
from generator.training import unigram_nats


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return fill(TokenStore.create(tmp_path / "store", header()))


def test_rows_are_found_across_shards_with_few_open_files(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_data, "SHARDS_OPEN", 2)
    dataset = TokenDataset(store, "train", None)
    assert len(dataset) == sum(TRAIN_ROWS)
    tokens, labels = everything()
    handles = len(list(Path("/proc/self/fd").iterdir()))
    for rows in ([10, 0, 3], [3, 3], list(range(11)), [4, 5], [9]):
        batch = dataset.__getitems__([(row, epoch) for epoch, row in enumerate(rows)])
        assert batch.tokens.tolist() == [tokens[row, 0].tolist() for row in rows]
        assert batch.labels.tolist() == [int(labels[row]) for row in rows]
        assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert len(list(Path("/proc/self/fd").iterdir())) <= handles + 2


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_a_loader_gives_whole_batches(store: TokenStore, start: str | None) -> None:
    dataset = TokenDataset(store, "train", 7)
    keys = [[(row, epoch) for row in rows] for epoch, rows in enumerate(([10, 0, 3], [7, 8], [2, 2, 9]))]
    expected = [dataset.__getitems__(batch) for batch in keys]
    workers = {"num_workers": int(start is not None), "multiprocessing_context": start}
    loader = DataLoader(dataset, batch_sampler=keys, collate_fn=whole_batch, **workers)
    for batch, alone in zip(loader, expected, strict=True):
        assert torch.equal(batch.tokens, alone.tokens)
        assert torch.equal(batch.labels, alone.labels)
    assert len(copy.deepcopy(dataset)) == len(dataset)


@pytest.mark.parametrize("name", ["train-00001.tokens.npy", "val-00000.labels.npy"])
def test_nothing_is_trained_on_a_shard_with_a_flipped_bit(
    scripts: ScriptRunner, token_store: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(token_store, tmp_path / "store")
    data = bytearray((tmp_path / "store" / name).read_bytes())
    data[-8] ^= 1  # a token, or a label, that is possible, too
    (tmp_path / "store" / name).write_bytes(data)
    sizes = ("--num-layers", 1, "--num-heads", 2, "--hidden-size", 32, "--intermediate-size", 32, "--batch-size", 4)
    folders = ("--tokens", tmp_path / "store", "--output-dir", tmp_path / "run")
    done = scripts("train_ar.py", *folders, "--steps", 2, "--prior-steps", 2, *sizes)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert f"{name} is missing or damaged" in done.err
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


def test_views_are_a_function_of_seed_image_and_epoch(store: TokenStore) -> None:
    def shown(dataset: TokenDataset, epochs: range) -> list[list[int]]:
        found = []
        for epoch in epochs:
            drawn = dataset.__getitems__([(row, epoch) for row in range(len(dataset))]).tokens
            assert all(any(torch.equal(row, view) for view in tokens[i]) for i, row in enumerate(drawn))
            found.append([int(torch.equal(row, tokens[i, 1])) for i, row in enumerate(drawn)])
        return found

    tokens, dataset = everything()[0], TokenDataset(store, "train", 7)
    all_epochs = shown(dataset, range(40))
    assert shown(TokenDataset(store, "train", 7), range(40)) == all_epochs
    assert shown(dataset, range(20, 40)) == all_epochs[20:]  # as after a resume
    assert shown(TokenDataset(store, "train", 8), range(40)) != all_epochs
    # as drawn by earlier versions: runs that are resumed must see the same views
    assert all_epochs[:2] == [[0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1]]
    for row, epoch in ((3, 5), (10, 39), (0, 12)):  # in any batch
        batch = dataset.__getitems__([(0, 1), (row, epoch), (5, 2)])
        assert torch.equal(batch.tokens[1], tokens[row, all_epochs[epoch][row]])
    assert len({tuple(epoch) for epoch in all_epochs}) > 20
    # 440 draws of two even chances: 4 sigma is 42
    assert abs(sum(map(sum, all_epochs)) - 220) < 42


def test_counts_and_baselines_are_those_of_a_plain_loop(store: TokenStore) -> None:
    expected = [[0] * CODES for _ in range(C)]
    for shard in range(3):
        for views in content("train", shard)[0].tolist():
            for view in views:
                for position, token in enumerate(view):
                    expected[position][token] += 1
    train, val = TokenDataset(store, "train", 7).counts(), TokenDataset(store, "val", None).counts()
    assert train.tolist() == expected
    total, rows = [0.0] * C, content("val", 0)[0][:, 0].tolist()
    for view in rows:
        for position, token in enumerate(view):
            counts = [count + 1 for count in expected[position]]
            total[position] -= math.log(counts[token] / sum(counts))
    assert unigram_nats(train, val) == pytest.approx([nats / len(rows) for nats in total], rel=1e-12)
    # nothing seen: every token is as likely as any other
    assert unigram_nats(torch.zeros_like(train), val) == pytest.approx([math.log(CODES)] * C, rel=1e-12)
