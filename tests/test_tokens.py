"""The token store's files."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_store import CLASSES, CODES, TRAIN_ROWS, VAL_ROWS, C, content, fill, header

from common.errors import InputError
from generator.token_data import TokenDataset
from generator.tokens import TokenStore


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return fill(TokenStore.create(tmp_path / "store", header()))


def refused(caught: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(store: TokenStore) -> None:
    opened = TokenStore.open(store.folder)
    assert opened.header == header()
    for split, rows in (("train", TRAIN_ROWS), ("val", VAL_ROWS)):
        assert opened.header.num_shards(split) == len(rows)
        for shard in range(len(rows)):
            tokens, labels = opened.read_shard(split, shard)
            expected_tokens, expected_labels = content(split, shard)
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


def test_tokens_of_any_memory_layout_are_stored_row_by_row(store: TokenStore) -> None:
    tokens, labels = content("train", 0)
    store.write_shard("train", 0, tokens.permute(2, 1, 0).contiguous().permute(2, 1, 0), labels, [])
    assert np.array_equal(store.read_shard("train", 0)[0], tokens)


def test_a_begun_store_is_continued_without_touching_what_is_there(tmp_path: Path) -> None:
    store = fill(TokenStore.create(tmp_path, header()), leave=(("train", 1), ("val", 0)))
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    again = TokenStore.create(tmp_path, header())
    missing = [(s, i) for s in ("train", "val") for i in range(header().num_shards(s)) if not again.has_shard(s, i)]
    assert missing == [("train", 1), ("val", 0)]
    for split, shard in missing:
        again.write_shard(split, shard, *content(split, shard), ["n/x.jpg: cut"] if split == "train" else [])
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


@pytest.mark.parametrize(
    "change", [{"version": 1}, {"version": 3}, {"views": "both"}, {"shard_size": 0}, {"num_bits": 17}, {"num_bits": 0}]
)
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
    with pytest.raises(InputError, match=f"{path.name} is missing or damaged") as caught:
        store.read_shard("train", 2)
    assert "train-00002.json" in refused(caught)
    store.read_shard("train", 1)
    dataset = TokenDataset(store, "train", None)
    dataset.__getitems__([(0, 0), (8, 0)])
    with pytest.raises(InputError, match=path.name):
        dataset.__getitems__([(8, 0), (10, 0)])


IMPOSSIBLE = [
    (CODES, 0, "codebook"),
    (-1, 0, "codebook"),
    (65536, 0, "codebook"),
    (0, CLASSES, "labels"),
    (0, -1, "labels"),
]


@pytest.mark.parametrize(("token", "label", "match"), IMPOSSIBLE)
def test_impossible_values_are_not_written(store: TokenStore, token: int, label: int, match: str) -> None:
    tokens, labels = content("val", 0)
    tokens[1, 0, 2], labels[2] = token, label
    with pytest.raises(InputError, match=match) as caught:
        store.write_shard("val", 0, tokens, labels, [])
    refused(caught)
    assert np.array_equal(store.read_shard("val", 0)[0], content("val", 0)[0])


def forge(store: TokenStore, name: str, array: np.ndarray) -> None:
    """Replace an array of the third shard of train, with a checksum that fits."""
    path = store.folder / "train-00002.json"
    np.save(store.folder / f"train-00002.{name}.npy", array)
    digest = hashlib.sha256((store.folder / f"train-00002.{name}.npy").read_bytes()).hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: digest}))


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("tokens", np.full((2, 2, C), CODES, np.uint16), "codebook"),
        ("tokens", np.zeros((2, 2, C), np.int64), "int64"),
        ("tokens", np.zeros((2, 2, C), ">u2"), ">u2"),
        ("tokens", np.zeros((2, 1, C), np.uint16), r"\(2, 1, 4\)"),
        ("tokens", np.zeros((2, C, 2), np.uint16), r"\(2, 4, 2\)"),
        ("tokens", np.zeros((2, 2, C), np.uint16, order="F"), "in place of"),
        ("labels", np.array([0, CLASSES]), "labels"),
        ("labels", np.array([0, -1]), "labels"),
        ("labels", np.zeros(2, np.int32), "int32"),
        ("labels", np.zeros(2), "float64"),
    ],
)
def test_impossible_arrays_are_not_read(store: TokenStore, name: str, array: np.ndarray, match: str) -> None:
    forge(store, name, array)
    with pytest.raises(InputError, match=match) as caught:
        TokenDataset(TokenStore.open(store.folder), "train", 0).__getitems__([(10, 0)])
    assert f"train-00002.{name}.npy" in refused(caught)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokenizer_fingerprint": "another"}, "tokenizer another"),
        ({"rows": 3}, "3 rows and 0 files left out"),
        ({"left_out": ["n/y.jpg: cut"]}, "covers 2 files"),
        ({"rows": "2"}, "is not a shard's"),
        ({"rows": 2.0}, "2.0 rows"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_shard_of_another_store_is_refused(store: TokenStore, change: dict[str, object], match: str) -> None:
    path = store.folder / "train-00002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=match) as caught:
        TokenStore.open(store.folder)
    assert "train-00002.json" in refused(caught)


@pytest.mark.parametrize("shape", [(3, 2, C), (3, 1, C + 1), (2, 1, C), (3, C)])
def test_a_shard_of_another_shape_is_refused(store: TokenStore, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shard"):
        store.write_shard("val", 0, torch.zeros(shape, dtype=torch.long), torch.zeros(3, dtype=torch.long), [])
