import io
import json
import logging
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.errors import InputError
from common.images import Crop, load_image, to_float
from generator.tokens import TokenStore
from tokenizer.data import ImageDataset, UnreadableFiles, collate
from tokenizer.settings import AugmentationConfig, DataConfig
from tokenizer.sources import FolderSource, open_source
from training.loop import generator_for

NAMES = ["hen", "tench"]


def encoded(number, kind="PNG"):
    """A picture of one colour, given by its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 24), (number * 10, 255 - number * 10, 7)).save(buffer, kind)
    return buffer.getvalue()


def colour(image):
    return image[:, 3, 3].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes; 24 files to train on, of which train/hen/02.jpg is cut short, and 6 held out."""
    folder = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name in NAMES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels).resize((16 + i, 20), Image.Resampling.BICUBIC)
                picture.save(folder / split / name / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    cut = folder / "train" / "hen" / "02.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The real library, kept off the network and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield datasets
    patch.undo()


def rows(start, count):
    """Contents by row; row 3 of a split is no image."""
    return [b"no image" if i == 3 else encoded(start + i) for i in range(count)]


@pytest.fixture(scope="module")
def parquet(hub, tmp_path_factory):
    """12 rows to train on and 4 held out, with class names."""
    folder = tmp_path_factory.mktemp("parquet")
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=NAMES)})
    for split, start, count in (("train", 0, 12), ("validation", 12, 4)):
        images = [{"bytes": content, "path": None} for content in rows(start, count)]
        columns = {"image": images, "label": [i % 2 for i in range(count)]}
        hub.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000.parquet")
    return folder


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(start, count, labels=lambda i: i % 3):
    members = [
        (f"{i:03d}.jpg", content, f"{i:03d}.cls", b"%d" % labels(i)) for i, content in enumerate(rows(start, count))
    ]
    return [pair for a, b, c, d in members for pair in ((a, b), (c, d))]


@pytest.fixture(scope="module")
def tars(hub, tmp_path_factory):
    """The same in two tars for training, one held out; classes are integers, the highest one held out only."""
    folder = tmp_path_factory.mktemp("tars")
    content = samples(0, 12)
    write_tar(folder / "train-000.tar", content[:14])
    write_tar(folder / "train-001.tar", content[14:])
    write_tar(folder / "validation-000.tar", samples(12, 4, lambda i: 4 if i == 3 else 0))
    return folder


def refusal(**settings):
    split = settings.pop("split", "train")
    with pytest.raises(InputError) as caught:
        open_source(DataConfig(**settings), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is configured


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "neither"), ({"data_dir": "a", "dataset": "b"}, "both"),
     ({"data_dir": "a", "image_column": "b"}, "image_column"), ({"data_dir": "a", "val_split": "test"}, "val_split")],
)  # fmt: skip
def test_exactly_one_kind_of_data_is_given(settings, named):
    with pytest.raises(InputError, match=named) as caught:
        DataConfig(**settings)
    assert "--data" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_crop_of_an_impossible_size_is_refused(share):
    with pytest.raises(InputError, match="min_crop"):
        AugmentationConfig(min_crop=share)


# folders


def test_a_folder_gives_its_files_in_order_with_their_classes(folder):
    source = open_source(DataConfig(data_dir=str(folder)), "train")
    files = sorted((folder / "train").rglob("*.*"))
    assert len(source) == len(files) == 24
    assert source.classes == NAMES
    assert source.name == str(folder / "train")
    assert [source.read(i) for i in range(24)] == files
    assert [source.image_name(i) for i in range(24)] == [str(path) for path in files]
    assert [NAMES[source.label(i)] for i in range(24)] == [path.parent.name for path in files]


