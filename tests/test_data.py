"""Image sources (folders, parquet files, tars) and the batches that are made of them."""

import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tarfile
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import extract_tokens
from common.config import InputError
from common.images import Crop, load_image, to_float
from common.randomness import generator_for
from generator.tokens import TokenStore
from tokenizer.data import ImageDataset, UnreadableFiles, collate
from tokenizer.settings import AugmentationConfig, DataConfig, ExtractionConfig
from tokenizer.sources import FolderSource, open_source

NAMES = ["hen", "tench"]


def encoded(number):
    """A PNG of one colour, given by its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 24), (number * 10, 255 - number * 10, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(start, count):
    """Contents by row; row 3 of a split is no image."""
    return [b"no image" if i == 3 else encoded(start + i) for i in range(count)]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Two classes; 24 files to train on, of which train/hen/02.jpg is cut short, and 6 held out."""
    folder = tmp_path_factory.mktemp("folder") / "copy"
    shutil.copytree(data, folder)
    cut = folder / "train" / "hen" / "02.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The library `datasets`, offline and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield datasets
    patch.undo()


def write_parquet(hub, path, columns, **features):
    """A parquet file of columns; "image" holds contents, its type is Image."""
    if "image" in columns:
        columns = {**columns, "image": [{"bytes": content, "path": None} for content in columns["image"]]}
        features = {"image": hub.Image(), **features}
    hub.Dataset.from_dict(columns, features=hub.Features(features)).to_parquet(path)


@pytest.fixture(scope="module")
def parquet(hub, tmp_path_factory):
    """12 rows to train on and 4 held out, with class names."""
    folder = tmp_path_factory.mktemp("parquet")
    for split, start, count in (("train", 0, 12), ("validation", 12, 4)):
        columns = {"image": rows(start, count), "label": [i % 2 for i in range(count)]}
        write_parquet(hub, folder / f"{split}.parquet", columns, label=hub.ClassLabel(names=NAMES))
    return folder


def write_tar(path, contents, labels, start=0):
    with tarfile.open(path, "w") as tar:
        for i, (content, label) in enumerate(zip(contents, labels, strict=True), start):
            for name, member in ((f"{i:03d}.jpg", content), (f"{i:03d}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))


@pytest.fixture(scope="module")
def tars(hub, tmp_path_factory):
    """The same in two tars for training, one held out; classes are integers, the highest one held out only."""
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "train-000.tar", rows(0, 12)[:7], [0, 1, 2, 0, 1, 2, 0])
    write_tar(folder / "train-001.tar", rows(0, 12)[7:], [1, 2, 0, 1, 2], start=7)
    write_tar(folder / "validation-000.tar", rows(12, 4), [0, 0, 0, 4])
    return folder


def refusal(split="train", **settings):
    with pytest.raises(InputError) as caught:
        open_source(DataConfig(**settings), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def given(source):
    """Everything that a source gives, by index."""
    return [(source.read(i), source.classes[source.labels[i]]) for i in range(len(source))]


# settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "neither"), ({"data_dir": "a", "dataset": "b"}, "both"),
     ({"data_dir": "a", "image_column": "b"}, "image_column"), ({"data_dir": "a", "val_split": "test"}, "val_split")],
)  # fmt: skip
def test_exactly_one_kind_of_data_is_given(settings, named):
    with pytest.raises(InputError, match=named) as caught:
        DataConfig(**settings)
    assert "--data" in str(caught.value)


# sources


def test_a_folder_gives_its_files_in_order_with_their_classes(folder, tmp_path):
    source = open_source(DataConfig(data_dir=str(folder)), "train")
    files = sorted((folder / "train").rglob("*.*"))
    assert (len(source), source.name, source.classes) == (24, str(folder / "train"), NAMES)
    assert given(source) == [(path, path.parent.name) for path in files]
    assert [source.image_name(i) for i in range(24)] == [str(path) for path in files]
    (tmp_path / "train" / "hen").mkdir(parents=True)
    assert "at least one image" in refusal(data_dir=str(tmp_path))
    assert "val is missing" in refusal("val", data_dir=str(tmp_path))


