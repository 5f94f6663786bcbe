"""Reading a token store for training."""

import copy
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ScriptRunner
from tiny_store import CODES, TRAIN_ROWS, C, content, everything, fill, header
from torch.utils.data import DataLoader

from common.errors import InputError
from generator import token_data
from generator.progress import Baselines
from generator.token_data import TokenDataset, whole_batch
from generator.tokens import TokenStore


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return fill(TokenStore.create(tmp_path / "store", header()))


def test_rows_are_found_across_shards(store: TokenStore) -> None:
    dataset = TokenDataset(store, "train", None)
    assert len(dataset) == sum(TRAIN_ROWS)
    tokens, labels = everything()
    for rows in ([10, 0, 3], [3, 3], list(range(11)), [4, 5], [9]):
        batch = dataset.__getitems__([(row, epoch) for epoch, row in enumerate(rows)])
        assert batch.tokens.tolist() == [tokens[row, 0].tolist() for row in rows]
        assert batch.labels.tolist() == [int(labels[row]) for row in rows]
        assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_whole_batches(store: TokenStore, workers: int) -> None:
    tokens, labels = everything()
    dataset = TokenDataset(store, "train", 7)
    keys = [[(row, epoch) for row in rows] for epoch, rows in enumerate(([10, 0, 3], [7, 8], [2, 2, 9]))]
    expected = [dataset.__getitems__(batch) for batch in keys]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=whole_batch)
    for batch, plain, rows in zip(loader, expected, keys, strict=True):
        assert torch.equal(batch.tokens, plain.tokens)
        assert batch.labels.tolist() == [int(labels[row]) for row, _ in rows]
        for (row, _), found in zip(rows, batch.tokens, strict=True):
            assert found.tolist() in tokens[row].tolist()


def test_a_worker_does_not_change_the_file_position_of_another_process(store: TokenStore) -> None:
    dataset = TokenDataset(store, "train", None)
    dataset.__getitems__([(0, 0)])
    place = dataset._files[0][0].tell()
    assert place == 128 + 2 * C
    loader = DataLoader(dataset, batch_sampler=[[(4, 0)]], num_workers=1, collate_fn=whole_batch)
    assert [batch.tokens.tolist() for batch in loader] == [everything()[0][4:5, 0].tolist()]
    assert dataset._files[0][0].tell() == place


def test_files_that_are_open_are_bounded(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_data, "SHARDS_OPEN", 2)
    dataset, tokens = TokenDataset(store, "train", None), everything()[0]
    handles = len(list(Path("/proc/self/fd").iterdir()))
    for row in (0, 6, 10, 1, 9, 5) * 3:
        assert dataset.__getitems__([(row, 0), (10 - row, 0)]).tokens.tolist() == tokens[[row, 10 - row], 0].tolist()
        assert len(list(Path("/proc/self/fd").iterdir())) <= handles + 2


def test_a_shard_is_read_whole_once(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    real = TokenStore.problems

    def spy(self: TokenStore, split: str, shard: int) -> list[str]:
        checked.append(shard)
        return real(self, split, shard)

    monkeypatch.setattr(TokenStore, "problems", spy)
    dataset = TokenDataset(store, "train", 1)
    dataset.__getitems__([(10, 0), (9, 0)])
    assert checked == [2]
    for _ in range(3):
        dataset.__getitems__([(row, 1) for row in range(11)])
    copy.deepcopy(dataset).__getitems__([(0, 0)])  # as in a worker that is not forked
    dataset.counts()
    assert sorted(checked) == [0, 1, 2]


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


def test_a_file_cut_while_it_is_read_is_reported(store: TokenStore) -> None:
    dataset = TokenDataset(store, "train", None)
    dataset.__getitems__([(0, 0)])
    os.truncate(store.folder / "train-00000.tokens.npy", 128 + 2 * C)
    dataset.__getitems__([(0, 0)])
    with pytest.raises(InputError, match=r"train-00000\.tokens\.npy was cut short"):
        dataset.__getitems__([(0, 0), (1, 0)])


def views_shown(dataset: TokenDataset, epochs: range) -> list[list[int]]:
    tokens = everything()[0]
    shown = []
    for epoch in epochs:
        drawn = dataset.__getitems__([(row, epoch) for row in range(len(dataset))]).tokens
        assert all(any(torch.equal(row, view) for view in tokens[i]) for i, row in enumerate(drawn))
        shown.append([int(torch.equal(row, tokens[i, 1])) for i, row in enumerate(drawn)])
    return shown


def test_views_are_a_function_of_seed_image_and_epoch(store: TokenStore) -> None:
    dataset = TokenDataset(store, "train", 7)
    shown = views_shown(dataset, range(40))
    assert views_shown(TokenDataset(store, "train", 7), range(40)) == shown
    # any order of reading, as after a resume
    assert views_shown(dataset, range(20, 40)) == shown[20:]
    assert views_shown(TokenDataset(store, "train", 8), range(40)) != shown
    # and in any batch: epochs may be mixed, and rows be read one at a time
    for row, epoch in ((3, 5), (10, 39), (0, 12)):
        batch = dataset.__getitems__([(0, 1), (row, epoch), (5, 2)])
        assert torch.equal(batch.tokens[1], everything()[0][row, shown[epoch][row]])
    assert len({tuple(epoch) for epoch in shown}) > 20
    # 440 draws of two even chances: 4 sigma is 42
    assert abs(sum(map(sum, shown)) - 220) < 42


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path, header(split_files={"train": 1, "val": 1}))
    nothing = torch.empty(0, 1, C, dtype=torch.long), torch.empty(0, dtype=torch.long)
    store.write_shard("val", 0, *nothing, ["n/x.jpg: cut"])
    with pytest.raises(InputError, match="no val tokens"):
        TokenDataset(store, "val", None)


def test_counts_are_those_of_a_plain_loop(store: TokenStore) -> None:
    expected = [[0] * CODES for _ in range(C)]
    for shard in range(3):
        for views in content("train", shard)[0].tolist():
            for view in views:
                for position, token in enumerate(view):
                    expected[position][token] += 1
    found = TokenDataset(store, "train", 7).counts()
    assert found.tolist() == expected
    assert int(found.sum()) == 2 * sum(TRAIN_ROWS) * C


def test_baselines_are_those_of_a_plain_loop(store: TokenStore) -> None:
    train, val = TokenDataset(store, "train", 0).counts(), TokenDataset(store, "val", None).counts()
    total, tokens = [0.0] * C, 0
    for views in content("val", 0)[0].tolist():
        for view in views:
            tokens += 1
            for position, token in enumerate(view):
                row = [count + 1 for count in train[position].tolist()]
                total[position] -= math.log(row[token] / sum(row))
    found = Baselines.of(train, val)
    assert found.unigram == pytest.approx([nats / tokens for nats in total], rel=1e-12)
    assert found.uniform == pytest.approx(math.log(CODES), rel=1e-12)
    # nothing seen: every token is as likely as any other
    nothing = Baselines.of(torch.zeros_like(train), val)
    assert nothing.unigram == pytest.approx([math.log(CODES)] * C, rel=1e-12)