def test_the_fingerprint_of_a_folder_depends_on_its_files_and_not_on_its_path(folder, tmp_path):
    source = FolderSource(folder / "train")
    assert len(source.fingerprint()) == 16
    shutil.copytree(folder, tmp_path / "copy")
    assert FolderSource(tmp_path / "copy" / "train").fingerprint() == source.fingerprint()
    assert FolderSource(folder / "val").fingerprint() != source.fingerprint()
    (tmp_path / "copy" / "train" / "hen" / "01.png").rename(tmp_path / "copy" / "train" / "tench" / "01a.png")
    assert FolderSource(tmp_path / "copy" / "train").fingerprint() != source.fingerprint()


def test_the_fingerprint_of_a_folder_is_that_of_existing_stores(tmp_path):
    for name, content in (("a/1.png", b"12345"), ("b/2.jpg", b"1")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    # sha256 of "1.png 5 0;2.jpg 1 1;"
    assert FolderSource(tmp_path).fingerprint() == "071bb7804de0abb3"


def test_a_broken_link_and_a_name_that_is_no_text_are_counted_as_unreadable(tmp_path):
    (tmp_path / "hen").mkdir()
    (tmp_path / "hen" / "0.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "hen" / os.fsdecode(b"1\xff.jpg")).write_bytes(b"no image")
    (tmp_path / "hen" / "2.jpg").write_bytes(encoded(2))
    (tmp_path / "hen" / "3.jpg").mkdir()
    source = FolderSource(tmp_path)
    assert len(source.fingerprint()) == 16
    dataset = ImageDataset(source, 16, augmentation=None, seed=0, replace_unreadable=False)
    batch = collate([dataset[i, 0] for i in range(len(source))])
    assert len(batch.images) == 1
    assert list(batch.unreadable) == [str(tmp_path / "hen" / "0.jpg"), str(tmp_path / "hen" / "1\\udcff.jpg")]
    json.dumps(batch.unreadable, ensure_ascii=False).encode()


# data sets


@pytest.mark.parametrize("split", ["train", "val"])
def test_parquet_rows_are_given_by_index_with_their_classes(parquet, split):
    source = open_source(DataConfig(dataset=str(parquet)), split)
    expected = rows(0, 12) if split == "train" else rows(12, 4)
    assert [source.read(i) for i in range(len(source))] == expected
    assert source.classes == NAMES
    assert [source.label(i) for i in range(len(source))] == [i % 2 for i in range(len(expected))]
    assert source.image_name(3) == f"{parquet}/{'train' if split == 'train' else 'validation'} row 3"


def test_tars_give_their_members_and_both_splits_agree_on_the_number_of_classes(tars):
    train, val = (open_source(DataConfig(dataset=str(tars)), split) for split in ("train", "val"))
    assert [train.read(i) for i in range(len(train))] == rows(0, 12)
    assert [train.label(i) for i in range(12)] == [i % 3 for i in range(12)]
    assert [val.label(i) for i in range(4)] == [0, 0, 0, 4]
    assert train.classes == val.classes == ["0", "1", "2", "3", "4"]


def test_a_split_may_be_a_part_of_one(parquet):
    config = DataConfig(dataset=str(parquet), train_split="train[:10]", val_split="train[10:]")
    train, val = open_source(config, "train"), open_source(config, "val")
    assert [val.read(0), val.read(1)] == rows(0, 12)[10:]
    assert [val.label(0), val.label(1)] == [0, 1]
    assert (len(train), len(val)) == (10, 2)
    assert train.fingerprint() != open_source(DataConfig(dataset=str(parquet)), "train").fingerprint()


def test_a_configuration_may_be_chosen(hub, tmp_path):
    features = hub.Features({"image": hub.Image()})
    for name, start in (("small", 0), ("large", 5)):
        columns = {"image": [{"bytes": encoded(start), "path": None}]}
        (tmp_path / name).mkdir()
        hub.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / name / "train.parquet")
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    assert "large" in refusal(dataset=str(tmp_path))  # the message names those there are
    source = open_source(DataConfig(dataset=str(tmp_path), dataset_config="large"), "train")
    assert source.read(0) == encoded(5)


def test_without_labels_all_is_one_class(hub, tmp_path):
    features = hub.Features({"image": hub.Image()})
    columns = {"image": [{"bytes": encoded(i), "path": None} for i in range(3)]}
    hub.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    source = open_source(DataConfig(dataset=str(tmp_path)), "train")
    assert source.classes == ["image"]
    assert [source.label(i) for i in range(3)] == [0, 0, 0]


def test_columns_may_be_named(hub, tmp_path):
    pixels = [{"bytes": encoded(i), "path": None} for i in range(3)]
    columns = {
        "a": pixels,
        "b": pixels[::-1],
        "raw": [encoded(i) for i in range(3)],
        "label": [0, 0, 0],
        "kind": [2, 0, 1],
    }
    features = hub.Features({
        **{"a": hub.Image(), "b": hub.Image(), "raw": hub.Value("binary")},
        **{"label": hub.Value("int64"), "kind": hub.Value("uint8")},
    })  # fmt: skip
    for split in ("train", "validation"):
        hub.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    message = refusal(dataset=str(tmp_path))
    assert "2 columns" in message and all(column in message for column in columns)
    for column, expected in (("a", [0, 1, 2]), ("b", [2, 1, 0]), ("raw", [0, 1, 2])):
        config = DataConfig(dataset=str(tmp_path), image_column=column, label_column="kind")
        source = open_source(config, "train")
        assert [source.read(i) for i in range(3)] == [encoded(i) for i in expected]
        assert [source.label(i) for i in range(3)] == [2, 0, 1]
        assert len(source.fingerprint()) == 16
    for wrong in ("kind", "nothing"):
        assert repr(wrong) in refusal(dataset=str(tmp_path), image_column=wrong)
    for wrong in ("a", "nothing"):
        assert repr(wrong) in refusal(dataset=str(tmp_path), image_column="a", label_column=wrong)


def test_plain_parquet_of_packed_images_and_missing_ones(hub, tmp_path):
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": encoded(1), "path": "1.png"}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": "2"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "train.parquet")
    assert "no columns of type Image" in refusal(dataset=str(tmp_path))
    source = open_source(DataConfig(dataset=str(tmp_path), image_column="image"), "train")
    assert [source.read(i) for i in range(4)] == [encoded(1), b"", b"", b""]
    assert len(source.fingerprint()) == 16
    dataset = ImageDataset(source, 16, augmentation=None, seed=0, replace_unreadable=False)
    batch = collate([dataset[i, 0] for i in range(4)])
    assert list(batch.unreadable) == [f"{tmp_path}/train row {i}" for i in (1, 2, 3)]