def test_the_fingerprint_of_a_folder_is_that_of_existing_stores(folder, tmp_path):
    for name, content in (("a/1.png", b"12345"), ("b/2.jpg", b"1")):
        (tmp_path / "new" / name).parent.mkdir(parents=True)
        (tmp_path / "new" / name).write_bytes(content)
    # sha256 of "1.png 5 0;2.jpg 1 1;"
    assert FolderSource(tmp_path / "new").fingerprint() == "071bb7804de0abb3"
    shutil.copytree(folder, tmp_path / "copy")
    assert FolderSource(tmp_path / "copy" / "train").fingerprint() == FolderSource(folder / "train").fingerprint()


def test_a_broken_link_and_a_name_that_is_no_text_are_unreadable(tmp_path):
    (tmp_path / "hen").mkdir()
    (tmp_path / "hen" / "0.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "hen" / os.fsdecode(b"1\xff.jpg")).write_bytes(b"no image")
    (tmp_path / "hen" / "2.jpg").write_bytes(encoded(2))
    source = FolderSource(tmp_path)
    assert len(source.fingerprint()) == 16
    dataset = ImageDataset(source, 16)
    batch = collate([dataset[i, 0] for i in range(len(source))])
    assert len(batch.images) == 1
    assert list(batch.unreadable) == [str(tmp_path / "hen" / "0.jpg"), str(tmp_path / "hen" / "1\\udcff.jpg")]
    json.dumps(batch.unreadable, ensure_ascii=False).encode()


def test_parquet_files_and_tars_give_their_rows_with_their_classes(parquet, tars, folder):
    sources = {(kind, split): open_source(DataConfig(dataset=str(kind)), split)
               for kind in (parquet, tars) for split in ("train", "val")}  # fmt: skip
    names = [NAMES[i % 2] for i in range(12)]
    assert given(sources[parquet, "train"]) == list(zip(rows(0, 12), names, strict=True))
    assert given(sources[parquet, "val"]) == list(zip(rows(12, 4), names[:4], strict=True))
    assert given(sources[tars, "train"]) == list(zip(rows(0, 12), "012" * 4, strict=True))
    assert given(sources[tars, "val"]) == list(zip(rows(12, 4), "0004", strict=True))
    assert sources[tars, "train"].classes == sources[tars, "val"].classes == ["0", "1", "2", "3", "4"]
    assert sources[parquet, "val"].image_name(3) == f"{parquet}/validation row 3"
    # the digest that existing stores hold: column, number and classes; labels; sizes
    digest = hashlib.sha256(repr(("image", 12, NAMES)).encode())
    digest.update(np.array([[i % 2 for i in range(12)], [len(content) for content in rows(0, 12)]]).tobytes())
    assert sources[parquet, "train"].fingerprint() == digest.hexdigest()[:16]
    assert len({source.fingerprint() for source in sources.values()}) == 4
    # a folder that `datasets` opens gives paths
    opened = open_source(DataConfig(dataset=str(folder)), "train")
    assert sorted(given(opened)) == given(open_source(DataConfig(data_dir=str(folder)), "train"))
    assert len(opened.fingerprint()) == 16


def test_a_split_may_be_a_part_and_a_configuration_be_chosen(hub, parquet, tmp_path):
    config = DataConfig(dataset=str(parquet), train_split="train[:10]", val_split="train[10:]")
    train, val = open_source(config, "train"), open_source(config, "val")
    assert len(train) == 10
    assert given(val) == list(zip(rows(0, 12)[10:], NAMES, strict=True))
    for name, number in (("small", 0), ("large", 5)):
        (tmp_path / name).mkdir()
        write_parquet(hub, tmp_path / name / "train.parquet", {"image": [encoded(number)]})
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    assert "large" in refusal(dataset=str(tmp_path))  # the message names the choices
    source = open_source(DataConfig(dataset=str(tmp_path), dataset_config="large"), "train")
    assert given(source) == [(encoded(5), "image")]  # without labels all is one class


def test_columns_may_be_named_and_hold_bytes(hub, tmp_path):
    contents = [encoded(i) for i in range(3)]
    columns = {"image": contents[::-1], "other": [{"bytes": c, "path": None} for c in contents], "raw": contents}
    types = {"other": hub.Image(), "raw": hub.Value("binary"), "text": hub.Value("string"), "kind": hub.Value("uint8")}
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.parquet"
        write_parquet(hub, path, {**columns, "text": ["a"] * 3, "kind": [2, 0, 1]}, **types)
    message = refusal(dataset=str(tmp_path))
    assert "one column of type Image" in message and all(column in message for column in types)
    for column, expected in (("image", contents[::-1]), ("other", contents), ("raw", contents)):
        config = DataConfig(dataset=str(tmp_path), image_column=column, label_column="kind")
        assert given(open_source(config, "train")) == list(zip(expected, "201", strict=True))
    for wrong in ("kind", "nothing"):
        assert repr(wrong) in refusal(dataset=str(tmp_path), image_column=wrong)
    for wrong in ("raw", "text", "nothing"):
        assert repr(wrong) in refusal(dataset=str(tmp_path), image_column="raw", label_column=wrong)


def test_missing_images_are_unreadable_and_missing_classes_are_refused(hub, tmp_path):
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": encoded(1), "path": "1.png"}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": "2"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "train.parquet")
    assert "one column of type Image" in refusal(dataset=str(tmp_path))
    source = open_source(DataConfig(dataset=str(tmp_path), image_column="image"), "train")
    assert [source.read(i) for i in range(4)] == [encoded(1), b"", b"", b""]
    assert len(source.fingerprint()) == 16
    dataset = ImageDataset(source, 16)
    batch = collate([dataset[i, 0] for i in range(4)])
    assert list(batch.unreadable) == [f"{tmp_path}/train row {i}" for i in (1, 2, 3)]
    for label in (-1, None):
        columns = {"image": [encoded(0)] * 2, "label": [0, label]}
        write_parquet(hub, tmp_path / "train.parquet", columns, label=hub.ClassLabel(names=NAMES))
        message = refusal(dataset=str(tmp_path))
        assert "row 1" in message and "0..1" in message


