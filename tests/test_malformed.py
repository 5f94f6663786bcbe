"""Ten thousand malformed files through the loader that training uses: each is a picture, or is named and counted."""

import logging
import re
from collections import Counter
from pathlib import Path

import pytest
from malformed import WHOLE, malformed, originals
from torch.utils.data import DataLoader

from common.errors import InputError
from common.images import load_image
from tokenizer.data import ImageDataset, UnreadableFiles, collate
from tokenizer.settings import AugmentationConfig
from tokenizer.sources import FolderSource

FILES = 10_000
ENDINGS = ("jpg", "png", "webp", "tif", "bmp", "ppm", "jpeg")


def test_all_originals_are_readable():
    assert len(originals()) > 40
    for content in originals():
        assert load_image(content, 16).shape == (3, 16, 16)


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    """A class folder of malformed files under names that seldom fit, and what is known of each of them."""
    folder = tmp_path_factory.mktemp("heap")
    (folder / "hen").mkdir()
    made = {}
    for seed in range(FILES):
        path = folder / "hen" / f"{seed:05d}.{ENDINGS[seed % len(ENDINGS)]}"
        made[str(path)], content = malformed(seed)
        path.write_bytes(content)
    return folder, made


def test_ten_thousand_malformed_files_are_read_or_named_once_and_counted(heap, caplog, capfd, recwarn):
    folder, made = heap
    dataset = ImageDataset(FolderSource(folder), 16, augmentation=None, seed=0, replace_unreadable=False)
    assert len(dataset) == FILES
    keys = [[(i, 0) for i in range(start, start + 100)] for start in range(0, FILES, 100)]
    unreadable = UnreadableFiles(strict=False)
    readable = 0
    # a hang would be a time-out of the loader, and a crash the end of its process
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=1, collate_fn=collate, timeout=120)
    with caplog.at_level(logging.WARNING):
        for batch in loader:
            unreadable.note(batch)
            assert len(batch.images) + len(batch.unreadable) == 100
            assert len(batch.labels) == len(batch.images)
            readable += len(batch.images)
            if len(batch.images):
                assert batch.images.shape[1:] == (3, 16, 16)

    summary = unreadable.summary()
    assert readable + summary["count"] == FILES
    named = Counter(record.args[0] for record in caplog.records)
    assert set(named.values()) == {1}
    assert set(named) == set(summary["files"]) <= set(made)
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list

    refused = Counter(made[name] for name in named)
    total = Counter(made.values())
    assert refused[WHOLE] == 0
    assert total[WHOLE] > 300
    assert refused["zeroed"] == total["zeroed"]
    assert refused["foreign"] == total["foreign"]
    # a cut off end may be a checksum, a later frame, or padding; seldom
    assert refused["cut"] > 0.9 * total["cut"]
    assert refused["bomb"] > 0.7 * total["bomb"]
    for damage in ("flipped", "overwritten", "spliced", "shifted"):
        assert 0.1 * total[damage] < refused[damage] < total[damage]


def test_training_goes_through_the_heap_and_replaces_what_is_unreadable(heap):
    folder, made = heap
    source = FolderSource(folder)
    augmentation = AugmentationConfig(min_crop=0.3)
    dataset = ImageDataset(source, 16, augmentation=augmentation, seed=0, replace_unreadable=True)
    keys = [[(i, epoch) for i in range(start, start + 50)] for epoch in (0, 1) for start in range(0, 1000, 50)]
    unreadable = UnreadableFiles(strict=False)
    seen = Counter()
    for batch in DataLoader(dataset, batch_sampler=keys, num_workers=1, collate_fn=collate, timeout=120):
        unreadable.note(batch)
        seen.update(batch.unreadable.keys())
        assert batch.images.shape == (50, 3, 16, 16)
    assert set(seen.values()) == {1}  # by each process, once
    assert unreadable.summary()["count"] == len(seen) > 300
    first = next(iter(seen))
    with pytest.raises(InputError, match=re.escape(Path(first).name)):
        UnreadableFiles(strict=True).note(collate([
            ImageDataset(source, 16, augmentation=None, seed=0, replace_unreadable=False)[list(made).index(first), 0]
        ]))  # fmt: skip
