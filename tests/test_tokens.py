"""The token store's files."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_store import CLASSES, CODES, TRAIN_ROWS, VAL_ROWS, C, content, fill, header

from common.config import InputError
from generator.tokens import TokenStore, verify


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
            assert (tokens.dtype, labels.dtype) == (np.uint16, np.int64)
            assert tokens.tolist() == expected_tokens.tolist()
            assert labels.tolist() == expected_labels.tolist()
    assert opened.left_out() == ["n/x.jpg: cut"]
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_the_format_is_that_of_existing_stores(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path, header(num_bits=16, views="none", split_files={"train": 2, "val": 1}))
    tokens = torch.tensor([[[0, 65535, 32768, 1]], [[5, 6, 7, 8]]]).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    store.write_shard("train", 0, tokens, torch.tensor([2, 0]), [])
    data = (tmp_path / "train-00000.tokens.npy").read_bytes()
    assert (len(data), data[128:]) == (128 + 16, b"\0\0\xff\xff\0\x80\1\0\5\0\6\0\7\0\10\0")
    names = {"tokens": "train-00000.tokens.npy", "labels": "train-00000.labels.npy"}
    sums = {name: hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() for name, path in names.items()}
    expected = {"rows": 2, "left_out": [], "tokenizer_fingerprint": "0123456789abcdef", **sums}
    assert json.loads((tmp_path / "train-00000.json").read_text()) == expected
    assert json.loads((tmp_path / "store.json").read_text()) == dataclasses.asdict(store.header)
    assert store.header.version == 2


def test_an_incomplete_store_is_refused_and_continued_without_touching_what_is_there(tmp_path: Path) -> None:
    fill(TokenStore.create(tmp_path, header()), leave=(("train", 1), ("val", 0)))
    # a process killed between the arrays and the record: the shard counts as missing
    (tmp_path / "train-00001.tokens.npy").write_bytes(b"half")
    with pytest.raises(InputError, match="2 of 4 shards are missing") as caught:
        TokenStore.open(tmp_path)
    assert "extract_tokens.py" in refused(caught)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.glob("*.json")}
    (tmp_path / ".train-00001.tokens.npy.1.partial").write_bytes(b"left by a kill while writing")
    again = TokenStore.create(tmp_path, header())
    missing = [(split, shard) for split, shard in header().shards() if not again.has_shard(split, shard)]
    assert missing == [("train", 1), ("val", 0)]
    for split, shard in missing:
        again.write_shard(split, shard, *content(split, shard), ["n/x.jpg: cut"] if split == "train" else [])
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert before.items() <= after.items()
    assert not [name for name in after if name.startswith(".")]
    TokenStore.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer_fingerprint": "another"}, {"num_channels": 8}, {"num_bits": 4}, {"class_names": ["a", "b", "d"]},
     {"views": "none"}, {"shard_size": 6}, {"split_files": {"train": 13, "val": 3}}, {"listings": {"train": "x"}}],
)  # fmt: skip
def test_other_settings_are_refused_by_name(store: TokenStore, change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(change))) as caught:
        TokenStore.create(store.folder, header(**change))
    refused(caught)
    assert TokenStore.peek(store.folder) == header()


def test_impossible_and_damaged_headers_are_refused(store: TokenStore) -> None:
    path, good = store.folder / "store.json", dataclasses.asdict(header())
    changes = ({"version": 1}, {"version": 3}, {"views": "both"}, {"shard_size": 0}, {"num_bits": 17}, {"num_bits": 0})
    cases = [(json.dumps(good | change), next(iter(change))) for change in changes]
    cases += [(text, "store.json") for text in ("", "{", "[]", '{"num_bits": 3}', '{"unknown": 1}')]
    for text, named in cases:
        path.write_text(text)
        with pytest.raises(InputError, match=named) as caught:
            TokenStore.open(store.folder)
        refused(caught)
    with pytest.raises(InputError, match=r"store\.json is missing"):
        TokenStore.open(store.folder / "nowhere")


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
    assert "remove train-00002.json" in refused(caught)
    content, problems = verify(store)
    assert content[0].startswith("train: 9 images")  # of the other shards
    assert problems == [str(caught.value)]


@pytest.mark.parametrize(
    ("token", "label", "match"),
    [(CODES, 0, "tokens"), (-1, 0, "tokens"), (65536, 0, "tokens"), (0, CLASSES, "labels"), (0, -1, "labels")],
)
def test_impossible_values_and_shapes_are_not_written(store: TokenStore, token: int, label: int, match: str) -> None:
    tokens, labels = content("val", 0)
    tokens[1, 0, 2], labels[2] = token, label
    with pytest.raises(InputError, match=f"{match} that lie outside") as caught:
        store.write_shard("val", 0, tokens, labels, [])
    refused(caught)
    for shape in ((3, 2, C), (3, 1, C + 1), (2, 1, C), (3, C)):
        with pytest.raises(InputError, match="shape"):
            store.write_shard("val", 0, torch.zeros(shape, dtype=torch.long), torch.zeros(3, dtype=torch.long), [])
    assert np.array_equal(store.read_shard("val", 0)[0], content("val", 0)[0])


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("tokens", np.full((2, 2, C), CODES, np.uint16), "outside of 0 to 7"),
        ("tokens", np.zeros((2, 2, C), np.int64), "int64"),
        ("tokens", np.zeros((2, 1, C), np.uint16), r"\(2, 1, 4\)"),
        ("labels", np.array([0, -1]), "outside of 0 to 2"),
        ("labels", np.zeros(2, np.int32), "int32"),
    ],
)
def test_impossible_arrays_with_a_right_checksum_are_not_read(
    store: TokenStore, name: str, array: np.ndarray, match: str
) -> None:
    path, file = store.folder / "train-00002.json", store.folder / f"train-00002.{name}.npy"
    np.save(file, array)
    changed = {name: hashlib.sha256(file.read_bytes()).hexdigest()}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(InputError, match=match) as caught:
        TokenStore.open(store.folder).read_shard("train", 2)
    assert file.name in refused(caught)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokenizer_fingerprint": "another"}, "tokenizer another"),
        ({"rows": 3}, "3 rows and 0 files left out"),
        ({"left_out": ["n/y.jpg: cut"]}, "covers 2 files"),
        ({"rows": "2"}, "rows is '2'; it must be of type int"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_shard_of_another_store_is_refused(store: TokenStore, change: dict[str, object], match: str) -> None:
    path = store.folder / "train-00002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=match) as caught:
        TokenStore.open(store.folder)
    assert "train-00002.json" in refused(caught)