def test_data_that_cannot_be_loaded_is_one_line(hub, parquet, tars, folder, tmp_path, monkeypatch):
    assert "nobody/nothing" in refusal(dataset="nobody/nothing")
    message = refusal("val", dataset=str(parquet), val_split="test")
    assert "split test" in message and "validation" in message
    # integers as classes need both splits, whichever is opened
    assert "split test" in refusal(dataset=str(tars), val_split="test")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    assert str(tmp_path) in refusal(dataset=str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "channeltok[train]" in refusal(dataset="a/b")
    assert len(open_source(DataConfig(data_dir=str(folder)), "val")) == 6


# images by index and epoch


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_worker_processes_return_the_same_batches(kind, request):
    place = str(request.getfixturevalue(kind))
    source = open_source(DataConfig(data_dir=place) if kind == "folder" else DataConfig(dataset=place), "train")

    def dataset():
        return ImageDataset(source, 16, AugmentationConfig(min_crop=0.5), seed=1, replace_unreadable=True)

    keys = [[(i % len(source), epoch) for i in range(at, at + 5)] for epoch in (0, 1) for at in range(0, 12, 5)]
    alone, names = dataset(), set()
    for found, batch in zip(
        DataLoader(dataset(), batch_sampler=keys, num_workers=1, collate_fn=collate), keys, strict=True
    ):
        expected = collate([alone[key] for key in batch])
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
        assert found.unreadable == expected.unreadable
        names |= found.unreadable.keys()
    assert len(names) == 1
    ForkingPickler.dumps(dataset())  # where processes are not forked, they are sent the data set


def test_an_unreadable_image_is_replaced_in_training_omitted_otherwise_and_named_once(folder, caplog):
    source, path = FolderSource(folder / "train"), str(folder / "train" / "hen" / "02.jpg")
    replacing = ImageDataset(source, 16, replace_unreadable=True)
    batch = collate([replacing[1, 0], replacing[2, 0], replacing[12, 0]])
    expected = [load_image(folder / "train" / name, 16) for name in ("hen/01.png", "hen/03.png", "tench/00.jpg")]
    assert torch.equal(batch.images, torch.stack(expected))
    assert (batch.labels.tolist(), list(batch.unreadable)) == ([0, 0, 1], [path])
    again = collate([replacing[2, 1]])
    assert torch.equal(again.images, expected[1][None])
    assert not again.unreadable
    omitting, unreadable = ImageDataset(source, 16), []
    for _ in range(2):
        unreadable.append(collate([omitting[2, 0], omitting[12, 0]]))
        assert torch.equal(unreadable[-1].images, expected[2][None])
        assert unreadable[-1].labels.tolist() == [1]
    files = UnreadableFiles(strict=False)
    with caplog.at_level(logging.WARNING):
        for reported in (batch, *unreadable):
            files.note(reported)
    assert files.summary() == {"count": 1, "files": [path]}
    assert [record.getMessage().count(path) for record in caplog.records] == [1]
    with pytest.raises(InputError, match=r"02\.jpg"):
        UnreadableFiles(strict=True).note(batch)


def test_where_nothing_is_readable_each_file_is_opened_once_and_the_batch_is_empty(tmp_path, monkeypatch):
    (tmp_path / "hen").mkdir()
    for i in range(50):
        (tmp_path / "hen" / f"{i}.jpg").write_bytes(b"no image")
    dataset = ImageDataset(FolderSource(tmp_path), 16, replace_unreadable=True)
    opened, read = [], dataset.source.read
    monkeypatch.setattr(dataset.source, "read", lambda index: opened.append(index) or read(index))
    batch = collate([dataset[i, epoch] for epoch in range(3) for i in range(50)])
    assert sorted(opened) == list(range(50))
    assert (len(batch.unreadable), len(batch.images)) == (50, 0)


def test_flips_and_crops_are_those_that_the_same_random_numbers_choose(folder):
    source = FolderSource(folder / "val")
    flips = set()
    for wanted, least in ((True, 0.4), (False, 0.4), (True, 1.0), (False, 1.0)):
        augmentation = AugmentationConfig(min_crop=least, random_flip=wanted)
        dataset = ImageDataset(source, 16, augmentation=augmentation, seed=5, replace_unreadable=True)
        for index, epoch in ((1, 0), (5, 2), (0, 0), (1, 1), (2, 0), (2, 3), (3, 1)):
            rng = generator_for(5, 3, index, epoch)
            flip = bool(torch.rand((), generator=rng) < 0.5) and wanted
            share, across, down = torch.rand(3, generator=rng).tolist()
            crop = Crop(share=least + (1 - least) * share, across=across, down=down) if least < 1 else Crop()
            expected = load_image(source.read(index), 16, crop)
            assert torch.equal(dataset[index, epoch][0], expected.flip(-1) if flip else expected)
            flips.add(flip)
    assert flips == {True, False}


def test_tokens_of_a_data_set_are_those_of_its_images(hub, tars, pipeline_folder, tiny_tokenizer, tmp_path):
    names, store = tmp_path / "names.json", tmp_path / "store"
    names.write_text(json.dumps({"4": "four"}))
    tokenizer = str(pipeline_folder / "tokenizer")
    config = ExtractionConfig(
        tokenizer=tokenizer, output_dir=str(store), class_names=str(names), device="cpu", shard_size=5
    )
    extract_tokens.extract(config, DataConfig(dataset=str(tars)))
    store = TokenStore.open(store)
    source = open_source(DataConfig(dataset=str(tars)), "train")
    assert store.header.listings["train"] == source.fingerprint()
    assert store.header.class_names == ["0", "1", "2", "3", "four"]
    assert store.header.split_files == {"train": 12, "val": 4}
    assert [line.split(":")[0] for line in store.left_out()] == [f"{tars}/train row 3", f"{tars}/validation row 3"]
    images = torch.stack([load_image(source.read(i), 32) for i in (0, 1, 2, 4)])
    tokens, labels = store.read_shard("train", 0)
    assert np.array_equal(tokens[:, 0], tiny_tokenizer.tokenize(to_float(images)))
    assert labels.tolist() == [source.labels[i] for i in (0, 1, 2, 4)]
