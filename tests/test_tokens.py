"""The token store and the data set that reads it."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from generator.progress import Baselines
from generator.tokens import StoreHeader, TokenDataset, TokenStore, collate_tokens

C, CODES, CLASSES = 4, 8, 3
TRAIN_ROWS, VAL_ROWS = [5, 4, 2], [3]  # files 5 + 5 + 2, one of the second shard could not be read


def header(**changes: object) -> StoreHeader:
    values = {
        "tokenizer_fingerprint": "0123456789abcdef",
        "num_channels": C,
        "num_bits": 3,
        "class_names": ["a", "b", "c"],
        "views": "flip",
        "shard_size": 5,
        "split_files": {"train": 12, "val": 3},
        "listings": {"train": "x", "val": "y"},
    }
    return StoreHeader(**(values | changes))


def content(split: str, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, 2, C) and labels (rows,) of a shard."""
    rows = {"train": TRAIN_ROWS, "val": VAL_ROWS}[split][shard]
    rng = np.random.default_rng([len(split), shard])
    return torch.from_numpy(rng.integers(0, CODES, (rows, 2, C))), torch.from_numpy(rng.integers(0, CLASSES, rows))


def fill(store: TokenStore, leave: tuple[tuple[str, int], ...] = ()) -> TokenStore:
    for split, rows in (("train", TRAIN_ROWS), ("val", VAL_ROWS)):
        for shard in range(len(rows)):
            if (split, shard) not in leave:
                store.write_shard(split, shard, *content(split, shard), ["n/x.jpg: cut"] if rows[shard] == 4 else [])
    return store


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return fill(TokenStore.create(tmp_path / "store", header()))


def refused(caught: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------- files


def test_what_is_written_is_read(store: TokenStore) -> None:
    opened = TokenStore.open(store.folder)
    assert opened.header == header()
    for split, rows in (("train", TRAIN_ROWS), ("val", VAL_ROWS)):
        assert opened.header.num_shards(split) == len(rows)
        for shard in range(len(rows)):
            tokens, labels = opened.read_shard(split, shard)
            expected_tokens, expected_labels = content(split, shard)
            assert isinstance(tokens, np.memmap)
            assert tokens.dtype == np.uint16
            assert tokens.tolist() == expected_tokens.tolist()
            assert labels.tolist() == expected_labels.tolist()
    assert json.loads((store.folder / "train-00001.json").read_text())["left_out"] == ["n/x.jpg: cut"]
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_tokens_of_sixteen_bits_fit(tmp_path: Path) -> None:
    wide = header(num_bits=16, views="none", split_files={"train": 1, "val": 1})
    store = TokenStore.create(tmp_path, wide)
    store.write_shard("train", 0, torch.tensor([[[0, 65535, 32768, 1]]]), torch.tensor([2]), [])
    assert store.read_shard("train", 0)[0].tolist() == [[[0, 65535, 32768, 1]]]


def test_a_begun_store_is_continued_without_touching_what_is_there(tmp_path: Path) -> None:
    store = fill(TokenStore.create(tmp_path, header()), leave=(("train", 1), ("val", 0)))
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    again = TokenStore.create(tmp_path, header())
    missing = [(s, i) for s in ("train", "val") for i in range(header().num_shards(s)) if not again.has_shard(s, i)]
    assert missing == [("train", 1), ("val", 0)]
    for split, shard in missing:
        again.write_shard(split, shard, *content(split, shard), [])
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert before.items() <= after.items()
    TokenStore.open(store.folder)


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    store = fill(TokenStore.create(tmp_path, header()), leave=(("train", 1),))
    # a run killed between the arrays and the record: the shard counts as missing
    (tmp_path / "train-00001.tokens.npy").write_bytes(b"half")
    assert not store.has_shard("train", 1)
    with pytest.raises(InputError, match="1 of 3 train shards") as caught:
        TokenStore.open(tmp_path)
    assert "extract_tokens.py" in refused(caught)


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_no_store_is_refused(tmp_path: Path, where: str) -> None:
    with pytest.raises(InputError, match=r"store\.json") as caught:
        TokenStore.open(tmp_path / where)
    refused(caught)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_fingerprint", "another"),
        ("num_channels", 8),
        ("num_bits", 4),
        ("class_names", ["a", "b", "d"]),
        ("views", "none"),
        ("shard_size", 6),
        ("split_files", {"train": 13, "val": 3}),
        ("listings", {"train": "x", "val": "z"}),
    ],
)
def test_other_settings_are_refused_by_name(store: TokenStore, name: str, value: object) -> None:
    with pytest.raises(InputError, match=name) as caught:
        TokenStore.create(store.folder, header(**{name: value}))
    refused(caught)
    assert TokenStore.peek(store.folder) == header()