def test_a_folder_of_files_opened_as_a_data_set_gives_paths(hub, folder):
    source = open_source(DataConfig(dataset=str(folder)), "train")
    assert source.classes == NAMES
    assert sorted(source.read(i) for i in range(len(source))) == sorted((folder / "train").rglob("*.*"))
    assert len(source.fingerprint()) == 16


@pytest.mark.parametrize("label", [-1, None])
def test_rows_without_a_class_are_refused(hub, tmp_path, label):
    columns = {"image": [{"bytes": encoded(0), "path": None}] * 2, "label": [0, label]}
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=NAMES)})
    hub.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    message = refusal(dataset=str(tmp_path))
    assert "row 1" in message and "0..1" in message


def test_text_is_no_class(hub, tmp_path):
    columns = {"image": [{"bytes": encoded(0), "path": None}], "label": ["hen"]}
    features = hub.Features({"image": hub.Image(), "label": hub.Value("string")})
    hub.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    assert "'label'" in refusal(dataset=str(tmp_path))


def test_data_that_cannot_be_loaded_is_one_line(hub, parquet, tars, tmp_path):
    assert "nobody/nothing" in refusal(dataset="nobody/nothing")
    assert str(tmp_path / "missing") in refusal(dataset=str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(dataset=str(tmp_path / "empty"))
    message = refusal(dataset=str(parquet), split="val", val_split="test")
    assert "split test" in message and "validation" in message
    # integers as classes need both splits, whichever is opened
    assert "split test" in refusal(dataset=str(tars), split="train", val_split="test")
    shutil.copytree(tars, tmp_path / "cut")
    cut = tmp_path / "cut" / "train-001.tar"
    cut.write_bytes(cut.read_bytes()[:1700])
    assert str(tmp_path / "cut") in refusal(dataset=str(tmp_path / "cut"))
    (tmp_path / "bad").mkdir()
    write_tar(tmp_path / "bad" / "train.tar", [("0.jpg", encoded(0)), ("0.cls", b"hen")])
    assert str(tmp_path / "bad") in refusal(dataset=str(tmp_path / "bad"))
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish" / "train.parquet").write_bytes(b"PAR1 and nothing else")
    assert str(tmp_path / "rubbish") in refusal(dataset=str(tmp_path / "rubbish"))


def test_only_data_sets_need_the_library(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "channeltok[train]" in refusal(dataset="a/b")
    assert len(open_source(DataConfig(data_dir=str(folder)), "val")) == 6


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_the_fingerprint_of_a_data_set_depends_on_its_rows_only(hub, kind, request, tmp_path, monkeypatch):
    original = request.getfixturevalue(kind)
    source = open_source(DataConfig(dataset=str(original)), "train")
    assert len(source.fingerprint()) == 16
    assert open_source(DataConfig(dataset=str(original)), "train").fingerprint() == source.fingerprint()
    assert open_source(DataConfig(dataset=str(original)), "val").fingerprint() != source.fingerprint()
    # another place, another cache
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert open_source(DataConfig(dataset=str(tmp_path / "copy")), "train").fingerprint() == source.fingerprint()
    if kind == "tars":
        for members in (samples(0, 11), samples(0, 12, lambda i: i % 2), [*samples(1, 12)]):
            shutil.rmtree(tmp_path / "copy")
            (tmp_path / "copy").mkdir()
            write_tar(tmp_path / "copy" / "train.tar", members)
            write_tar(tmp_path / "copy" / "validation.tar", samples(12, 4, lambda i: 4 if i == 3 else 0))
            assert (
                open_source(DataConfig(dataset=str(tmp_path / "copy")), "train").fingerprint() != source.fingerprint()
            )


@pytest.mark.parametrize(
    ("kind", "start"), [("folder", "fork"), ("parquet", "fork"), ("tars", "fork"), ("parquet", "spawn")]
)
def test_worker_processes_return_the_same_batches(kind, request, start):
    place = str(request.getfixturevalue(kind))
    source = open_source(DataConfig(data_dir=place) if kind == "folder" else DataConfig(dataset=place), "train")
    dataset = ImageDataset(source, 16, augmentation=AugmentationConfig(min_crop=0.5), seed=1, replace_unreadable=True)
    keys = [
        [(i % len(source), epoch) for i in range(first, first + 5)] for epoch in (0, 1) for first in range(0, 12, 5)
    ]
    alone = [collate([dataset[key] for key in batch]) for batch in keys]
    fresh = ImageDataset(source, 16, augmentation=AugmentationConfig(min_crop=0.5), seed=1, replace_unreadable=True)
    loader = DataLoader(fresh, batch_sampler=keys, num_workers=1, collate_fn=collate, multiprocessing_context=start)
    for found, expected in zip(loader, alone, strict=True):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
        assert found.unreadable == expected.unreadable
    assert len({name for batch in alone for name in batch.unreadable}) == 1


# images by index and epoch


def test_an_unreadable_image_is_replaced_in_training_and_left_out_otherwise(folder):
    source = FolderSource(folder / "train")
    kept = ImageDataset(source, 16, augmentation=None, seed=0, replace_unreadable=True)
    batch = collate([kept[1, 0], kept[2, 0], kept[12, 0]])
    expected = [load_image(folder / "train" / name, 16) for name in ("hen/01.png", "hen/03.png", "tench/00.jpg")]
    assert torch.equal(batch.images, torch.stack(expected))
    assert batch.labels.tolist() == [0, 0, 1]
    assert list(batch.unreadable) == [str(folder / "train" / "hen" / "02.jpg")]
    again = collate([kept[2, 1]])  # replaced as before, and not named a second time
    assert torch.equal(again.images, expected[1][None])
    assert not again.unreadable
    left_out = ImageDataset(source, 16, augmentation=None, seed=0, replace_unreadable=False)
    for _ in range(2):
        batch = collate([left_out[2, 0], left_out[12, 0]])
        assert torch.equal(batch.images, expected[2][None])
        assert batch.labels.tolist() == [1]
        assert len(batch.unreadable) == 1


def test_where_nothing_is_readable_each_file_is_opened_once_and_the_batch_is_empty(tmp_path, monkeypatch):
    (tmp_path / "hen").mkdir()
    for i in range(50):
        (tmp_path / "hen" / f"{i}.jpg").write_bytes(b"no image")
    dataset = ImageDataset(FolderSource(tmp_path), 16, augmentation=None, seed=0, replace_unreadable=True)
    opened = []
    read = dataset.source.read
    monkeypatch.setattr(dataset.source, "read", lambda index: opened.append(index) or read(index))
    batch = collate([dataset[i, epoch] for epoch in range(3) for i in range(50)])
    assert sorted(opened) == list(range(50))
    assert len(batch.unreadable) == 50
    assert batch.images.shape[0] == 0


def test_each_unreadable_image_is_named_once(folder, caplog):
    source = FolderSource(folder / "train")
    unreadable = UnreadableFiles(strict=False)
    path = str(folder / "train" / "hen" / "02.jpg")
    for replaced in (False, True):
        for _ in range(3):
            dataset = ImageDataset(source, 16, augmentation=None, seed=0, replace_unreadable=replaced)
            with caplog.at_level(logging.WARNING):
                unreadable.note(collate([dataset[2, 0]]))
    assert unreadable.summary() == {"count": 1, "files": [path]}
    assert [record.getMessage().count(path) for record in caplog.records] == [1]
    with pytest.raises(InputError, match=r"02\.jpg"):
        UnreadableFiles(strict=True).note(collate([dataset[2, 0], ImageDataset(
            source, 16, augmentation=None, seed=0, replace_unreadable=False)[2, 0]]))  # fmt: skip


def test_mirroring_depends_on_seed_index_and_epoch_only(folder):
    source = FolderSource(folder / "train")
    plain = ImageDataset(source, 16, augmentation=None, seed=0, replace_unreadable=True)

    def mirrored(seed, keys):
        flipped = ImageDataset(source, 16, augmentation=AugmentationConfig(), seed=seed, replace_unreadable=True)
        found = []
        for key in keys:
            image, straight = flipped[key].image, plain[key].image
            found.append(torch.equal(image, straight.flip(-1)))
            assert found[-1] or torch.equal(image, straight)
        return found

    keys = [(i, epoch) for epoch in range(3) for i in range(24)]
    once = mirrored(0, keys)
    assert once == [bool(torch.rand((), generator=generator_for(0, 3, i, epoch)) < 0.5) for i, epoch in keys]
    assert mirrored(0, keys[::-1])[::-1] == once
    assert mirrored(1, keys) != once
    assert once[:24] != once[24:48]
    assert 0.25 < sum(once) / len(once) < 0.75


def test_random_squares_are_those_that_the_same_random_numbers_choose(folder):
    source = FolderSource(folder / "train")
    for flips in (True, False):
        augmentation = AugmentationConfig(min_crop=0.4, random_flip=flips)
        dataset = ImageDataset(source, 16, augmentation=augmentation, seed=5, replace_unreadable=True)
        shares = []
        for index, epoch in ((1, 0), (1, 1), (7, 0), (14, 2)):
            rng = generator_for(5, 3, index, epoch)
            mirror = bool(torch.rand((), generator=rng) < 0.5)
            share, across, down = torch.rand(3, generator=rng).tolist()
            shares.append(0.4 + 0.6 * share)
            expected = load_image(source.read(index), 16, Crop(share=shares[-1], across=across, down=down))
            assert torch.equal(dataset[index, epoch].image, expected.flip(-1) if mirror and flips else expected)
        assert len(set(shares)) == 4
    augmentation = AugmentationConfig(random_flip=False)
    still = ImageDataset(source, 16, augmentation=augmentation, seed=5, replace_unreadable=True)
    assert torch.equal(still[1, 1].image, load_image(source.read(1), 16))


# scripts


def script_environment(hub):
    return f"import datasets; datasets.config.HF_DATASETS_CACHE = {str(hub.config.HF_DATASETS_CACHE)!r}"


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_tokens_of_a_data_set_are_those_of_its_images(
    scripts, hub, kind, request, pipeline_folder, tiny_tokenizer, tmp_path
):
    place = request.getfixturevalue(kind)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"hen": "hen, a bird", "4": "four"}))
    words = ("--tokenizer", pipeline_folder / "tokenizer", "--dataset", place, "--output-dir", tmp_path / "store")
    done = scripts(
        "extract_tokens.py", *words, "--class-names", names, "--shard-size", 5, before=script_environment(hub)
    )
    assert done.code == 0, done.err
    store = TokenStore.open(tmp_path / "store")
    source = open_source(DataConfig(dataset=str(place)), "train")
    assert store.header.listings["train"] == source.fingerprint()
    assert store.header.class_names == (["hen, a bird", "tench"] if kind == "parquet" else ["0", "1", "2", "3", "four"])
    assert store.header.split_files == {"train": 12, "val": 4}
    assert [line.split(":")[0] for line in store.left_out()] == [f"{place}/train row 3", f"{place}/validation row 3"]
    images = torch.stack([load_image(source.read(i), 32) for i in (0, 1, 2, 4)])
    expected = tiny_tokenizer.tokenize(to_float(images))
    assert np.array_equal(np.load(tmp_path / "store" / "train-00000.tokens.npy")[:, 0], expected)
    labels = np.load(tmp_path / "store" / "train-00000.labels.npy")
    assert labels.tolist() == [source.label(i) for i in (0, 1, 2, 4)]
    again = scripts(
        "extract_tokens.py", *words, "--class-names", names, "--shard-size", 5, before=script_environment(hub)
    )
    assert again.code == 0, again.err


def test_a_tokenizer_is_trained_on_tars_and_a_run_resumed(scripts, hub, tars, tmp_path):
    flags = [
        *("--image-size", 16, "--num-channels", 4, "--num-bits", 4, "--num-heads", 4, "--encoder-widths", 32, 32),
        *("--decoder-widths", 32, "--steps", 4, "--batch-size", 4, "--entropy-group-bits", 4, "--checkpoint-every", 2),
        *("--dataset", tars, "--output-dir", tmp_path / "run", "--min-crop", 0.5, "--mixed-precision", "no"),
        *("--perceptual", "none"),
    ]
    done = scripts("train_tokenizer.py", *flags, before=script_environment(hub))
    assert done.code == 0, done.err
    for split in ("train", "validation"):
        assert done.err.count(f"skipped unreadable image {tars}/{split} row 3") == 1
    done = scripts("train_tokenizer.py", *flags, "--resume", "--min-crop", 0.7, before=script_environment(hub))
    assert done.code == 2
    assert "with augmentation.min_crop = " in done.err
    done = scripts("train_tokenizer.py", *flags, "--data-dir", tars, before=script_environment(hub))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "both" in done.err