@pytest.mark.parametrize("change", [{"version": 2}, {"views": "both"}, {"shard_size": 0}])
def test_impossible_headers_are_refused(store: TokenStore, change: dict[str, object]) -> None:
    path = store.folder / "store.json"
    path.write_text(json.dumps(dataclasses.asdict(header()) | change))
    with pytest.raises(InputError) as caught:
        TokenStore.open(store.folder)
    assert next(iter(change)) in refused(caught)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"num_bits": 3}', '{"unknown": 1}'])
def test_a_damaged_header_is_refused(store: TokenStore, text: str) -> None:
    (store.folder / "store.json").write_text(text)
    with pytest.raises(InputError, match=r"store\.json") as caught:
        TokenStore.open(store.folder)
    refused(caught)


@pytest.mark.parametrize("name", ["tokens", "labels"])
@pytest.mark.parametrize("damage", ["first byte", "last byte", "cut", "missing"])
def test_a_damaged_shard_is_refused(store: TokenStore, name: str, damage: str) -> None:
    path = store.folder / f"train-00002.{name}.npy"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[0 if damage == "first byte" else -1] ^= 1
        path.write_bytes(data[:-1] if damage == "cut" else data)
    with pytest.raises(InputError, match=path.name) as caught:
        store.read_shard("train", 2)
    assert "train-00002.json" in refused(caught)
    store.read_shard("train", 1)
    with pytest.raises(InputError, match=path.name):
        TokenDataset(store, "train", None)[10, 0]


@pytest.mark.parametrize(
    ("token", "label", "match"),
    [(CODES, 0, "codebook"), (-1, 0, "codebook"), (0, CLASSES, "labels"), (0, -1, "labels")],
)
def test_impossible_values_are_refused(store: TokenStore, token: int, label: int, match: str) -> None:
    tokens, labels = content("val", 0)
    tokens[1, 1, 2], labels[2] = token, label
    with pytest.raises(InputError, match=match) as caught:
        store.write_shard("val", 0, tokens, labels, [])
        store.read_shard("val", 0)
    refused(caught)


@pytest.mark.parametrize("shape", [(3, 1, C), (3, 2, C + 1), (2, 2, C), (3, C)])
def test_a_shard_of_another_shape_is_refused(store: TokenStore, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shard"):
        store.write_shard("val", 0, torch.zeros(shape, dtype=torch.long), torch.zeros(3, dtype=torch.long), [])


# ------------------------------------------------------------------------------------- the data set


def test_rows_are_found_across_shards(store: TokenStore) -> None:
    dataset = TokenDataset(store, "train", None)
    assert len(dataset) == sum(TRAIN_ROWS)
    tokens, labels = (torch.cat(part) for part in zip(*(content("train", i) for i in range(3)), strict=True))
    for i in range(len(dataset)):
        for epoch in (0, 1, 5):
            found, label = dataset[i, epoch]
            assert found.dtype == torch.int64
            assert found.tolist() == tokens[i, 0].tolist()
            assert label == int(labels[i])
    batch = collate_tokens([dataset[i, 0] for i in (10, 0, 3)])
    assert batch.tokens.tolist() == tokens[[10, 0, 3], 0].tolist()
    assert batch.labels.tolist() == labels[[10, 0, 3]].tolist()
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)


def views_shown(dataset: TokenDataset, store: TokenStore, epochs: range) -> list[list[int]]:
    tokens = torch.cat([content("train", i)[0] for i in range(3)])
    shown = []
    for epoch in epochs:
        drawn = [dataset[i, epoch][0] for i in range(len(dataset))]
        assert all(any(torch.equal(row, view) for view in tokens[i]) for i, row in enumerate(drawn))
        shown.append([int(torch.equal(row, tokens[i, 1])) for i, row in enumerate(drawn)])
    return shown


def test_views_are_a_function_of_seed_image_and_epoch(store: TokenStore) -> None:
    dataset = TokenDataset(store, "train", 7)
    shown = views_shown(dataset, store, range(40))
    assert views_shown(TokenDataset(store, "train", 7), store, range(40)) == shown
    # any order of reading, as after a resume
    assert views_shown(dataset, store, range(20, 40)) == shown[20:]
    assert views_shown(TokenDataset(store, "train", 8), store, range(40)) != shown
    assert len({tuple(epoch) for epoch in shown}) > 20
    # 440 draws of two even chances: 4 sigma is 42
    assert abs(sum(map(sum, shown)) - 220) < 42


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path, header(split_files={"train": 1, "val": 1}))
    nothing = torch.empty(0, 2, C, dtype=torch.long), torch.empty(0, dtype=torch.long)
    store.write_shard("val", 0, *nothing, ["n/x.jpg: cut"])
    with pytest.raises(InputError, match="val") as caught:
        TokenDataset(store, "val", None)
    refused(caught)


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
